"""The repository: what is found on disk, what is loaded, and what is said of the rest."""

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serve.artifact import MANIFEST
from serve.batcher import Batch
from serve.engines import EngineSpec
from serve.errors import ArtifactInvalid, ModelNotFound, ModelNotReady
from serve.messages import InferRequest
from serve.repository import Repository, find_versions, onnx_source
from serve.tensor import Tensor
from tests.serve import onnx_models
from tests.serve.fake_engine import PATIENCE_S
from tests.serve.onnx_models import linear_by_hand
from tests.serve.versions import publish, rows, slo_document


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def delivered() -> "queue.Queue[Batch]":
    return queue.Queue()


@pytest.fixture
def repository(delivered: "queue.Queue[Batch]") -> Iterator[Repository]:
    made = Repository(delivered.put)
    yield made
    made.close()


def test_find_versions_names_the_highest_of_each_model_when_there_are_many(
    root: Path, tmp_path: Path
) -> None:
    for version in ("2", "9", "10"):
        publish(root, onnx_models.linear, tmp_path, version=version)
    publish(root, onnx_models.pair, tmp_path)
    assert [(s.name, s.version) for s in find_versions(root)] == [("linear", "10"), ("pair", "1")]


def test_find_versions_skips_what_is_no_version_when_it_looks(root: Path, tmp_path: Path) -> None:
    publish(root, onnx_models.linear, tmp_path)
    (root / "linear" / "config.pbtxt").write_text("")
    (root / "linear" / "2").mkdir()  # a write that was interrupted
    (root / "linear" / "draft").mkdir()
    (root / ".hidden" / "1").mkdir(parents=True)
    (root / ".hidden" / "1" / MANIFEST).write_text("{}")
    (root / "empty").mkdir()
    (root / "README").write_text("")
    assert [(s.name, s.version) for s in find_versions(root)] == [("linear", "1")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(None, "not a folder", id="it is missing"),
        pytest.param("file", "not a folder", id="it is a file"),
        pytest.param("folder", "no model version", id="it is empty"),
    ],
)
def test_find_versions_refuses_the_root_when(root: Path, content: str | None, problem: str) -> None:
    if content == "file":
        root.write_text("")
    elif content == "folder":
        root.mkdir()
    with pytest.raises(ArtifactInvalid, match=problem):
        find_versions(root)


def test_repository_serves_the_others_when_one_version_is_broken(
    root: Path, tmp_path: Path, repository: Repository
) -> None:
    publish(root, onnx_models.linear, tmp_path)
    golden = {"golden": {"x": np.zeros(3, np.float32)}}
    publish(root, onnx_models.fixed, tmp_path, **golden, golden_outputs={"y": np.ones(3, "f4")})
    publish(root, onnx_models.pair, tmp_path, engine=EngineSpec("abacus", "model.onnx"))
    (publish(root, onnx_models.text, tmp_path) / MANIFEST).write_text("{")
    repository.load(find_versions(root))
    states = {slot.source.name: (slot.state, slot.reason) for slot in repository.slots()}
    assert states["linear"] == ("READY", "")
    assert states["fixed"][0] == states["pair"][0] == states["text"][0] == "UNAVAILABLE"
    assert "output 'y' differs" in states["fixed"][1]
    assert "engine 'abacus' is unknown, want one of" in states["pair"][1]
    assert "not valid JSON" in states["text"][1]
    assert repository.get("linear").manifest.version == "1"
    with pytest.raises(ModelNotReady, match="output 'y' differs"):
        repository.get("fixed")
    assert repository.is_ready


def test_repository_is_ready_when_what_could_be_loaded_is_loaded(
    root: Path, tmp_path: Path, repository: Repository
) -> None:
    assert not repository.is_ready
    publish(root, onnx_models.linear, tmp_path)
    publish(root, onnx_models.pair, tmp_path)
    repository.load(find_versions(root))
    assert repository.is_ready
    assert repository.versions("linear") == ["1"]


def test_repository_reports_a_version_when_its_manifest_is_of_another(
    root: Path, tmp_path: Path, repository: Repository
) -> None:
    publish(root, onnx_models.linear, tmp_path).parent.rename(root / "renamed")
    repository.load(find_versions(root))
    with pytest.raises(ModelNotReady, match="the manifest is of model 'linear' version '1'"):
        repository.get("renamed")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        pytest.param("absent", "", id="the model is unknown"),
        pytest.param("linear", "2", id="the version is unknown"),
        pytest.param("linear", "latest", id="the version is no number"),
        pytest.param("../linear", "", id="the name is a path"),
        pytest.param("linear\0", "", id="the name has a NUL"),
        pytest.param("", "", id="the name is empty"),
    ],
)
def test_get_finds_nothing_when(
    root: Path, tmp_path: Path, repository: Repository, name: str, version: str
) -> None:
    publish(root, onnx_models.linear, tmp_path)
    repository.load(find_versions(root))
    with pytest.raises(ModelNotFound):
        repository.get(name, version)


def test_source_knows_the_threshold_when_the_manifest_has_an_slo(
    root: Path, tmp_path: Path
) -> None:
    publish(root, onnx_models.linear, tmp_path, slo=slo_document(25.0))
    publish(root, onnx_models.pair, tmp_path)
    publish(root, onnx_models.fixed, tmp_path, slo={"latency": "fast"})
    (publish(root, onnx_models.text, tmp_path) / MANIFEST).write_text("{")
    thresholds = {source.name: source.threshold_s() for source in find_versions(root)}
    assert thresholds == {"linear": 0.025, "pair": None, "fixed": None, "text": None}


# --- plain ONNX files


def test_onnx_source_serves_a_plain_file_when_it_is_named_like_a_model(
    tmp_path: Path, repository: Repository, delivered: "queue.Queue[Batch]"
) -> None:
    source = onnx_source(onnx_models.linear(tmp_path / "resnet-50.v2.onnx"))
    repository.load([source])
    model = repository.get("resnet-50.v2", "1")
    request = InferRequest("resnet-50.v2", "", (Tensor("x", "FP32", rows(2)),))
    model.batcher.submit(model.entry(request, 0.0, None))
    (completion,) = delivered.get(timeout=PATIENCE_S).completions
    np.testing.assert_allclose(completion.outputs["y"], linear_by_hand(rows(2)), atol=1e-5)


@pytest.mark.parametrize(
    ("builder", "max_batch_size"),
    [
        pytest.param(onnx_models.linear, 32, id="it has a batch axis"),
        pytest.param(onnx_models.fixed, 0, id="it has none"),
        pytest.param(onnx_models.work, 0, id="it takes scalars"),
    ],
)
def test_onnx_source_derives_the_batch_size_when(
    tmp_path: Path, builder: onnx_models.Builder, max_batch_size: int
) -> None:
    manifest = onnx_source(builder(tmp_path / "m.onnx")).manifest
    assert manifest is not None
    assert manifest.batching.max_batch_size == max_batch_size


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        pytest.param("m.onnx", None, "not a file", id="it is missing"),
        pytest.param("m.onnx", b"nonsense", "can't load it", id="it is no model"),
        pytest.param("my model.onnx", b"", "want letters, digits", id="its name has a space"),
    ],
)
def test_onnx_source_refuses_a_file_when(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactInvalid, match=problem):
        onnx_source(tmp_path / name)
