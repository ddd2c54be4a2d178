"""The bearer token that agent and caller share: where it comes from, and what it must be.

It comes from a file or the environment and never from the command line, which other users of a
machine can read.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from optimizer.errors import OptimizerError

VARIABLE = "TRIMSERVE_AGENT_TOKEN"
FILE_VARIABLE = "TRIMSERVE_AGENT_TOKEN_FILE"
MIN_LENGTH = 32
MAX_LENGTH = 4096
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
"""RFC 6750, section 2.1."""


class TokenInvalid(OptimizerError):
    """There is no token, or none that can be used; the message never shows it."""


def read_token(environ: Mapping[str, str], file: Path | None = None) -> str:
    """The token in `file`, else in the environment, else in the file that the environment names.

    Raises TokenInvalid.
    """
    if file is None and VARIABLE in environ:
        return checked(environ[VARIABLE].strip(), VARIABLE)
    named = file or (Path(environ[FILE_VARIABLE]) if FILE_VARIABLE in environ else None)
    if named is None:
        raise TokenInvalid(
            f"no token: set {VARIABLE} or {FILE_VARIABLE}, to the same one on both sides; "
            "`openssl rand -hex 32` makes one"
        )
    try:
        with named.open("r", encoding="ascii") as opened:
            return checked(opened.read(MAX_LENGTH + 2).strip(), str(named))
    except (OSError, UnicodeDecodeError) as error:
        raise TokenInvalid(f"{named}: can't be read as a token: {error}") from error


def checked(token: str, where: str) -> str:
    if not MIN_LENGTH <= len(token) <= MAX_LENGTH or not _TOKEN.fullmatch(token):
        raise TokenInvalid(
            f"{where}: got {len(token)} characters, want {MIN_LENGTH} to {MAX_LENGTH} letters, "
            "digits or any of -._~+/="
        )
    return token
