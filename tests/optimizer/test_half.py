"""Half precision on small ONNX files: what stays in fp32, what is near, where it is offered."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizer.quantization.graph import Graph
from optimizer.quantization.half import HEADROOM, LARGEST, kept_in_fp32, to_half
from optimizer.targets import onnxruntime as targets
from optimizer.techniques import Context, Partial, load_technique
from optimizer.variant import OnnxModel, onnx_model
from serve.machine import Machine
from tests.optimizer.onnx_networks import ArraySplit, Network, images, random, residual_network, run

CPU = Machine("a processor", ("avx2",), 2, "Linux x86_64", {})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ONNX Runtime had its GPU providers."""
    monkeypatch.setattr(targets.OnnxRuntimeTarget, "why_not", lambda *_: None)


def products(factor: float = 1.0) -> Network:
    """Three matrix products; what the second gives is `factor` times as large as without, which the
    third takes out again."""
    network = Network(("n", 16))
    network.add("MatMul", "x", random(16, 24))
    network.add("MatMul", network.last, np.float32(factor) * random(24, 24))
    network.add("MatMul", network.last, random(24, 4) / np.float32(factor))
    return network


def split(x: np.ndarray) -> ArraySplit:
    return ArraySplit({"x": x})


def context(x: np.ndarray) -> Context:
    return Context(split(x), CPU, seed=0, max_batch_size=8)


def stored(network: Network, directory: Path) -> OnnxModel:
    directory.mkdir(exist_ok=True)
    onnx.save(network.model(18), directory / "network.onnx")
    return onnx_model(directory, "network.onnx")


@pytest.mark.parametrize("network", [products(), residual_network()], ids=["products", "images"])
def test_all_of_a_tame_network_goes_to_fp16_and_stays_near(network: Network) -> None:
    x = images() if network.shape[1:] != (16,) else random(32, 16)
    graph = network.graph()
    assert kept_in_fp32(graph, split(x)) == ()
    half = to_half(graph, ())
    assert {one.data_type for one in half.model.graph.initializer if one.dims} == {
        onnx.TensorProto.FLOAT16
    }
    wanted, given = run(graph, x), run(half, x)
    assert given.dtype == np.float32  # outputs keep their type
    assert 0 < np.abs(given - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_operators_around_a_value_above_the_largest_stay_in_fp32() -> None:
    graph, x = products(1e5).graph(), random(32, 16)
    kept = kept_in_fp32(graph, split(x))
    _, second, third = (node.name for node in graph.nodes)
    assert kept == (second, third)
    half = to_half(graph, kept)
    wanted = run(graph, x)
    assert np.abs(run(half, x) - wanted).max() < 5e-3 * np.abs(wanted).max()
    casts = [node.name for node in half.nodes if node.op_type == "Cast"]
    assert len(casts) == 2, "into the first product, and out of it"
    assert half.outputs == graph.outputs


def test_calibration_leaves_headroom() -> None:
    network = Network(("n", 2))
    network.add("MatMul", "x", np.eye(2, dtype=np.float32))
    for largest, n_kept in ((0.9 * LARGEST / HEADROOM, 0), (1.1 * LARGEST / HEADROOM, 1)):
        x = np.array([[1.0, largest]], np.float32)
        assert len(kept_in_fp32(network.graph(), split(x))) == n_kept


@pytest.mark.parametrize("number", [1e-12, -1e9])
def test_a_stored_number_that_fp16_loses_keeps_its_operator(number: float) -> None:
    network = Network(("n", 4))
    network.add("MatMul", "x", random(4, 4))
    network.add("Max", network.last, np.array(number, np.float32))
    network.add("MatMul", network.last, random(4, 4))
    graph = network.graph()
    assert kept_in_fp32(graph, split(random(8, 4))) == (graph.nodes[1].name,)


def test_a_network_of_which_nothing_fits_is_refused() -> None:
    network = Network(("n", 4))
    network.add("MatMul", "x", random(4, 4))
    graph, x = network.graph(), 1e6 * random(8, 4)
    with pytest.raises(ValueError, match="fp16 can't hold"):
        to_half(graph, kept_in_fp32(graph, split(x)))


def test_without_a_gpu_it_is_not_offered_and_the_reason_is_told(tmp_path: Path) -> None:
    technique, model = load_technique("quantization"), stored(products(), tmp_path)
    x = random(8, 16)
    assert "fp16" not in technique.space(model, context(x))["format"].choices  # type: ignore[union-attr]
    assert isinstance(technique, Partial)
    assert "it wants ONNX Runtime CUDA" in technique.missing(model, context(x))["fp16"]


@pytest.mark.usefixtures("gpu")
def test_with_a_gpu_it_is_a_format_that_goes_to_gpus_alone(tmp_path: Path) -> None:
    technique, model = load_technique("quantization"), stored(products(1e5), tmp_path / "base")
    given = context(random(32, 16))
    space = technique.space(model, given)
    assert "fp16" in space["format"].choices  # type: ignore[union-attr]
    made = technique.apply(model, {"format": "fp16"}, given, tmp_path)
    assert made.precision == "fp16"
    assert made.notes == ("2 of 3 operators stay in fp32, which hold values that fp16 can't",)
    assert technique.describe({"format": "fp16"}) == "fp16"
    engines = load_technique("compilation").space(made, given)["engine"].choices  # type: ignore[union-attr]
    assert engines == ("onnxruntime_cuda", "onnxruntime_tensorrt")


def test_a_model_in_fp16_is_taken_by_no_target_without_a_gpu(tmp_path: Path) -> None:
    model = replace(stored(products(), tmp_path), precision="fp16")
    reason = load_technique("compilation").check(model, context(random(8, 16)))
    assert reason == "no target here computes in fp16"


def test_a_file_with_weights_in_fp16_is_refused(tmp_path: Path) -> None:
    half = to_half(Graph(products().model()), ())
    (tmp_path / "half.onnx").write_bytes(half.to_bytes())
    reason = load_technique("quantization").check(
        onnx_model(tmp_path, "half.onnx"), context(random(8, 16))
    )
    assert reason == "the model has weights in fp16 already"
