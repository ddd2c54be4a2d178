"""What the documentation names is there: benchmarks, options of commands, files and sections.

It reads; nothing is run, so benchmarks that want packages of their own are checked like all.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import trimserve

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*.md")), ROOT / "examples/README.md"]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
FIRST_PARTY = ("benchmarks", "loadtest", "optimizer", "serve")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
benchmarks = pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)


def texts() -> Iterator[str]:
    specs = ROOT.glob("examples/**/*.yaml")
    for path in (*PAGES, *BENCHMARKS, *specs, ROOT / "Makefile"):
        yield path.read_text()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((one for one in found if one.exists()), None)


@cache
def names_in(path: Path) -> set[str]:
    """All that a module binds, at its top and within."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {one.asname or one.name for one in node.names}
    return found


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules, with the names that are taken from them; also those within functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((one.name, ()) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(one.name for one in node.names)


def test_benchmarks_are_named_as_modules() -> None:
    assert not [
        found for text in texts() for found in re.findall(r"python\S* \S*benchmarks/.*", text)
    ]


def test_benchmarks_that_are_named_can_be_run() -> None:
    named = {
        one for text in texts() for one in re.findall(r"python\S* -m benchmarks\.([a-z_]+)", text)
    }
    there = {one.stem for one in BENCHMARKS if 'if __name__ == "__main__":' in one.read_text()}
    assert named == there


@benchmarks
def test_modules_that_a_benchmark_imports_have_what_it_takes(path: Path) -> None:
    beside = {one.stem for one in BENCHMARKS}
    for module, names in imports(path):
        top = module.partition(".")[0]
        if top not in FIRST_PARTY:
            assert module not in beside, f"{module} is found by its file's folder alone"
            continue
        where = file_of(module)
        if where is None:
            assert module == "benchmarks", module
            assert set(names) <= beside
            continue
        for name in names:
            assert name in names_in(where) or file_of(f"{module}.{name}"), f"{module}.{name}"


def commands(command: Any, words: tuple[str, ...] = ("trimserve",)) -> Iterator[tuple[str, Any]]:
    yield " ".join(words), command
    for name, one in getattr(command, "commands", {}).items():
        yield from commands(one, (*words, name))


def options(command: Any) -> Iterator[tuple[str, ...]]:
    """The names of each, but for those that all programs have and hidden ones."""
    usual = {"--help", "--version", "--show-completion"}
    for one in command.params:
        names = tuple(name for name in (*one.opts, *one.secondary_opts) if name.startswith("--"))
        if names and not getattr(one, "hidden", False) and not usual.intersection(names):
            yield names


def test_options_of_all_commands_are_documented() -> None:
    words = {word for page in PAGES for word in re.findall(r"--[a-z][\w-]*", page.read_text())}
    missing = [
        f"{name} {' '.join(names)}"
        for name, command in commands(typer.main.get_command(trimserve.app))
        for names in options(command)
        if words.isdisjoint(names)
    ]
    assert not missing


def without_code(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def sections(page: Path) -> set[str]:
    """As GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in found}


@pages
def test_files_and_sections_that_are_linked_are_there(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", without_code(page)):
        if link.startswith(("http://", "https://")):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            assert anchor in sections(target), (link, anchor)
