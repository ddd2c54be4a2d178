"""What is taken out of the server's image: what is named, all of it, and nothing else."""

import sysconfig
from pathlib import Path

import pytest

from images.slim import UNUSED, PatternUnmatched, slim


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the package `engine` is installed."""
    for name in ("engine/run.so", "engine/gpu.so", "engine/core/tests/data/a", "engine/tests/b"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
    metadata = tmp_path / "engine-1.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: Engine\nVersion: 1\n")
    return tmp_path


def left(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.glob("engine/**/*") if one.is_file()}


def test_slim_takes_out_what_is_named_and_says_its_size(folder: Path) -> None:
    unused = {"engine": {"engine/gpu.so": "no GPU", "engine/**/tests": "tests"}}
    assert slim(folder, unused) == 300
    assert left(folder) == {"engine/run.so"}
    assert (folder / "engine-1.dist-info/METADATA").exists()


def test_slim_counts_once_what_two_patterns_name(folder: Path) -> None:
    unused = {"engine": {"engine/core": "no core", "engine/**/a": "data"}}
    assert slim(folder, unused) == 100
    assert len(left(folder)) == 3


def test_slim_passes_over_packages_that_are_not_installed(folder: Path) -> None:
    assert slim(folder, {"other": {"engine/gpu.so": "no GPU"}}) == 0
    assert len(left(folder)) == 4


def test_slim_takes_out_nothing_when_a_file_is_not_there_any_more(folder: Path) -> None:
    unused = {"engine": {"engine/gpu.so": "no GPU", "engine/npu.so": "no NPU"}}
    with pytest.raises(PatternUnmatched, match=r"engine: got no file for 'engine/npu\.so'"):
        slim(folder, unused)
    assert len(left(folder)) == 4


@pytest.mark.parametrize("package", UNUSED)
def test_files_that_are_taken_out_are_there_in_the_locked_packages(package: str) -> None:
    site = Path(sysconfig.get_path("purelib"))
    for pattern, reason in UNUSED[package].items():
        assert reason
        assert [*site.glob(pattern)], f"{package}: {pattern}"
