"""Takes what no loader reads out of shared libraries: debugging information and linkers' symbols.

Runs while the image is built, where no `strip` is. What a process maps is said by an ELF file's
segments; what lies behind the last of them, the table of sections too, is for linkers and
debuggers. It doesn't take out what lies between segments, and leaves files of any format but
ELF for 64 bits as they are.
"""

import struct
import sys
import sysconfig
from pathlib import Path

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
"""ELF-64 Object File Format 1.5, section 3; of what is little-endian."""
SEGMENT = struct.Struct("<IIQQQQQQ")
MAGIC = b"\x7fELF\x02\x01"


def shorten(path: Path) -> int:
    """Cut the file behind its last segment, in place; returns the bytes, 0 for any other format."""
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        return 0
    end = _end(content)
    if end >= len(content):
        return 0
    fields = list(HEADER.unpack_from(content))
    fields[6] = fields[12] = fields[13] = 0  # e_shoff, e_shnum, e_shstrndx: no sections
    with path.open("r+b") as file:
        file.write(HEADER.pack(*fields))
        file.truncate(end)
    return len(content) - end


def shorten_all(folder: Path) -> int:
    """All shared libraries in it; returns the bytes."""
    files = (one for one in folder.rglob("*.so*") if one.is_file() and not one.is_symlink())
    return sum(shorten(one) for one in files)


def _end(content: bytes) -> int:
    """Of the last segment, or of the table of segments, in bytes from the file's start."""
    fields = HEADER.unpack_from(content)
    table, n_segments = fields[5], fields[10]
    ends: list[int] = [table + n_segments * SEGMENT.size]
    for position in range(n_segments):
        segment = SEGMENT.unpack_from(content, table + position * SEGMENT.size)
        offset, n_bytes = segment[2], segment[5]
        ends.append(offset + n_bytes)
    return max(ends)


if __name__ == "__main__":
    taken_bytes = shorten_all(Path(sysconfig.get_path("purelib")))
    sys.stdout.write(f"ends of libraries: {taken_bytes / 1e6:.0f} MB taken out\n")
