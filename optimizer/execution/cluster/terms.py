"""Terms: what every node has to have in common with the coordinator, and what speaks against one.

The same packages, since the ids of variants are made of their versions; the same files under the
same paths, which is tried with a mark in the folder of artifacts. It knows nothing of Ray.
"""

import hashlib
import platform
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from optimizer.identity import package_versions

_MARK = ".shared-"
_MAX_MARK_BYTES = 1 << 20


@dataclass(frozen=True)
class Terms:
    """`files` are paths with the SHA-256 of what is there; `host` is the one machine that may
    build, where the database is a file on it."""

    versions: Mapping[str, str]
    files: Mapping[str, str]
    host: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> Self:
        return cls(**held)

    def problems(self) -> list[str]:
        """What this process, on its machine, doesn't meet."""
        own = versions()
        found = [
            f"{name}: {own.get(name, 'none')} here, {wanted} where the study is led; want the same"
            for name, wanted in self.versions.items()
            if own.get(name) != wanted
        ]
        for path, wanted in self.files.items():
            if _digest(Path(path)) != wanted:
                found.append(
                    f"{_shown(Path(path))} isn't what it is where the study is led; want a folder "
                    "that all nodes share, under the same path"
                )
        if self.host is not None and self.host != host():
            found.append(
                f"the store is an SQLite file on {self.host}; want postgresql://… for several "
                "machines"
            )
        return found


def versions() -> dict[str, str]:
    """What decides the ids of variants, beside techniques of the user's own."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **package_versions()}


def host() -> str:
    """This machine's name, as Ray has it too."""
    return socket.gethostname()


@contextmanager
def marked(artifacts: Path, spec: Path, only_here: bool) -> Iterator[Terms]:
    """The terms of a study, while a mark lies in its folder of artifacts. Raises OSError."""
    artifacts.mkdir(parents=True, exist_ok=True)
    mark = artifacts / f"{_MARK}{secrets.token_hex(8)}"
    mark.write_text(secrets.token_hex(32), "utf-8")
    try:
        files = {str(path): _digest(path) for path in (mark, spec)}
        yield Terms(versions(), files, host() if only_here else None)
    finally:
        mark.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    """Empty where it can't be read, or is no text of a spec's size."""
    try:
        with path.open("rb") as file:
            held = file.read(_MAX_MARK_BYTES + 1)
    except OSError:
        return ""
    return hashlib.sha256(held).hexdigest() if len(held) <= _MAX_MARK_BYTES else ""


def _shown(path: Path) -> str:
    """The folder for a mark, which is gone when somebody reads of it."""
    return str(path.parent if path.name.startswith(_MARK) else path)
