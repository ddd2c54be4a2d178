"""The agent's cache of artifacts: folders by the digest of what is in them, within a size.

It takes only files that hold data, checks them before anything else sees them, and lets the least
recently used go where room is needed. It knows neither HTTP nor engines.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from optimizer.measuring.onnx_files import check_onnx
from optimizer.variant import directory_digest
from serve.artifact import check_file_name
from serve.errors import ArtifactInvalid

DIGEST = re.compile(r"[0-9a-f]{64}")
SUFFIXES = frozenset({".onnx", ".data", ".onnx_data", ".xml", ".bin", ".json", ".txt"})
"""Of files that engines read as data. A torch.export archive (.pt2) or a library carries code."""
MAX_FILES = 256
_UPLOAD = ".upload-"
_PIECE = 1 << 20


@dataclass(frozen=True)
class ArtifactCache:
    """`max_bytes` is of all artifacts together, `max_artifact_bytes` of one."""

    directory: Path
    max_bytes: int
    max_artifact_bytes: int

    def prepare(self) -> None:
        """Make the folder and clear what an interrupted upload left."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in self.directory.glob(f"{_UPLOAD}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def find(self, digest: str) -> Path | None:
        """The artifact's folder, or None; it is the most recently used now."""
        path = self.directory / digest
        if not DIGEST.fullmatch(digest) or not path.is_dir():
            return None
        os.utime(path)
        return path

    def add(self, digest: str, sizes: Mapping[str, int], read: Callable[[int], bytes]) -> Path:
        """Take the files of these sizes, whose contents `read` gives one behind the other.

        Raises ArtifactInvalid where names, sizes or contents aren't allowed, or the digest isn't
        theirs; then nothing is kept.
        """
        self._check(digest, sizes)
        self._make_room(sum(sizes.values()))
        try:
            return self._add(digest, sizes, read)
        except (OSError, UnicodeError) as error:
            raise ArtifactInvalid(digest, f"can't be kept: {error}") from error

    def _add(self, digest: str, sizes: Mapping[str, int], read: Callable[[int], bytes]) -> Path:
        with tempfile.TemporaryDirectory(
            prefix=_UPLOAD, dir=self.directory, ignore_cleanup_errors=True
        ) as scratch:
            made = Path(scratch, "artifact")
            made.mkdir()
            for name, size in sizes.items():
                _write(made / name, size, read)
            if read(1):
                raise ArtifactInvalid(digest, "more bytes than its files have")
            found = directory_digest(made)
            if found != digest:
                raise ArtifactInvalid(digest, f"the digest of what came is {found}")
            for path in made.rglob("*.onnx"):
                check_onnx(path)
            kept = self.directory / digest
            if not kept.is_dir():
                made.rename(kept)
        return kept

    def _check(self, digest: str, sizes: Mapping[str, int]) -> None:
        if not DIGEST.fullmatch(digest):
            raise ArtifactInvalid(f"artifact {digest[:80]!r}", "want a SHA-256 in hex")
        if not 1 <= len(sizes) <= MAX_FILES:
            raise ArtifactInvalid(digest, f"{len(sizes)} files, want 1 to {MAX_FILES}")
        for name, size in sizes.items():
            check_file_name(name, digest)
            if Path(name).suffix not in SUFFIXES:
                raise ArtifactInvalid(
                    digest,
                    f"file {name!r} may carry code, want one of {', '.join(sorted(SUFFIXES))}",
                )
            if size < 0:
                raise ArtifactInvalid(digest, f"file {name!r}: size {size}, want at least 0")
        if sum(sizes.values()) > min(self.max_artifact_bytes, self.max_bytes):
            raise ArtifactInvalid(
                digest,
                f"{sum(sizes.values())} bytes, at most {self.max_artifact_bytes} are allowed",
            )

    def _make_room(self, wanted: int) -> None:
        """Let the least recently used go until `wanted` bytes fit."""
        kept = [path for path in self.directory.iterdir() if DIGEST.fullmatch(path.name)]
        kept.sort(key=lambda path: path.stat().st_mtime)
        sizes = {path: _size(path) for path in kept}
        for path in kept:
            if sum(sizes.values()) + wanted <= self.max_bytes:
                return
            shutil.rmtree(path)
            del sizes[path]


def _write(path: Path, size: int, read: Callable[[int], bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        while size:
            piece = read(min(size, _PIECE))
            if not piece:
                raise ArtifactInvalid(path.name, f"ends {size} bytes too early")
            file.write(piece)
            size -= len(piece)


def _size(directory: Path) -> int:
    with suppress(OSError):
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return 0
