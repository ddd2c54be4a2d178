"""Names of exported graphs: outputs that are named like inner tensors."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from optimizer.onnx_names import name_tensors, placeholders
from optimizer.parity import check_parity
from optimizer.spec import InputSpec, ModuleSource, OutputSpec
from optimizer.techniques import load_technique
from optimizer.variant import TorchModel
from serve.engines import EngineSpec, load_engine
from tests.optimizer.workbench import MAX_BATCH_SIZE, Workbench, make_workbench

X = np.arange(8, dtype=np.float32).reshape(2, 4) - 4


def chain() -> onnx.ModelProto:
    """relu(x) + w, then a condition whose branches read the inner tensor "relu"."""
    value = helper.make_tensor_value_info
    branch = {
        name: helper.make_graph(
            [helper.make_node(kind, ["relu"], [f"{name}_y"])],
            name,
            [],
            [value(f"{name}_y", TensorProto.FLOAT, None)],
        )
        for name, kind in (("then", "Neg"), ("else", "Identity"))
    }
    given, made = placeholders("input", 1)[0], placeholders("output", 1)[0]
    nodes = [
        helper.make_node("Relu", [given], ["relu"]),
        helper.make_node(
            "If", ["yes"], ["if"], then_branch=branch["then"], else_branch=branch["else"]
        ),
        helper.make_node("Add", ["if", "w"], [made]),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [value(given, TensorProto.FLOAT, ["batch", 4])],
        [value(made, TensorProto.FLOAT, ["batch", 4])],
        [
            numpy_helper.from_array(np.ones(4, np.float32), "w"),
            numpy_helper.from_array(np.array(True), "yes"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("given", "made"),
    [
        pytest.param("x", "y", id="nothing else is named so"),
        pytest.param("x", "relu", id="the output is named like an inner tensor"),
        pytest.param("relu", "w", id="both are named like inner tensors"),
        pytest.param("then_y", "else_y", id="they are named like tensors of a branch"),
        pytest.param("relu", "relu_inner", id="the other name is taken, too"),
    ],
)
def test_graph_can_be_loaded_and_computes_the_same_when(
    given: str, made: str, tmp_path: Path
) -> None:
    model = chain()
    name_tensors(model, [given], [made])
    onnx.save(model, tmp_path / "model.onnx")
    for engine in ("onnxruntime", "openvino"):
        loaded = load_engine(tmp_path, EngineSpec(engine, "model.onnx"))
        want = 1 - np.maximum(X, 0)
        np.testing.assert_array_equal(loaded.run({given: X})[made], want)


def test_names_are_refused_when_their_number_is_another() -> None:
    with pytest.raises(ValueError, match="has 2 inputs and outputs, want 3"):
        name_tensors(chain(), ["x"], ["y", "z"])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("study"))


def test_export_can_be_loaded_when_the_output_is_named_like_an_operator(
    bench: Workbench, tmp_path: Path
) -> None:
    parts = [torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)]
    source = ModuleSource(
        module=torch.nn.Sequential(*parts, torch.nn.ReLU()).eval(),
        inputs=(InputSpec(name="image", datatype="FP32", shape=(1, 8, 8)),),
        outputs=(OutputSpec(name="relu"),),
    )
    model = TorchModel(source, "")
    exported = load_technique("export").apply(model, {}, bench.context, tmp_path)
    check_parity(exported, model, bench.inputs, MAX_BATCH_SIZE)
    assert exported.notes == ()
