"""What each technique does beyond the contract that all keep (test_contract.py)."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from optimizer.kernels import n_quantized, prove
from optimizer.model_source import source_digest
from optimizer.parity import check_parity, load_runner
from optimizer.space import Value, defaults
from optimizer.spec import TorchSource, read_spec
from optimizer.techniques import load_technique
from optimizer.variant import (
    EngineModel,
    Kind,
    OnnxModel,
    onnx_model,
    source_model,
)
from serve.machine import Machine
from tests.optimizer.tiny_study import write_study
from tests.optimizer.workbench import MAX_BATCH_SIZE, Workbench, make_workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("study"))


def test_export_gives_a_symbolic_batch_and_the_names_of_the_spec(bench: Workbench) -> None:
    exported = bench.models[Kind.ONNX]
    assert isinstance(exported, OnnxModel)
    graph = onnx.load(exported.path).graph
    assert [tensor.name for tensor in graph.input] == ["image"]
    assert [tensor.name for tensor in graph.output] == ["logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_param")
    assert exported.notes == ()


BRANCHING = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, image):
        flat = image.flatten(1)
        if flat.sum() > 1e9:  # a branch on data: dynamo's exporter can't trace it
            flat = flat * 2
        return self.linear(flat)

def build():
    return Branching()
"""


def test_export_falls_back_and_says_so_when_dynamo_cannot_trace(
    bench: Workbench, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    write_study(tmp_path)
    torch.manual_seed(0)
    (tmp_path / "tiny.py").write_text(BRANCHING)
    linear = torch.nn.Linear(64, 4)
    weights = {f"linear.{name}": value for name, value in linear.state_dict().items()}
    save_file(weights, tmp_path / "tiny.safetensors")
    source = read_spec(tmp_path / "spec.yaml").model
    model = source_model(source, source_digest(source))
    directory = tmp_path / "exported"
    directory.mkdir()

    exported = load_technique("export").apply(model, {}, bench.context, directory)

    assert "TorchScript" in exported.notes[0]
    check_parity(exported, model, bench.inputs, MAX_BATCH_SIZE)


def test_quantization_runs_in_int8_kernels_of_both_engines(
    bench: Workbench, tmp_path: Path
) -> None:
    quantized = _quantized(bench, tmp_path)
    assert quantized.precision == "int8"
    assert n_quantized(quantized.path) == 3
    compilation = load_technique("compilation")
    for engine in ("onnxruntime", "openvino"):
        directory = tmp_path / engine
        directory.mkdir()
        parameters = defaults(compilation.space(quantized, bench.context), engine=engine)
        compiled = compilation.apply(quantized, parameters, bench.context, directory)
        assert isinstance(compiled, EngineModel)
        assert compiled.precision == "int8"
        sizes = (MAX_BATCH_SIZE,) if engine == "openvino" else ()
        proof = prove(compiled.directory, compiled.served(1, 1, sizes), bench.inputs)
        assert proof.n_int8 == 3, engine


def test_quantization_leaves_the_process_as_it_was(
    bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, handlers = [*sys.path], [*logging.getLogger().handlers]
    _quantized(bench, tmp_path, calibration="entropy")
    assert sys.path == path
    assert logging.getLogger().handlers == handlers
    assert capsys.readouterr().out == ""


def test_quantization_keeps_chosen_layers_in_fp32(bench: Workbench, tmp_path: Path) -> None:
    quantized = _quantized(bench, tmp_path, keep_fp32=0.1)
    assert n_quantized(quantized.path) == 1
    assert quantized.notes == ("2 of 3 layers stay in fp32, the most sensitive",)


def test_quantization_refuses_with_a_reason_when_done_already(
    bench: Workbench, tmp_path: Path
) -> None:
    quantized = _quantized(bench, tmp_path)
    reason = load_technique("quantization").check(quantized, bench.context)
    assert reason == "the model is int8 already"


def test_quantization_refuses_with_a_reason_when_nothing_is_worth_it(
    bench: Workbench, tmp_path: Path
) -> None:
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [tensor("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [tensor("y", onnx.TensorProto.FLOAT, ["n", 4])],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(proto, tmp_path / "relu.onnx")
    reason = load_technique("quantization").check(onnx_model(tmp_path, "relu.onnx"), bench.context)
    assert reason is not None
    assert "no operator worth it" in reason


@pytest.mark.parametrize(
    ("system", "flags", "activations", "reduce_range"),
    [
        pytest.param("Linux x86_64", ("avx2", "avx512_vnni"), "uint8", False, id="VNNI"),
        pytest.param("Linux x86_64", ("amx_int8",), "uint8", False, id="AMX"),
        pytest.param("Linux x86_64", ("avx2", "avx512f"), "uint8", True, id="x86 without either"),
        pytest.param("Linux aarch64", ("asimddp",), "int8", False, id="ARM"),
    ],
)
def test_quantization_layout_follows_the_flags_of_the_cpu(
    system: str, flags: tuple[str, ...], activations: str, reduce_range: bool, bench: Workbench
) -> None:
    machine = Machine("a processor", flags, 2, system, {})
    context = replace(bench.context, machine=machine)
    space = load_technique("quantization").space(bench.models[Kind.ONNX], context)
    parameters = defaults(space)
    assert parameters["activations"] == activations
    assert parameters["reduce_range"] is reduce_range


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        pytest.param(("avx512_bf16",), ("fp32", "bf16"), id="bf16 in the CPU"),
        pytest.param(("avx2",), ("fp32",), id="no bf16"),
    ],
)
def test_compilation_offers_bf16_only_where_the_cpu_has_it(
    flags: tuple[str, ...], precisions: tuple[str, ...], bench: Workbench
) -> None:
    machine = Machine("a processor", flags, 2, "Linux x86_64", {})
    context = replace(bench.context, machine=machine)
    space = load_technique("compilation").space(bench.models[Kind.ONNX], context)
    precision = space["precision"]
    assert getattr(precision, "choices", None) == precisions


def test_runner_of_torch_and_engine_agree_on_names(bench: Workbench) -> None:
    model = bench.models[Kind.TORCH]
    assert isinstance(getattr(model, "source", None), TorchSource)
    assert list(load_runner(model, MAX_BATCH_SIZE)(bench.inputs)) == ["logits"]


def _quantized(bench: Workbench, tmp_path: Path, **given: Value) -> OnnxModel:
    technique = load_technique("quantization")
    model = bench.models[Kind.ONNX]
    directory = tmp_path / "quantized"
    directory.mkdir()
    parameters = defaults(technique.space(model, bench.context), **given)
    made = technique.apply(model, parameters, bench.context, directory)
    assert isinstance(made, OnnxModel)
    return made
