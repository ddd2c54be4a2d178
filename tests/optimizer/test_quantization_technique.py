"""The technique of quantization on small ONNX files: what it offers, refuses and makes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizer.kernels import precision_of
from optimizer.macs import macs_of, shares_by_precision
from optimizer.quantization.graph import Graph, folded
from optimizer.space import Value, defaults
from optimizer.techniques import Context, load_technique
from optimizer.variant import OnnxModel, onnx_model
from serve.engines import EngineSpec, engine_module, load_engine
from serve.machine import Machine
from tests.optimizer.onnx_networks import (
    ArraySplit,
    Network,
    images,
    random,
    residual_network,
    run,
)

VNNI = Machine("a processor", ("avx2", "avx512_vnni"), 2, "Linux x86_64", {})
AVX2 = Machine("a processor", ("avx2",), 2, "Linux x86_64", {})


def context_of(x: np.ndarray, machine: Machine = AVX2) -> Context:
    return Context(ArraySplit({"x": x}), machine, seed=0, max_batch_size=8)


def stored(network: Network, directory: Path, opset: int = 18) -> OnnxModel:
    directory.mkdir(exist_ok=True)
    onnx.save(network.model(opset), directory / "network.onnx")
    return onnx_model(directory, "network.onnx")


def encoder(width: int = 32) -> Network:
    network = Network(("n", 5, 16))
    start = network.add("LayerNormalization", "x", np.ones(16, np.float32), axis=-1)
    network.add("MatMul", start, random(16, width))
    network.add("Relu", network.add("Add", network.last, random(width)))
    network.add("MatMul", network.last, random(width, 16))
    network.add("Add", network.last, start)
    return network


def made(model: OnnxModel, context: Context, directory: Path, **given: Value) -> OnnxModel:
    technique = load_technique("quantization")
    assert technique.check(model, context) is None
    directory.mkdir()
    parameters = defaults(technique.space(model, context), **given)
    result = technique.apply(model, parameters, context, directory)
    assert isinstance(result, OnnxModel)
    return result


def test_encoders_are_offered_dynamic_ranges_and_smoothing(tmp_path: Path) -> None:
    technique, context = load_technique("quantization"), context_of(random(8, 5, 16))
    space = technique.space(stored(encoder(), tmp_path), context)
    parameters = defaults(space)
    assert parameters["format"] == "static"
    assert parameters["smooth"] is True
    assert "equalize" not in space
    dynamic = defaults(space, format="dynamic")
    assert sorted(dynamic) == ["activations", "format", "reduce_range"]


@pytest.mark.parametrize(("bits", "error"), [(8, 0.03), (4, 0.2)])
def test_large_products_are_offered_weights_in_few_bits_which_compute_in_both_engines(
    bits: int, error: float, tmp_path: Path
) -> None:
    x = random(8, 5, 16)
    model, context = stored(encoder(4096), tmp_path / "base"), context_of(x)
    result = made(model, context, tmp_path / "made", format=f"int{bits}_weights")
    words = load_technique("quantization").describe({"format": f"int{bits}_weights"})
    assert words == f"int{bits} weights"
    assert result.precision == precision_of(result.path) == f"int{bits}"
    wanted = run(folded(model.path), x)
    for engine, sizes in (("onnxruntime", ()), ("openvino", (8,))):
        spec = EngineSpec(engine, result.file, result.precision, batch_sizes=sizes)
        loaded = load_engine(result.directory, spec)
        given = next(iter(loaded.run({"x": x}).values()))
        assert np.sqrt(((given - wanted) ** 2).mean() / wanted.var()) < error, engine


def test_packed_products_ran_in_8_bits_by_all_of_their_multiply_accumulates(tmp_path: Path) -> None:
    model, context = stored(encoder(4096), tmp_path / "base"), context_of(random(8, 5, 16))
    result = made(model, context, tmp_path / "made", format="int8_weights")
    macs = macs_of(result.path)
    assert list(macs.values()) == list(macs_of(model.path).values())
    spec = EngineSpec("onnxruntime", result.file, "int8")
    times = engine_module("onnxruntime").profile(result.directory, spec, {"x": random(8, 5, 16)}, 1)
    assert shares_by_precision(result.path, times) == {"int8": pytest.approx(1.0)}


def test_convolutional_networks_are_offered_equalization(tmp_path: Path) -> None:
    technique, context = load_technique("quantization"), context_of(images())
    space = technique.space(stored(residual_network(), tmp_path), context)
    parameters = defaults(space)
    assert parameters["equalize"] == "none"
    assert not {"smooth", "alpha"} & set(space)
    assert "format" in space


@pytest.mark.parametrize(
    "given",
    [{}, {"format": "dynamic"}, {"smooth": False, "keep_fp32": 0.4}],
    ids=["static", "dynamic", "static with layers in fp32"],
)
def test_encoder_in_8_bits_stays_near(given: dict[str, Value], tmp_path: Path) -> None:
    x = random(32, 5, 16)
    model, context = stored(encoder(), tmp_path / "base"), context_of(x)
    first = made(model, context, tmp_path / "first", **given)
    again = made(model, context, tmp_path / "again", **given)
    assert first.digest == again.digest
    assert first.precision == "int8"
    wanted = run(folded(model.path), x)
    given_back = run(Graph(onnx.load(first.path)), x)
    assert np.sqrt(((given_back - wanted) ** 2).mean() / wanted.var()) < 0.05


def test_weights_keep_all_8_bits_when_pairs_of_products_cannot_saturate(tmp_path: Path) -> None:
    model = stored(residual_network(), tmp_path / "base")
    largest = {}
    for machine in (VNNI, AVX2):
        result = made(model, context_of(images(), machine), tmp_path / str(machine.flags))
        graph = Graph(onnx.load(result.path))
        names = [w.name for w in graph.model.graph.initializer if w.data_type == 3]  # int8
        largest[machine.flags] = max(
            int(np.sort(np.abs(rows.astype(int)))[-2:].sum())
            for name in names
            if graph.weight(name).ndim > 1
            for rows in graph.weight(name).reshape(len(graph.weight(name)), -1)
        )
    assert largest[VNNI.flags] > 200
    assert largest[AVX2.flags] <= 128


def unstored() -> Network:
    """A product of the input with itself."""
    network = Network(("n", 4, 4))
    network.add("MatMul", "x", "x")
    return network


@pytest.mark.parametrize(
    ("network", "opset", "reason"),
    [
        pytest.param(residual_network(), 11, "ONNX opset 13, the model has 11", id="old"),
        pytest.param(unstored(), 18, "has stored weights", id="no weights"),
    ],
)
def test_model_is_refused_with_a_reason_when_it_cannot_be_done(
    network: Network, opset: int, reason: str, tmp_path: Path
) -> None:
    technique = load_technique("quantization")
    found = technique.check(stored(network, tmp_path, opset), context_of(images()))
    assert found is not None
    assert reason in found


def test_model_is_refused_with_a_reason_when_there_are_no_samples(tmp_path: Path) -> None:
    technique = load_technique("quantization")
    context = replace(context_of(images()), calibration=ArraySplit({"x": images(0)}))
    found = technique.check(stored(residual_network(), tmp_path), context)
    assert found == "there are no calibration samples"


def test_description_tells_what_was_chosen() -> None:
    technique = load_technique("quantization")
    common = {"activations": "uint8", "reduce_range": True}
    for given, words in (
        ({"format": "dynamic"}, "int8 (dynamic)"),
        ({"format": "static", "calibration": "mse", "keep_fp32": 0.0}, "int8 (mse)"),
        (
            {"format": "static", "calibration": "percentile", "percentile": 99.9,
             "equalize": "weights", "keep_fp32": 0.1},
            "int8 (percentile 99.9, equalized by weights, 10% of the work in fp32)",
        ),
        (
            {"format": "static", "calibration": "mse", "smooth": True, "alpha": 0.75},
            "int8 (mse, smoothed 0.75)",
        ),
    ):  # fmt: skip
        assert technique.describe({**common, **given}) == words
