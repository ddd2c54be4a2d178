"""The locks that images are made of hold what pyproject.toml wants, pinned by hash."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
CUDA = {"nvidia-cublas", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cudnn-cu13",
        "nvidia-cufft", "nvidia-curand"}  # fmt: skip
"""Whose libraries ONNX Runtime loads for its CUDA provider (`onnxruntime.preload_dlls`)."""


def images() -> dict[str, list[str]]:
    """Image -> its extras, as `make locks` has them."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (listed,) = re.findall(r"^IMAGES := (.+)$", text, re.MULTILINE)
    pairs = [one.split("=") for one in listed.split()]
    return {image: extras.split("+") for image, extras in pairs}


def pins(path: Path) -> dict[str, Version]:
    """Package -> version. Each has a hash, or pip would refuse the file."""
    entries = re.split(r"\n(?=\S)", path.read_text().replace("\\\n", " "))
    found = {}
    for entry in entries:
        if matched := re.match(r"([\w.-]+)==([\w.!+-]+)", entry):
            assert "--hash=sha256:" in entry, entry
            found[canonicalize_name(matched[1])] = Version(matched[2])
    return found


def wanted(extras: list[str]) -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][one] for one in extras)]
    yield from (Requirement(text) for one in lists for text in one)


@pytest.mark.parametrize("image", images())
def test_lock_has_a_version_that_the_project_wants_of_every_dependency(image: str) -> None:
    locked = pins(ROOT / f"locks/{image}.txt")
    locked |= without_cuda() if image == "optimizer-cpu" else {}
    for one in wanted(images()[image]):
        assert locked[canonicalize_name(one.name)] in one.specifier, one
    assert ("torch" in locked) == image.startswith("optimizer")
    assert not {"huggingface-hub", "hf-xet"} & set(locked)


def without_cuda() -> dict[str, Version]:
    """Of the optimizer's image without CUDA: torch, which no lock has."""
    (version,) = re.findall(r"torch==(\S+)", (ROOT / "Dockerfile").read_text())
    return {"torch": Version(version)}


def test_lock_for_torch_without_cuda_differs_by_torch_and_its_libraries_alone() -> None:
    whole, small = (pins(ROOT / f"locks/{one}.txt") for one in ("optimizer", "optimizer-cpu"))
    assert whole.items() >= small.items()
    gone = {name.partition("-")[0] for name in set(whole) - set(small)}
    assert gone == {"cuda", "nvidia", "torch", "triton"}
    assert without_cuda()["torch"].public == str(whole["torch"])


def test_lock_for_gpus_brings_cudas_libraries_and_that_for_cpus_none() -> None:
    assert set(pins(ROOT / "locks/serve-gpu.txt")) >= CUDA
    assert not {one for one in pins(ROOT / "locks/serve.txt") if one.startswith("nvidia-")}
