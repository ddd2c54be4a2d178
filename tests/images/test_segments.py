"""What is cut off shared libraries: the end that nothing loads."""

import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import pytest

from images.segments import HEADER, shorten, shorten_all

(LIBRARY,) = Path(ml_dtypes.__file__).parent.glob("_ml_dtypes_ext*.so")
"""Has 23 MB of debugging information where it is of PyPI."""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return Path(shutil.copy(LIBRARY, tmp_path))


def test_shortened_library_is_smaller_and_loads(library: Path) -> None:
    taken_bytes = shorten(library)
    assert taken_bytes > library.stat().st_size
    assert taken_bytes + library.stat().st_size == LIBRARY.stat().st_size
    script = (
        "import importlib.util as u, numpy, sys; "
        "s = u.spec_from_file_location('_ml_dtypes_ext', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(numpy.dtype(m.bfloat16).itemsize, numpy.ones(2, m.bfloat16).sum())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(library)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "2 2\n"), ended.stderr


def test_shortened_library_is_the_same_but_for_its_end_and_table_of_sections(library: Path) -> None:
    shorten(library)
    before, after = LIBRARY.read_bytes(), library.read_bytes()
    assert after[HEADER.size :] == before[HEADER.size : len(after)]
    fields = [list(HEADER.unpack_from(one)) for one in (before, after)]
    for position in (6, 12, 13):
        assert fields[0][position] > 0
        fields[0][position] = 0
    assert fields[0] == fields[1]


def test_nothing_is_cut_off_twice(library: Path) -> None:
    shorten(library)
    after = library.read_bytes()
    assert shorten(library) == 0
    assert library.read_bytes() == after


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="it is empty"),
        pytest.param(b"GROUP ( libm.so.6 )\n" * 9, id="it is a linker's script"),
        pytest.param(b"\x7fELF\x01\x01" + bytes(200), id="it is for 32 bits"),
    ],
)
def test_other_files_are_left_alone_when(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "libm.so"
    path.write_bytes(content)
    assert shorten(path) == 0
    assert path.read_bytes() == content


def test_links_are_not_followed_twice(library: Path) -> None:
    (library.parent / "link.so").symlink_to(library)
    taken_bytes = shorten_all(library.parent)
    assert taken_bytes == LIBRARY.stat().st_size - library.stat().st_size
