"""The bytecode that stays in the server's image: of what is loaded, no more."""

import compileall
import sys
from collections.abc import Iterator
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest

from images.caches import MODULES, load, take_out

SOURCES = {
    "server_of_test/__init__.py": "",
    "server_of_test/engine.py": "import library_of_test",
    "server_of_test/other_engine.py": "import not_installed_anywhere",
    "library_of_test/__init__.py": "",
    "library_of_test/rest.py": "",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two packages, compiled."""
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert compileall.compile_dir(tmp_path, quiet=1)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [one for one in sys.modules if one.partition(".")[0].endswith("_of_test")]:
        del sys.modules[name]


def compiled(site: Path) -> set[str]:
    return {name for name in SOURCES if Path(cache_from_source(str(site / name))).exists()}


def test_bytecode_stays_of_what_the_packages_load_and_goes_of_all_else(site: Path) -> None:
    assert compiled(site) == set(SOURCES)
    taken_bytes = take_out(site, load(["server_of_test"], ["module_that_is_not_installed"]))
    assert taken_bytes > 0
    assert compiled(site) == {
        "server_of_test/__init__.py", "server_of_test/engine.py", "library_of_test/__init__.py"
    }  # fmt: skip


def test_a_module_that_an_installed_package_lacks_is_an_error(site: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="was_renamed"):
        load(["server_of_test"], ["library_of_test.was_renamed"])


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_named_are_there(name: str) -> None:
    assert find_spec(name) is not None
