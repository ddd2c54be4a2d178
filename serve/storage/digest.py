"""The digest of a version: one name for its whole content, `sha256:<64 hex digits>`.

It knows bytes on local disk, not what they mean.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from serve.artifact import MANIFEST, MAX_MANIFEST_BYTES, FileDigest, file_digest
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.storage.listing import DEFAULT_LIMITS, Limits
from serve.storage.local import files_below

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def parse_digest(text: str) -> str:
    """`text`, if it is a digest. Raises InvalidRequest."""
    if not _DIGEST.fullmatch(text):
        raise InvalidRequest("digest", text, "sha256: and 64 lower-case hexadecimal digits")
    return text


def manifest_digest(raw: bytes) -> str:
    """The digest of a version with this manifest, which holds the digest of every file."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def version_digest(directory: Path, limits: Limits = DEFAULT_LIMITS) -> str:
    """The digest of the version in a local folder.

    It is the manifest's, where there is one. Otherwise it is taken over the canonical JSON of
    [name, SHA-256, size] of every file that isn't hidden, in the order of their names; then all
    files are read. Raises ArtifactInvalid if the folder holds no file or can't be read.
    """
    try:
        if (directory / MANIFEST).is_file():
            with (directory / MANIFEST).open("rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
            if len(raw) > MAX_MANIFEST_BYTES:
                raise ArtifactInvalid(str(directory / MANIFEST), f"over {MAX_MANIFEST_BYTES} bytes")
            return manifest_digest(raw)
        names = [file.name for file in files_below(directory, directory, limits)]
        digests = {name: file_digest(directory / name) for name in names}
    except OSError as error:
        raise ArtifactInvalid(str(directory), error.strerror or str(error)) from error
    if not digests:
        raise ArtifactInvalid(str(directory), "holds no file, want a model version")
    return files_digest(digests)


def files_digest(files: Mapping[str, FileDigest]) -> str:
    """The digest of a version without a manifest, from those of its files by name."""
    rows = [[name, files[name].sha256, files[name].size_bytes] for name in sorted(files)]
    return manifest_digest(json.dumps(rows, separators=(",", ":")).encode())
