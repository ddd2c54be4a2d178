"""Artifacts: what is written is read again, and nothing else is taken for a version."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.artifact import (
    MANIFEST,
    Batching,
    FileDigest,
    Golden,
    Manifest,
    Profile,
    Quality,
    ServiceTime,
    Step,
    next_version,
    parse_manifest,
    read_golden,
    read_manifest,
    verify_files,
    write_golden,
    write_version,
)
from serve.engines import EngineSpec, Signature
from serve.errors import ArtifactInvalid
from serve.machine import this_machine
from serve.tensor import NUMPY_DTYPES, Array, TensorSpec
from tests.serve.versions import slo_document

MANIFEST_OF_A = Manifest(
    model="a",
    version="1",
    signature=Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "INT64", (-1,)),)),
    engine=EngineSpec("onnxruntime", "model.onnx", "int8", 1, 2, (1, 8), {"spinning": True}),
    batching=Batching(8, 0.002, 99),
    variant_id="abc",
    parent_id="def",
    recipe=(Step("quantization", "1", {"bits": 8, "scheme": "minmax"}, 7, {"onnx": "1.0"}),),
    quality=Quality("accuracy", 0.9, 0.01, 0.005, 0.02, 0.018, 0.95, 1000, "validation", "d1"),
    profile=Profile((ServiceTime(1, 0.001, 0.002, 50),), this_machine()),
    slo=slo_document(50.0),
    golden=Golden("golden.npz", 1e-3),
)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Files to publish: a model, one in a folder, and a golden input."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("model.onnx", "weights.bin", "golden.npz"):
        (folder / name).write_bytes(name.encode() * 10)
    return {
        "model.onnx": folder / "model.onnx",
        "data/weights.bin": folder / "weights.bin",
        "golden.npz": folder / "golden.npz",
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_version_round_trips_when_written_and_read(
    repository: Path, sources: dict[str, Path]
) -> None:
    directory = write_version(repository, MANIFEST_OF_A, sources)
    assert directory == repository / "a" / "1"
    manifest = read_manifest(directory)
    assert manifest.files.keys() == sources.keys()
    assert replace(manifest, files={}) == MANIFEST_OF_A
    verify_files(directory, manifest)
    assert (directory / "data/weights.bin").read_bytes() == sources["data/weights.bin"].read_bytes()
    assert {path.name for path in directory.iterdir()} == {
        "data", "golden.npz", "manifest.json", "model.onnx"
    }  # fmt: skip


def test_write_version_refuses_when_the_version_exists(
    repository: Path, sources: dict[str, Path]
) -> None:
    directory = write_version(repository, MANIFEST_OF_A, sources)
    before = (directory / MANIFEST).read_bytes()
    with pytest.raises(ArtifactInvalid, match="immutable"):
        write_version(repository, replace(MANIFEST_OF_A, variant_id="other"), sources)
    assert (directory / MANIFEST).read_bytes() == before
    verify_files(directory, read_manifest(directory))


def test_write_version_replaces_leftovers_when_a_write_was_interrupted(
    repository: Path, sources: dict[str, Path]
) -> None:
    half = repository / "a" / "1"
    half.mkdir(parents=True)
    (half / "model.onnx").write_bytes(b"half")
    (half / "stray").write_bytes(b"old")
    directory = write_version(repository, MANIFEST_OF_A, sources)
    verify_files(directory, read_manifest(directory))
    assert not (directory / "stray").exists()


def test_write_version_leaves_nothing_when_it_fails(
    repository: Path, sources: dict[str, Path]
) -> None:
    with pytest.raises(FileNotFoundError):
        write_version(repository, MANIFEST_OF_A, {**sources, "missing": Path("does-not-exist")})
    assert not (repository / "a" / "1").exists()


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(replace(MANIFEST_OF_A, model="../a"), id="the model's name leads out"),
        pytest.param(replace(MANIFEST_OF_A, model=".hidden"), id="the model's name is hidden"),
        pytest.param(replace(MANIFEST_OF_A, model=""), id="the model has no name"),
        pytest.param(replace(MANIFEST_OF_A, version="0"), id="the version is 0"),
        pytest.param(replace(MANIFEST_OF_A, version="01"), id="the version has a leading zero"),
        pytest.param(replace(MANIFEST_OF_A, version="v1"), id="the version is no number"),
        pytest.param(
            replace(MANIFEST_OF_A, engine=EngineSpec("onnxruntime", "other.onnx")),
            id="the engine's file isn't published",
        ),
        pytest.param(
            replace(MANIFEST_OF_A, golden=Golden("other.npz", 0.1)),
            id="the golden file isn't published",
        ),
    ],
)
def test_write_version_refuses_when(
    repository: Path, sources: dict[str, Path], manifest: Manifest
) -> None:
    with pytest.raises(ArtifactInvalid):
        write_version(repository, manifest, sources)
    assert not list(repository.rglob(MANIFEST))


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "a//b", ".", "", "a\\b", "a\0b", "a/"],
)
def test_write_version_refuses_when_a_file_is_called(
    repository: Path, sources: dict[str, Path], name: str
) -> None:
    with pytest.raises(ArtifactInvalid, match="leads out of the version's folder"):
        write_version(repository, MANIFEST_OF_A, {**sources, name: sources["model.onnx"]})


def test_next_version_counts_interrupted_writes_when_it_looks(repository: Path) -> None:
    assert next_version(repository, "a") == "1"
    for name in ("2", "9", "10", "0", "x", "007"):
        (repository / "a" / name).mkdir(parents=True)
    assert next_version(repository, "a") == "11"


# --- verification


def test_verify_files_names_the_file_when_its_content_changed(
    repository: Path, sources: dict[str, Path]
) -> None:
    directory = write_version(repository, MANIFEST_OF_A, sources)
    (directory / "data/weights.bin").write_bytes(b"tampered")
    with pytest.raises(ArtifactInvalid, match=r"weights\.bin: sha256 .* want"):
        verify_files(directory, read_manifest(directory))


def test_verify_files_names_the_file_when_it_is_missing(
    repository: Path, sources: dict[str, Path]
) -> None:
    directory = write_version(repository, MANIFEST_OF_A, sources)
    (directory / "model.onnx").unlink()
    with pytest.raises(ArtifactInvalid, match=r"model\.onnx: No such file"):
        verify_files(directory, read_manifest(directory))


def test_verify_files_refuses_when_a_link_leads_out_of_the_folder(
    repository: Path, sources: dict[str, Path]
) -> None:
    directory = write_version(repository, MANIFEST_OF_A, sources)
    (directory / "model.onnx").unlink()
    os.symlink(sources["model.onnx"], directory / "model.onnx")  # the same content, elsewhere
    with pytest.raises(ArtifactInvalid, match="leads out"):
        verify_files(directory, read_manifest(directory))


# --- reading manifests that others wrote

Change = Callable[[dict[str, Any]], Any]


def written(change: Change) -> bytes:
    """A good manifest's JSON after `change`."""
    zeros = FileDigest("0" * 64, 1)
    manifest = replace(MANIFEST_OF_A, files={"model.onnx": zeros, "golden.npz": zeros})
    document = json.loads(json.dumps(asdict(manifest)))
    change(document)
    return json.dumps(document).encode()


def test_parse_manifest_accepts_when_nothing_is_changed() -> None:
    assert parse_manifest(written(lambda document: None), "here").model == "a"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(lambda d: d.update(schema_version=2), "schema_version: got 2, want 1",
                     id="the schema is newer"),
        pytest.param(lambda d: d.pop("schema_version"), "schema_version: got None",
                     id="the schema is missing"),
        pytest.param(lambda d: d.update(colour="red"), "colour", id="a key is unknown"),
        pytest.param(lambda d: d["batching"].update(max_batch=3), "max_batch",
                     id="a nested key is unknown"),
        pytest.param(lambda d: d["recipe"][0].update(speed=3), "speed",
                     id="a key in a list is unknown"),
        pytest.param(lambda d: d["engine"].update(thread=3), r"engine\.thread",
                     id="an engine's key is unknown"),
        pytest.param(lambda d: d["signature"]["inputs"][0].update(dims=[1]), "dims",
                     id="a tensor's key is unknown"),
        pytest.param(lambda d: d["profile"]["machine"].update(host="x"), "host",
                     id="a machine's key is unknown"),
        pytest.param(lambda d: d.pop("engine"), "engine", id="a key is missing"),
        pytest.param(lambda d: d["batching"].update(max_batch_size="many"), "max_batch_size",
                     id="a number is text"),
        pytest.param(lambda d: d["signature"]["inputs"][0].update(datatype="FP8"), "FP8",
                     id="a datatype is not served"),
        pytest.param(lambda d: d["files"].update({"../x": d["files"]["model.onnx"]}), "leads out",
                     id="a file leads out of the folder"),
        pytest.param(lambda d: d["engine"].update(file="../model.onnx"), "engine.file",
                     id="the engine's file leads out of the folder"),
        pytest.param(lambda d: d["golden"].update(file="../golden.npz"), "golden.file",
                     id="the golden file leads out of the folder"),
        pytest.param(lambda d: d["engine"].update(instances=0), "instances",
                     id="there is no instance"),
        pytest.param(lambda d: d["engine"].update(threads=-1), "threads",
                     id="threads are negative"),
        pytest.param(lambda d: d["engine"].update(batch_sizes=[0, 4]), "batch_sizes",
                     id="a compiled batch size is 0"),
        pytest.param(lambda d: d["batching"].update(max_batch_size=-1), "max_batch_size",
                     id="the batch size is negative"),
        pytest.param(lambda d: d["batching"].update(max_queue_size=0), "max_queue_size",
                     id="the queue holds nothing"),
        pytest.param(lambda d: d["batching"].update(max_queue_delay_s=-0.1), "max_queue_delay_s",
                     id="the delay is negative"),
    ],
)  # fmt: skip
def test_parse_manifest_refuses_when(change: Change, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=problem) as caught:
        parse_manifest(written(change), "here")
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="it is empty"),
        pytest.param(b"{", id="it is cut"),
        pytest.param(b"[]", id="it is a list"),
        pytest.param(b"\xff\xfe", id="it is no text"),
        pytest.param(b"[" * 100_000, id="it is nested without end"),
    ],
)
def test_parse_manifest_refuses_the_bytes_when(raw: bytes) -> None:
    with pytest.raises(ArtifactInvalid):
        parse_manifest(raw, "here")


def test_read_manifest_names_the_path_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match=r"manifest\.json: No such file"):
        read_manifest(tmp_path)


# --- golden inputs


def test_golden_round_trips_when_written_and_read(tmp_path: Path) -> None:
    inputs = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True])}
    outputs = {"x": np.array([1, 2], np.int64)}
    write_golden(tmp_path / "g.npz", inputs, outputs)
    got_inputs, got_outputs = read_golden(tmp_path / "g.npz")
    for got, want in ((got_inputs, inputs), (got_outputs, outputs)):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], strict=True)


def test_read_golden_refuses_when_it_holds_a_pickle(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", x=np.array([{"code": "runs"}], object))
    with pytest.raises(ArtifactInvalid, match="no readable golden input"):
        read_golden(tmp_path / "g.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x04pickle"])
def test_read_golden_refuses_when_the_file_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.npz").write_bytes(content)
    with pytest.raises(ArtifactInvalid, match="no readable golden input"):
        read_golden(tmp_path / "g.npz")


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.array([[b"a", b""], [b"\xff\0", "é".encode()]], object), id="bytes"),
        pytest.param(np.array(b"one", object), id="a scalar of bytes"),
        pytest.param(np.array([1.5, -0.0], NUMPY_DTYPES["BF16"]), id="bfloat16"),
        pytest.param(np.zeros((0, 3), NUMPY_DTYPES["BF16"]), id="nothing of bfloat16"),
        pytest.param(np.array([True, False]), id="booleans"),
        pytest.param(np.array(2.5, np.float16), id="a scalar"),
    ],
)
def test_golden_tensors_are_the_same_when_they_are_read_again(tmp_path: Path, array: Array) -> None:
    path = tmp_path / "golden.npz"
    write_golden(path, {"x/y": array}, {"x/y": array, "z": np.ones(2, np.float32)})
    inputs, outputs = read_golden(path)
    assert (list(inputs), list(outputs)) == (["x/y"], ["x/y", "z"])
    for got in (inputs["x/y"], outputs["x/y"]):
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tolist() == array.tolist()


def test_golden_is_refused_when_its_raw_bytes_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    with path.open("wb") as file:
        np.savez(
            file,
            **{"inputs.BYTES/x": np.zeros(3, np.uint8), "inputs.shape/x": np.array([1], np.int64)},
        )
    with pytest.raises(ArtifactInvalid, match="no readable golden input"):
        read_golden(path)
