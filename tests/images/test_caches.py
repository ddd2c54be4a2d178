"""The bytecode that is in the server's image: of what is loaded, no more."""

import sys
from collections.abc import Iterator
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest

from images.caches import MODULES, write

SOURCES = {
    "server_of_test/__init__.py": "",
    "server_of_test/engine.py": "import library_of_test",
    "server_of_test/other_engine.py": "import not_installed_anywhere",
    "library_of_test/__init__.py": "",
    "library_of_test/rest.py": "",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two packages, not compiled."""
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [one for one in sys.modules if one.partition(".")[0].endswith("_of_test")]:
        del sys.modules[name]


def compiled(site: Path) -> set[str]:
    return {name for name in SOURCES if Path(cache_from_source(str(site / name))).exists()}


@pytest.mark.parametrize("dont_write", [False, True])
def test_what_the_packages_load_is_compiled_and_nothing_else(
    dont_write: bool, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", dont_write)
    assert compiled(site) == set()
    write(["server_of_test"], ["module_that_is_not_installed"])
    assert compiled(site) == {
        "server_of_test/__init__.py", "server_of_test/engine.py", "library_of_test/__init__.py",
        "server_of_test/other_engine.py",
    }  # fmt: skip
    assert sys.dont_write_bytecode is dont_write


def test_a_module_that_an_installed_package_lacks_is_an_error(site: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="was_renamed"):
        write(["server_of_test"], ["library_of_test.was_renamed"])


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_named_are_there(name: str) -> None:
    assert find_spec(name) is not None
