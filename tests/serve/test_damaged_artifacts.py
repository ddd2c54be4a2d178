"""Versions whose files aren't what was published: refused by their digests, before an engine
opens them, since native readers may crash on anything."""

from collections.abc import Callable
from pathlib import Path

import openvino
import pytest

from serve.artifact import Batching, Manifest, read_manifest, write_version
from serve.engines import EngineSpec
from serve.engines.torch_archive import SIGNATURE_FILE
from serve.errors import ArtifactInvalid
from serve.loading import load_model
from tests.serve import onnx_models
from tests.serve.torch_programs import SIGNATURE, write_program
from tests.serve.versions import manifest_of

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut after a byte": lambda content: content[:1],
    "cut at a third": lambda content: content[: len(content) // 3],
    "cut by a byte": lambda content: content[:-1],
    "longer by a byte": lambda content: content + b"\0",
    "other at its start": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "other in its middle": lambda content: changed(content, len(content) // 2),
    "other at its end": lambda content: content[:-1] + bytes([content[-1] ^ 0x80]),
}


def changed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def onnxruntime_version(repository: Path, scratch: Path) -> Path:
    model = onnx_models.linear(scratch / "model.onnx")
    return write_version(repository, manifest_of(model, "linear"), {"model.onnx": model})


def openvino_version(repository: Path, scratch: Path) -> Path:
    model = onnx_models.linear(scratch / "model.onnx")
    openvino.save_model(openvino.Core().read_model(model), scratch / "model.xml")
    spec = EngineSpec("openvino", "model.xml", batch_sizes=(1, 2))
    manifest = manifest_of(model, "linear", engine=spec)
    return write_version(
        repository, manifest, {name: scratch / name for name in ("model.xml", "model.bin")}
    )


def torch_version(repository: Path, scratch: Path) -> Path:
    path = write_program(scratch)
    files = {"model.pt2": path, SIGNATURE_FILE: scratch / SIGNATURE_FILE}
    manifest = Manifest("pair", "1", SIGNATURE, EngineSpec("torch", "model.pt2"), Batching(8))
    return write_version(repository, manifest, files)


VERSIONS = {
    "model.onnx": onnxruntime_version,
    "model.xml": openvino_version,
    "model.bin": openvino_version,
    "model.pt2": torch_version,
    SIGNATURE_FILE: torch_version,
}


@pytest.fixture(scope="module", params=VERSIONS)
def version(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A version's folder, and the name of one of its files."""
    repository, scratch = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("scratch")
    return VERSIONS[request.param](repository, scratch), request.param


def load(directory: Path) -> None:
    load_model(directory, read_manifest(directory), lambda _: None).close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_version_is_refused_by_the_digest_when_a_file_is(
    damage: str, version: tuple[Path, str]
) -> None:
    directory, file = version
    path = directory / file
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    try:
        with pytest.raises(ArtifactInvalid, match=rf"{file}: sha256 \w{{64}}.*want"):
            load(directory)
    finally:
        path.write_bytes(whole)


def test_version_is_refused_when_a_file_is_missing(version: tuple[Path, str]) -> None:
    directory, file = version
    hidden = directory / file
    whole = hidden.read_bytes()
    hidden.unlink()
    try:
        with pytest.raises(ArtifactInvalid, match=f"{file}: No such file"):
            load(directory)
    finally:
        hidden.write_bytes(whole)


def test_version_is_loaded_when_it_is_whole(version: tuple[Path, str]) -> None:
    load(version[0])
