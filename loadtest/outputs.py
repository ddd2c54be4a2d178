"""Files that commands write, each named by an option, for errors by that name."""

from pathlib import Path

from loadtest.report import write_atomically
from loadtest.session import SettingsInvalid


def check_file(option: str, path: Path | None) -> None:
    """Raises SettingsInvalid where a file couldn't be written, before anything is done for it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise SettingsInvalid(f"{option}: got {path}, want a file in a folder that exists")


def write_file(option: str, path: Path, text: str) -> None:
    """Replace the file in one step. Raises SettingsInvalid where that can't be done."""
    check_file(option, path)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise SettingsInvalid(
            f"{option}: got {path} ({error.strerror}), want a file that can be written"
        ) from error


def write_files(option: str, folder: Path, files: dict[str, str]) -> None:
    """The same for several files below a folder, which is made if need be."""
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    except OSError as error:
        raise SettingsInvalid(
            f"{option}: got {folder} ({error.strerror}), want a folder that can be written"
        ) from error
