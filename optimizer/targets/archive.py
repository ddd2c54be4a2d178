"""Archives of torch (`.pt2`) written again, so that equal contents are equal files.

torch names the folder inside after the file, and numbers every archive that it writes.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

_FOLDER = "model"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ALIGNMENT = 64
"""Of what is in an archive, in bytes: torch maps tensors as they lie there."""
_HEADER_BYTES = 30
"""Of an entry without its name, by the zip format."""
_PADDING_ID = b"FB"
"""Of the field that fills up a header; torch's own writer has the same."""


def write_archive(
    source: Path,
    path: Path,
    edited: Callable[[str, bytes], tuple[str, bytes] | None] = lambda *entry: entry,
) -> None:
    """Write the archive `source` anew at `path`, which may be the same. `edited` gives an entry's
    new name and content, None to leave it out."""
    with zipfile.ZipFile(source) as archive:
        entries = {
            info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()
        }
    entries.pop(".data/serialization_id", None)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(filter(None, (edited(*entry) for entry in entries.items()))):
            info = zipfile.ZipInfo(f"{_FOLDER}/{name}", _EPOCH)
            assert archive.fp is not None
            start = archive.fp.tell() + _HEADER_BYTES + len(info.filename) + 4
            filling = -start % _ALIGNMENT
            info.extra = _PADDING_ID + filling.to_bytes(2, "little") + b"\0" * filling
            archive.writestr(info, content)
