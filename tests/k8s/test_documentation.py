"""Commands in the documentation of Kubernetes, and of the start: they name what is there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import trimserve
from tests.k8s.kustomizations import APPLIED, K8S, ROOT
from tests.k8s.resolved import pods, resolved

PAGES = ("docs/kubernetes.md", "docs/runbooks.md")
pages = pytest.mark.parametrize("page", PAGES)
with_start = pytest.mark.parametrize("page", [*PAGES, "README.md"])


def blocks(page: str) -> list[str]:
    """Code, in blocks and in lines of text."""
    text = (ROOT / page).read_text()
    fenced = re.findall(r"^ *```[a-z]*\n(.+?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text)]


def commands(page: str, program: str) -> list[list[str]]:
    """Words of each line that begins with the program, continued lines joined."""
    lines = [
        line.strip() for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


def test_targets_that_are_built_are_the_dockerfiles() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    there = re.findall(r"^FROM runtime AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    built = [words[words.index("--target") + 1] for words in commands(PAGES[0], "docker")
             if "--target" in words]  # fmt: skip
    assert built
    assert set(built) <= set(there)
    assert set(re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| [^|]+ \| [^|]*\|$", text, re.M)) == set(
        there
    )


@pages
def test_workloads_that_commands_name_are_there(page: str) -> None:
    there = {
        (workload["kind"].lower(), workload["metadata"]["name"])
        for name in APPLIED
        for workload, _ in pods(resolved(K8S / name))
    }
    named = {
        tuple(word.split("/"))
        for words in commands(page, "kubectl")
        for word in words
        if re.fullmatch(r"(deployment|job|statefulset)/[\w-]+", word)
    }
    assert named
    assert named <= there


@pages
def test_labels_that_commands_select_by_are_of_pods(page: str) -> None:
    there = {
        pod["metadata"]["labels"]["app.kubernetes.io/name"]
        for name in APPLIED
        for _, pod in pods(resolved(K8S / name))
    }
    selected = set(re.findall(r"-l app\.kubernetes\.io/name=([\w-]+)", (ROOT / page).read_text()))
    assert selected
    assert selected <= there


def test_folders_that_are_applied_are_there() -> None:
    applied = [
        words[words.index("-k") + 1]
        for page in PAGES
        for words in commands(page, "kubectl")
        if "-k" in words[:-1]
    ]
    jobs = (f"jobs/{name}" for name in ("loadtest", "optimize", "tools", "files"))
    wanted = {f"k8s/{name}" for name in ("namespace", "overlays/cpu", "service", *jobs)}
    assert wanted <= set(applied)
    for folder in applied:
        assert (ROOT / folder / "kustomization.yaml").is_file(), folder


@with_start
def test_options_of_our_commands_are_theirs(page: str) -> None:
    root: Any = typer.main.get_command(trimserve.app)
    tried = 0
    for words in commands(page, "trimserve"):
        command, rest = root, words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        options = [word.partition("=")[0] for word in rest if word.startswith("-")]
        if hasattr(command, "commands"):  # loadtest SLO is loadtest run SLO
            command = command.commands.get("run", command)
        known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        assert set(options) <= known, words
        tried += bool(options)
    assert tried


@with_start
def test_files_that_are_linked_are_there(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if not link.startswith("https://"):
            assert (folder / link).exists(), link


def headings(path: Path) -> set[str]:
    """As GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in found}


@pages
def test_sections_that_are_linked_are_there(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", (ROOT / page).read_text())
    assert links
    for link, anchor in links:
        assert anchor in headings(folder / link if link else ROOT / page), (link, anchor)
