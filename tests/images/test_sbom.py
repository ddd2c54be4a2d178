"""The list of packages that each image holds: made of what is installed, by the lock's program."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from uv import find_uv_bin

from tests.images.test_locks import ROOT, images, pins

LABEL = "dev.trimserve.sbom"
MAKER = ["/opt/build/bin/python", "-m", "cyclonedx_py"]
INSTALLED = ("six", "packaging", "pyyaml", "prometheus-client")
"""Of the build's or the server's lock, to be found again."""


def stages() -> dict[str, list[str]]:
    """Name -> its instructions, each on one line."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in lines:
        if matched := re.fullmatch(r"FROM \S+ AS (\S+)", line):
            inside = found.setdefault(matched[1], [])
        elif found:
            inside.append(line)
    return found


def command(stage: str) -> list[str]:
    """The last one of the stage."""
    given: list[str] = json.loads(stages()[stage][-1].removeprefix("RUN "))
    return given


@pytest.mark.parametrize("image", images())
def test_image_holds_a_list_that_was_made_after_all_was_installed(image: str) -> None:
    made = command(f"{image}-environment")
    assert made[: len(MAKER)] == MAKER
    assert made[-1] == "/opt/trimserve/bin/python"
    path = made[made.index("--output-file") + 1]
    assert f"COPY --from={image}-environment /opt/trimserve /opt/trimserve" in stages()[image]
    (label,) = (one for one in stages()["runtime"] if one.startswith("LABEL"))
    assert dict(re.findall(r'(\S+)="([^"]*)"', label))[LABEL] == path
    assert Path(path).parent == Path("/opt/trimserve")


@pytest.mark.full
def test_the_builds_command_lists_what_is_installed_and_no_more(tmp_path: Path) -> None:
    """In environments of this machine, with the lock's version of the program."""
    build, environment = tmp_path / "build", tmp_path / "trimserve"
    locked = pins(ROOT / "locks/build.txt") | pins(ROOT / "locks/serve.txt")
    wanted = {name: str(locked[name]) for name in INSTALLED}
    for folder, *packages in (
        (build, "--require-hashes", "--requirement", str(ROOT / "locks/build.txt")),
        (environment, "--no-deps", *(f"{name}=={version}" for name, version in wanted.items())),
    ):
        run([find_uv_bin(), "venv", "--quiet", "--python", sys.executable, str(folder)])
        run([find_uv_bin(), "pip", "install", "--quiet", "--python", str(folder), *packages])
    here = {"/opt/build": str(build), "/opt/trimserve": str(environment)}
    told = command("serve-environment")
    for there, folder in here.items():
        told = [one.replace(there, folder) for one in told]
    run(told)
    document = json.loads((environment / "sbom.cdx.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    listed = {canonicalize_name(one["name"]): one["version"] for one in document["components"]}
    assert listed == wanted
    for one in document["components"]:
        assert one["purl"].startswith(f"pkg:pypi/{canonicalize_name(one['name'])}@"), one
        assert one["licenses"], one
    assert str(tmp_path) not in json.dumps(document)


def run(words: list[str]) -> None:
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
