"""Triton's layout and configuration: manifests from folders, configurations from manifests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from serve.artifact import Batching, read_manifest
from serve.derivation import DEFAULT_MAX_BATCH_SIZE, derived_signature
from serve.engines import EngineSpec
from serve.errors import ArtifactInvalid
from serve.loading import load_model
from serve.machine import allowed_cores
from serve.model import Model
from serve.model_config import config_document, parse_config
from serve.triton import config_of, labels_of_layout, manifest_of_layout
from tests.serve import onnx_models
from tests.serve.versions import publish


def version(folder: Path, builder: onnx_models.Builder, name: str = "model.onnx") -> Path:
    directory = folder / "m" / "1"
    directory.mkdir(parents=True)
    builder(directory / name)
    return directory


def manifest(directory: Path, config: str | None = None) -> Any:
    parsed = parse_config(config, "m/config.pbtxt") if config is not None else None
    return manifest_of_layout(directory, "m", "1", parsed)


# --- without a configuration


@pytest.mark.parametrize(
    ("builder", "max_batch_size"),
    [
        pytest.param(onnx_models.linear, DEFAULT_MAX_BATCH_SIZE, id="a batch where axes allow it"),
        pytest.param(onnx_models.fixed, 0, id="none where they don't"),
        pytest.param(onnx_models.work, 0, id="none for scalars"),
        pytest.param(onnx_models.text, DEFAULT_MAX_BATCH_SIZE, id="one for text"),
    ],
)
def test_layout_derives(tmp_path: Path, builder: onnx_models.Builder, max_batch_size: int) -> None:
    made = manifest(version(tmp_path, builder))
    assert made.batching == Batching(max_batch_size)
    assert (made.engine.threads, made.engine.instances) == (allowed_cores(), 1)
    assert list(made.files) == ["model.onnx"]


def graph(path: Path, nodes: Any, inputs: Any, outputs: Any, opset: int = 18) -> Path:
    def values(given: Any) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in given]

    made = helper.make_graph(nodes, "g", values(inputs), values(outputs))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def over_rows(path: Path) -> Path:
    """A softmax over the first axis: what is a batch to look at mixes its rows."""
    softmax = helper.make_node("Softmax", ["x"], ["y"], axis=0)
    return graph(path, [softmax], [("x", ["n", 2])], [("y", ["n", 2])])


def two_axes(path: Path) -> Path:
    """x FP32[rows, 2], w FP32[columns, 2]: two first axes that are not the same."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    inputs = [("x", ["rows", 2]), ("w", ["columns", 2])]
    return graph(path, nodes, inputs, [("y", ["rows", "columns"])])


def noisy(path: Path) -> Path:
    """Another answer each time: nothing can be learnt by comparing."""
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["y"]),
    ]
    return graph(path, nodes, [("x", ["n", 2])], [("y", ["n", 2])])


def centred(path: Path) -> Path:
    """x FP32[n, 2] minus the mean over the first axis."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return graph(path, nodes, [("x", ["n", 2])], [("y", ["n", 2])], opset=13)


def rooted(path: Path) -> Path:
    """A softmax over the first axis of roots, which noise below zero makes NaN."""
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"]),
        helper.make_node("Softmax", ["root"], ["y"], axis=0),
    ]
    return graph(path, nodes, [("x", ["n", 2])], [("y", ["n", 2])])


def of_16(path: Path) -> Path:
    """x FP32[n, open] times a matrix of 16 rows: the file leaves open what must be 16."""
    weight = onnx.numpy_helper.from_array(np.ones((16, 2), np.float32), "w")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "open"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [weight],
    )
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path
    )
    return path


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(None, id="nothing is said"),
        pytest.param(
            'max_batch_size: 4 input [ { name: "x" data_type: TYPE_FP32 dims: [ 16 ] } ] '
            'output [ { name: "y" data_type: TYPE_FP32 dims: [ 2 ] } ]',
            id="the configuration fixes the axis",
        ),
    ],
)
def test_version_warms_up_with_shapes_that_the_model_takes_when(
    tmp_path: Path, config: str | None
) -> None:
    directory = version(tmp_path, of_16)
    loaded = load_model(directory, manifest(directory, config), lambda batch: None)
    assert loaded.max_batch_size == (4 if config else DEFAULT_MAX_BATCH_SIZE)
    loaded.close()


@pytest.mark.parametrize(
    ("builder", "batched"),
    [
        pytest.param(onnx_models.linear, True, id="rows are treated apart"),
        pytest.param(over_rows, False, id="rows are mixed"),
        pytest.param(centred, False, id="rows are compared with their mean"),
        pytest.param(rooted, False, id="noise below zero says nothing"),
        pytest.param(two_axes, False, id="first axes have two names"),
        pytest.param(noisy, True, id="the model is random"),
        pytest.param(onnx_models.pick, True, id="inputs are indices"),
    ],
)
def test_derived_signature_has_a_batch_or_not_when(
    tmp_path: Path, builder: onnx_models.Builder, batched: bool
) -> None:
    builder(tmp_path / "model.onnx")
    spec = EngineSpec("onnxruntime", "model.onnx")
    assert derived_signature(tmp_path, spec).batched is batched


# --- with one


def test_layout_follows_the_configuration_when_there_is_one(tmp_path: Path) -> None:
    directory = version(tmp_path, onnx_models.pair, "net.onnx")
    made = manifest(
        directory,
        """
        name: "m" platform: "onnxruntime_onnx" default_model_filename: "net.onnx"
        max_batch_size: 6
        input [ { name: "a" data_type: TYPE_FP32 dims: [ 2 ] },
                { name: "b" data_type: TYPE_INT64 dims: [ 2 ] } ]
        output [ { name: "doubled" data_type: TYPE_INT64 dims: [ 2 ] } ]
        instance_group [ { count: 2 }, { count: 1 } ]
        dynamic_batching {
          max_queue_delay_microseconds: 250
          default_queue_policy { max_queue_size: 7 default_timeout_microseconds: 30000 }
        }
        """,
    )
    assert made.batching == Batching(6, 250e-6, 7, default_timeout_s=0.03)
    assert made.engine.instances == 3
    assert made.engine.threads == max(1, allowed_cores() // 3)
    assert [spec.name for spec in made.signature.outputs] == ["doubled"]


def test_layout_takes_shapes_as_they_are_when_the_batch_size_is_0(tmp_path: Path) -> None:
    config = """input [ { name: "x" data_type: TYPE_FP32 dims: [ 2, 4 ] } ]
                output [ { name: "y" data_type: TYPE_FP32 dims: [ 2, 3 ] } ]"""
    made = manifest(version(tmp_path, onnx_models.linear), config)
    assert (made.batching.max_batch_size, made.signature.batched) == (0, False)
    assert made.signature.inputs[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        pytest.param('name: "n"', "name: got 'n', want the folder's 'm'", id="it is of another"),
        pytest.param('default_model_filename: "no.onnx"', "'no.onnx' is not in the version",
                     id="the file is missing"),
        pytest.param("max_batch_size: -1", "max_batch_size: got -1", id="the size is negative"),
        pytest.param('input [ { name: "z" data_type: TYPE_FP32 dims: [ 4 ] } ]',
                     "input: got 'z', want one of x", id="an input is unknown"),
        pytest.param('max_batch_size: 4 input [ { name: "x" data_type: TYPE_INT8 dims: [ 4 ] } ]',
                     "input.x.data_type: got INT8, want FP32", id="a datatype is another"),
        pytest.param('max_batch_size: 4 input [ { name: "x" data_type: TYPE_FP32 dims: [ 5 ] } ]',
                     r"input.x.dims: got \[5\], want \[-1, 4\] without its first axis",
                     id="a dimension is another"),
        pytest.param('parameters { key: "intra_op_thread_count" value { string_value: "many" } }',
                     "parameters.intra_op_thread_count: got 'many'", id="threads are no number"),
        pytest.param('backend: "openvino" default_model_filename: "model.onnx" '
                     "instance_group [ { kind: KIND_GPU } ]", "KIND_GPU", id="it wants a GPU"),
        pytest.param("ensemble_scheduling { }", "ensemble_scheduling", id="it is an ensemble"),
    ],
)  # fmt: skip
def test_layout_is_refused_when(tmp_path: Path, config: str, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=problem):
        manifest(version(tmp_path, onnx_models.linear), config)


def test_layout_refuses_a_batch_when_axes_do_not_vary(tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match="max_batch_size: got 4, want 0 for a model"):
        manifest(version(tmp_path, onnx_models.fixed), "max_batch_size: 4")


def test_labels_are_read_beside_the_versions_when_the_configuration_names_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    text = 'output [ { name: "y" label_filename: "names.txt" } ]'
    config = parse_config(text, "config.pbtxt")
    assert labels_of_layout(config, tmp_path) == {"y": ("cat", "dog")}


# --- and back


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    batching = Batching(4, 0.001, 9, default_timeout_s=0.5)
    directory = publish(tmp_path / "repository", onnx_models.pair, tmp_path, batching=batching)
    loaded = load_model(directory, read_manifest(directory), lambda batch: None)
    yield loaded
    loaded.close()


def test_config_is_what_triton_would_need_when_a_manifest_is_served(model: Model) -> None:
    document = config_document(config_of(model))
    assert document["name"] == "pair"
    assert (document["backend"], document["platform"]) == ("onnxruntime", "onnxruntime_onnx")
    assert document["max_batch_size"] == 4
    assert [(one["name"], one["data_type"], one["dims"]) for one in document["input"]] == [
        ("a", "TYPE_FP32", [2]), ("b", "TYPE_INT64", [2]),
    ]  # fmt: skip
    assert document["dynamic_batching"]["max_queue_delay_microseconds"] == 1000
    policy = document["dynamic_batching"]["default_queue_policy"]
    assert (policy["max_queue_size"], policy["default_timeout_microseconds"]) == (9, 500_000)
    assert document["version_policy"] == {"specific": {"versions": [1]}}


def test_config_gives_the_same_manifest_when_it_is_read_again(model: Model, tmp_path: Path) -> None:
    again = manifest_of_layout(version(tmp_path, onnx_models.pair), "pair", "1", config_of(model))
    assert again.batching == model.manifest.batching
    assert again.signature == model.manifest.signature
    assert again.engine == model.manifest.engine


def test_config_is_0_when_there_is_no_batch_axis(tmp_path: Path) -> None:
    directory = publish(tmp_path / "repository", onnx_models.fixed, tmp_path)
    loaded = load_model(directory, read_manifest(directory), lambda batch: None)
    config = config_of(loaded)
    loaded.close()
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [3]
    assert not config.HasField("dynamic_batching")
    assert np.prod(list(config.output[0].dims)) == 3
