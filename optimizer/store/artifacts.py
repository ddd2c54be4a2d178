"""Artifacts: a folder in which the files of models lie, each under its digest.

What is there is whole: files are made elsewhere in the folder and come by a rename. It knows no
database; which variant has which artifact is the store's matter.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optimizer.variant import StoredModel, digest_of

_WORKSHOP = ".building-"
_CHECKPOINTS = ".training"
_LEFTOVER_S = 7 * 86_400.0
_MAX_ATTEMPTS = 5
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
KEPT = "TRIMSERVE_ARTIFACTS_KEPT"
"""A variable that may name a file: it gets a line for each artifact that this process keeps anew,
digest and bytes, so that who started several processes knows what they have stored together."""


class Artifacts:
    """Several processes may use one folder."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be. Raises OSError."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """An empty folder to build an artifact in; what is left in it goes."""
        with tempfile.TemporaryDirectory(prefix=_WORKSHOP, dir=self._folder) as directory:
            path = Path(directory)
            # What is kept is as readable as the folder is, not only to the one who built it.
            path.chmod(self._folder.stat().st_mode & 0o777)
            yield path

    @property
    def checkpoints(self) -> Path:
        """A folder for trainings to keep how far they have come; it may not be there yet."""
        return self._folder / _CHECKPOINTS

    def directory(self, digest: str) -> Path:
        """Where the files of that digest lie, if they are there."""
        return self._folder / digest

    def has(self, model: StoredModel) -> bool:
        """Whether the model's files are there, and are what they were."""
        return self._digest(model) == model.digest

    def keep(self, model: StoredModel) -> Path:
        """Move a model's files here from a workshop; returns where they lie.

        Where the same content is there already, that stays, and the workshop too. Damaged files
        give way. Raises OSError.
        """
        kept = self.directory(model.digest)
        for _ in range(_MAX_ATTEMPTS):
            found = self._digest(model)
            if found == model.digest:
                return kept
            if found:
                self._clear(kept)
            try:
                model.directory.rename(kept)
            except OSError as error:  # by another process, since it was looked at
                if error.errno not in _TAKEN:
                    raise
            else:
                model.directory.mkdir()
                _report(model.digest, kept)
                return kept
        raise OSError(errno.EBUSY, "other processes keep replacing it", str(kept))

    def _digest(self, model: StoredModel) -> str:
        """Of what lies at the model's place; empty for nothing."""
        try:
            return digest_of(model, self.directory(model.digest))
        except FileNotFoundError:  # cleared while it was read
            return ""

    def _clear(self, kept: Path) -> None:
        """By a rename: what others see is there with all its files, or not at all."""
        with self.workshop() as aside, suppress(FileNotFoundError):
            kept.rename(aside / "damaged")

    def _remove_leftovers(self) -> None:
        """Workshops and checkpoints of processes that were killed; younger ones may be in use."""
        for checkpoint in self.checkpoints.glob("*"):
            with suppress(OSError):
                if time.time() - checkpoint.stat().st_mtime > _LEFTOVER_S:
                    checkpoint.unlink()
        for workshop in self._folder.glob(f"{_WORKSHOP}*"):
            with suppress(OSError):
                if time.time() - workshop.stat().st_mtime > _LEFTOVER_S:
                    shutil.rmtree(workshop, ignore_errors=True)


def _report(digest: str, kept: Path) -> None:
    name = os.environ.get(KEPT)
    if not name:
        return
    n_bytes = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    with open(name, "a", encoding="ascii") as file:  # short lines, so that none is torn
        file.write(f"{digest} {n_bytes}\n")
