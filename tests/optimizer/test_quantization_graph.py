"""Static and dynamic int8 of small graphs: where 8 bits are, and that the numbers are right."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from optimizer.quantization.calibration import CalibrationFailed, observe
from optimizer.quantization.correction import correct_biases
from optimizer.quantization.dynamic import quantize_dynamic
from optimizer.quantization.equalization import equalize, pairs_of
from optimizer.quantization.graph import Graph
from optimizer.quantization.layout import lay_out, layers_of
from optimizer.quantization.qdq import Arithmetic, levels_of, quantized
from optimizer.quantization.ranges import Range, minmax
from optimizer.quantization.smoothing import smooth, smoothable
from optimizer.quantization.static import Settings, prepare, quantize_static
from tests.optimizer.onnx_networks import (
    ArraySplit,
    Network,
    images,
    random,
    residual_network,
    run,
)

X86 = Arithmetic(signed=False, pairs_saturate=True, least_error=False)
# As on ARM, but for weights that are safe on the processor that runs the tests.
SIGNED = Arithmetic(signed=True, pairs_saturate=True, least_error=False)


def relative_error(given: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(((given - wanted) ** 2).mean() / wanted.var()))


def operators(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.nodes]


# --- calibration


def test_observe_sees_what_the_tensors_held_whatever_the_batches() -> None:
    graph, x = residual_network().graph(), images(37)
    tensor = graph.node("conv0").output[0]
    weights = dict(zip(("w", "b"), map(graph.weight, graph.node("conv0").input[1:]), strict=True))
    found = observe(graph, {"x": 1, tensor: 1}, ArraySplit({"x": x}))
    in_small = observe(graph, {"x": 1, tensor: 1}, ArraySplit({"x": x}), max_bytes=20_000)
    wanted = plain_convolution(x, weights["w"], weights["b"])
    for observed in (found[tensor], in_small[tensor]):
        np.testing.assert_allclose(observed.means, wanted.mean(axis=(0, 2, 3)), atol=1e-4)
        np.testing.assert_allclose(observed.largest, np.abs(wanted).max(axis=(0, 2, 3)), rtol=1e-4)
        np.testing.assert_allclose(observed.highest, wanted.max(axis=(0, 2, 3)), rtol=1e-4)
        assert observed.size == 8 * 8 * 8
    np.testing.assert_array_equal(found["x"].histogram.counts, in_small["x"].histogram.counts)
    assert found["x"].histogram.n == x.size


def plain_convolution(x: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(x), len(weights), *x.shape[2:]))
    for row in range(3):
        for column in range(3):
            window = padded[:, :, row : row + x.shape[2], column : column + x.shape[3]]
            out += np.einsum("nihw,oi->nohw", window, weights[:, :, row, column])
    return np.asarray(out + bias[:, None, None])


def test_calibration_is_refused_by_the_tensors_name_when_values_are_nan() -> None:
    graph, x = residual_network().graph(), images(4)
    x[2, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationFailed, match="tensor 'x' can't be calibrated"):
        prepare(graph, ArraySplit({"x": x}), Settings(X86))


def test_calibration_is_refused_when_there_are_no_samples() -> None:
    with pytest.raises(CalibrationFailed, match="no calibration samples"):
        prepare(residual_network().graph(), ArraySplit({"x": images(0)}), Settings(X86))


# --- levels and layout


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("span", [Range(0, 6), Range(-1, 3), Range(-2, 0), Range(0, 0)])
def test_levels_have_one_for_zero_and_reach_both_ends(span: Range, signed: bool) -> None:
    levels = levels_of(span, signed)
    smallest, largest = (-128, 127) if signed else (0, 255)
    assert smallest <= levels.zero <= largest
    assert (smallest - levels.zero) * levels.scale == pytest.approx(span.low, abs=levels.scale)
    assert (largest - levels.zero) * levels.scale >= span.high - levels.scale
    assert levels.starts_at_zero == (span.low == 0)


def test_layout_keeps_activations_in_8_bits_from_the_first_layer_to_the_last() -> None:
    graph = residual_network().graph()
    layout = lay_out(graph)
    assert layout.layers == ("conv0", "conv2", "conv4", "gemm9")
    assert layout.others == ("add5", "globalaveragepool7", "flatten8")
    # What is moved has the range of what it was.
    assert layout.tensors["flatten8_out"] == "globalaveragepool7_out"


def test_rectifiers_are_done_by_the_range_when_it_begins_at_zero() -> None:
    for cut in ("Relu", "Clip"):
        made = in_8_bits(residual_network(cut).graph())
        assert cut not in operators(made)
        leaky = in_8_bits(residual_network("LeakyRelu").graph())
        assert operators(leaky).count("LeakyRelu") == 3


def test_residual_additions_run_in_8_bits_in_the_engine(tmp_path: Path) -> None:
    """Where a scale isn't a scalar, ONNX Runtime leaves the addition in fp32, and converts around
    it: 10 % of a residual network's time."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    made = in_8_bits(residual_network().graph())
    onnxruntime.InferenceSession(made.to_bytes(), options, ["CPUExecutionProvider"])
    ran = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "QLinearAdd" in ran
    assert "Add" not in ran


def test_tensor_stays_in_fp32_for_those_who_take_it_so_when_it_is_made_in_fp32() -> None:
    network = Network(("n", 4))
    start = network.add("Softmax", "x")
    network.add("MatMul", start, random(4, 4))
    network.add("Add", network.last, start)
    graph = network.graph()
    made = in_8_bits(graph, random(8, 4))
    assert start in made.node("add2").input
    assert start not in made.node("matmul1").input


def test_a_graph_output_keeps_its_name_when_a_convolution_gives_it() -> None:
    network = Network(("n", 3, 8, 8))
    network.conv(random(4, 3, 1, 1))
    graph = network.graph()
    made = in_8_bits(graph)
    assert made.outputs == graph.outputs
    assert relative_error(run(made, images()), run(graph, images())) < 0.02


def test_weights_that_two_layers_share_are_stored_for_each() -> None:
    network = Network(("n", 4))
    network.add("MatMul", "x", random(4, 4))
    network.nodes.append(
        onnx.helper.make_node("MatMul", [network.last, "matmul0.input1"], ["out"], "again")
    )
    network.last = "out"
    graph = network.graph()
    x = random(32, 4)
    assert relative_error(run(in_8_bits(graph, x), x), run(graph, x)) < 0.05


def in_8_bits(graph: Graph, x: np.ndarray | None = None, arithmetic: Arithmetic = X86) -> Graph:
    split = ArraySplit({"x": images() if x is None else x})
    made, _ = quantize_static(graph, split, Settings(arithmetic, "minmax"))
    return made


# --- numbers


@pytest.mark.parametrize("arithmetic", [X86, SIGNED], ids=["unsigned", "signed"])
def test_graph_in_8_bits_computes_what_plain_arithmetic_does(arithmetic: Arithmetic) -> None:
    """A convolution with a rectifier, number by number."""
    network = Network(("n", 3, 8, 8))
    network.conv(random(4, 3, 3, 3), random(4), pads=[1] * 4)
    network.add("Relu", network.last)
    graph, x = network.graph(), images(4)
    layout = lay_out(graph)
    observed = observe(graph, dict.fromkeys(layout.tensors, 1), ArraySplit({"x": x}))
    ranges = {name: minmax(observed[name].histogram) for name in layout.tensors}
    given = run(quantized(graph, layout, ranges, arithmetic), x)

    def levels(values: np.ndarray, span: Range) -> np.ndarray:
        zero = round(-span.low / span.step)
        rounded = np.clip(np.round(values / span.step) + zero, 0, 255)
        return np.asarray((rounded - zero) * span.step)

    weights, bias = (graph.weight(name).astype(float) for name in graph.node("conv0").input[1:])
    rounded = np.zeros_like(weights)
    for channel, values in enumerate(weights):
        first, second = sorted(np.abs(values).ravel())[-2:]
        scale = max(second, first + second) / 127
        rounded[channel] = np.round(values / scale) * scale
    wanted = plain_convolution(levels(x.astype(float), ranges["x"]), rounded, bias)
    span = ranges["relu1_out"]
    # Sums at the edge between two levels may fall to either side.
    np.testing.assert_allclose(given, levels(np.maximum(wanted, 0), span), atol=span.step * 1.01)
    assert (np.abs(given - levels(np.maximum(wanted, 0), span)) < 1e-4).mean() > 0.98


@pytest.mark.parametrize("method", ["minmax", "mse", "entropy", "percentile"])
@pytest.mark.parametrize("cut", ["Relu", "Clip", "LeakyRelu"])
def test_graph_in_8_bits_stays_near_when_it_is_calibrated(method: str, cut: str) -> None:
    graph = residual_network(cut).graph()
    settings = Settings(X86, method, percent=99.99)
    made, n_kept = quantize_static(graph, ArraySplit({"x": images(64)}), settings)
    assert n_kept == 0
    assert relative_error(run(made, images(32, 5)), run(graph, images(32, 5))) < 0.12


def test_graph_is_the_same_when_it_is_made_again() -> None:
    graph, split = residual_network().graph(), ArraySplit({"x": images()})
    before = graph.to_bytes()
    settings = Settings(X86, equalize="weights", kept_share=0.3)
    first, _ = quantize_static(graph, split, settings)
    second, _ = quantize_static(graph, split, settings)
    assert first.to_bytes() == second.to_bytes()
    assert graph.to_bytes() == before


def test_dynamic_graph_stays_near_without_calibration() -> None:
    network = Network(("n", 16))
    network.add("MatMul", "x", random(16, 8))
    network.add("Add", network.last, random(8))
    network.add("Relu", network.last)
    network.add("Gemm", network.last, random(4, 8), random(4), transB=1)
    graph, x = network.graph(), random(32, 16)
    made = quantize_dynamic(graph, pairs_saturate=True, least_error=True)
    assert operators(made).count("MatMulInteger") == 2
    assert relative_error(run(made, x), run(graph, x)) < 0.05
    one = quantize_dynamic(graph, pairs_saturate=True, least_error=True, kept=("matmul0",))
    assert operators(one).count("MatMulInteger") == 1


# --- bias correction


def test_bias_correction_takes_the_mean_error_back() -> None:
    graph = residual_network("LeakyRelu").graph()
    x = images(64) + 1  # activations whose mean isn't zero
    split = ArraySplit({"x": x})

    def mean_errors(corrects: bool) -> np.ndarray:
        """Of the first layer's channels, whose input has a known mean."""
        network = Network(("n", 3, 8, 8))
        network.conv(random(8, 3, 3, 3), random(8))
        alone = network.graph()
        settings = Settings(X86, "minmax", corrects_biases=corrects)
        made, _ = quantize_static(alone, split, settings)
        return np.asarray((run(made, x) - run(alone, x)).mean(axis=(0, 2, 3)))

    assert np.abs(mean_errors(True)).mean() < 0.5 * np.abs(mean_errors(False)).mean()
    assert len(layers_of(graph)) == 4


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_bias_correction_finds_the_bias_of_a_matrix_product(operator: str) -> None:
    network = Network(("n", 16))
    if operator == "MatMul":
        network.add("MatMul", "x", random(16, 8))
        network.add("Add", network.last, random(8))
    else:
        network.add("Gemm", "x", random(16, 8))
    graph, x = network.graph(), random(64, 16) + 2
    observed = observe(graph, {"x": -1}, ArraySplit({"x": x}))
    before = run(graph, x)
    layers = lay_out(graph).layers
    correct_biases(graph, layers, observed, pairs_saturate=True, least_error=False)
    change = (run(graph, x) - before).mean(axis=0)
    restored = in_8_bits_weights(graph)
    np.testing.assert_allclose(change, -(x.mean(axis=0) @ restored), atol=1e-4)


def in_8_bits_weights(graph: Graph) -> np.ndarray:
    """The rounding error of a first layer's weights (16, 8)."""
    from optimizer.quantization.weights import quantize

    weights = graph.weight(graph.nodes[0].input[1])
    found = quantize(weights, 1, pairs_saturate=True, least_error=False)
    return np.asarray(found.restored() - weights)


# --- equalization and smoothing


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("cut", ["Relu", "Clip"])
def test_equalization_leaves_the_function_as_it_is(by: str, cut: str) -> None:
    graph, x = uneven_network(cut), images(64)
    before = run(graph, x)
    pairs = pairs_of(graph)
    assert [(pair.first, pair.second) for pair in pairs] == [("conv0", "conv2"), ("conv2", "conv4")]
    observed = observe(graph, {pair.tensor: 1 for pair in pairs}, ArraySplit({"x": x}))
    weights = graph.weight(graph.node("conv0").input[1]).copy()
    equalize(graph, pairs, observed, by)
    assert not np.allclose(graph.weight(graph.node("conv0").input[1]), weights)
    np.testing.assert_allclose(run(graph, x), before, rtol=1e-3, atol=1e-4)


def uneven_network(cut: str) -> Graph:
    """The residual network's block alone, with channels of very different ranges."""
    network = Network(("n", 3, 8, 8))
    uneven = np.logspace(-2, 0, 8).astype(np.float32)
    network.conv(random(8, 3, 3, 3) * uneven[:, None, None, None], random(8) * uneven)
    extra = (np.float32(0), np.float32(6)) if cut == "Clip" else ()
    network.add(cut, network.last, *extra)
    network.conv(random(8, 1, 3, 3) / uneven[:, None, None, None], random(8), group=8)
    network.add(cut, network.last, *extra)
    network.conv(random(4, 8, 1, 1), random(4))
    return network.graph()


def test_equalization_gives_both_layers_the_same_ranges() -> None:
    graph, split = uneven_network("Relu"), ArraySplit({"x": images()})
    pairs = pairs_of(graph)
    equalize(graph, pairs, observe(graph, {p.tensor: 1 for p in pairs}, split), "weights")
    first, second = (graph.weight(graph.node(name).input[1]) for name in ("conv0", "conv2"))
    ranges = [np.abs(weights).max(axis=(1, 2, 3)) for weights in (first, second)]
    np.testing.assert_allclose(ranges[0], ranges[1], rtol=0.05)


def test_equalization_helps_when_channels_are_uneven() -> None:
    graph, x = uneven_network("Relu"), images(64)

    def error(by: str) -> float:
        made, _ = quantize_static(graph, ArraySplit({"x": x}), Settings(X86, equalize=by))
        return relative_error(run(made, x), run(graph, x))

    assert error("activations") < 0.7 * error("none")


def test_equalization_leaves_a_tensor_alone_when_others_see_it() -> None:
    assert [pair.first for pair in pairs_of(residual_network().graph())] == ["conv2"]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("residual", [False, True], ids=["into the norm", "by a product"])
def test_smoothing_leaves_the_function_as_it_is(alpha: float, residual: bool) -> None:
    graph, x = outlying_encoder(residual), random(16, 5, 16)
    before = run(graph, x)
    tensors = smoothable(graph)
    assert len(tensors) == 2
    smooth(graph, observe(graph, dict.fromkeys(tensors, -1), ArraySplit({"x": x})), alpha)
    np.testing.assert_allclose(run(graph, x), before, rtol=1e-4, atol=1e-4)
    n_products = operators(graph).count("Mul")
    assert n_products == (2 if residual else 1)


def outlying_encoder(residual: bool) -> Graph:
    """Normalization with two channels a hundred times the others', and two matrix products."""
    gain = np.ones(16, np.float32)
    gain[[3, 11]] = 100
    network = Network(("n", 5, 16))
    start = network.add("LayerNormalization", "x", gain, np.zeros(16, np.float32), axis=-1)
    weights = random(16, 16)
    weights[[3, 11]] *= 0.01
    network.add("MatMul", start, weights)
    network.add("Relu", network.add("Add", network.last, random(16)))
    network.add("MatMul", network.last, random(16, 16))
    if residual:
        network.add("Add", network.last, start)
    return network.graph()


@pytest.mark.parametrize("format", ["static", "dynamic"])
def test_smoothing_helps_when_channels_are_outlying(format: str) -> None:  # noqa: A002
    graph, x = outlying_encoder(False), random(64, 5, 16)
    split = ArraySplit({"x": x})

    def error(alpha: float | None) -> float:
        prepared = prepare(graph, split, Settings(X86, "minmax", smoothing=alpha))
        if format == "static":
            made = prepared.quantized()
        else:
            made = quantize_dynamic(prepared.graph, pairs_saturate=True, least_error=True)
        return relative_error(run(made, x), run(graph, x))

    assert error(0.5) < 0.5 * error(None)
