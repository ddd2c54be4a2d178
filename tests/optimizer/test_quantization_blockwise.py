"""Weights in 4 and 8 bits against arithmetic written down plainly, and in ONNX Runtime's kernel."""

import numpy as np
import pytest

from optimizer.quantization.blockwise import (
    BITS,
    BLOCK,
    blockwise_layers,
    quantize_blockwise,
    to_blocks,
)
from tests.optimizer.onnx_networks import Network, random, run


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n_inputs", [32, 70])
def test_blocks_stand_for_the_nearest_level(n_inputs: int, bits: int) -> None:
    weights = random(n_inputs, 5)
    blocks = to_blocks(weights, bits)
    assert blocks.packed.shape == (5, -(-n_inputs // BLOCK), BLOCK * bits // 8)
    restored, lowest = blocks.restored(n_inputs), -(2 ** (bits - 1))
    for output in range(5):
        for index in range(n_inputs):
            scale = float(blocks.scales[output, index // BLOCK])
            level = min(max(round(float(weights[index, output]) / scale), lowest), -lowest - 1)
            assert restored[index, output] == pytest.approx(level * scale, abs=1e-6)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.9), (8, 1.0)])
def test_blocks_lose_less_than_a_scale_that_clips_nothing(bits: int, share: float) -> None:
    weights = random(256, 16)
    rows = weights.T.reshape(16, -1, BLOCK)
    scales = np.abs(rows).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    plain = ((np.round(rows / scales) * scales - rows) ** 2).sum()
    assert ((to_blocks(weights, bits).restored(256) - weights) ** 2).sum() < share * plain


@pytest.mark.parametrize("bits", BITS)
def test_blocks_of_zero_stay_zero(bits: int) -> None:
    assert not to_blocks(np.zeros((40, 3), np.float32), bits).restored(40).any()


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        pytest.param(np.inf, 8, "NaN or infinite", id="a weight is infinite"),
        pytest.param(1.0, 3, "got 3 bits, want 4 or 8", id="the kernels know other bits"),
    ],
)
def test_blocks_are_refused_when(weight: float, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_blocks(np.full((32, 2), weight, np.float32), bits)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", BITS)
def test_kernel_is_arithmetic_in_8_bits_when_every_product_is_the_largest(
    bits: int, sign: int
) -> None:
    """Sums of pairs don't saturate on any processor, and activations are rounded by blocks."""
    x = random(3, 256, seed=1)
    x[0], x[1] = 1.0, -1.0
    weights = random(256, 300)
    weights[:, 0], weights[:, 1] = sign, -sign
    network = Network(("n", 256))
    network.add("MatMul", "x", weights)
    rows = x.reshape(3, -1, BLOCK)
    scales = np.abs(rows).max(axis=-1, keepdims=True) / 127
    rounded = (np.round(rows / scales) * scales).reshape(3, -1)
    wanted = rounded @ to_blocks(weights, bits).restored(256)
    given = run(quantize_blockwise(network.graph(), bits), x)
    np.testing.assert_allclose(given, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("bits", "share"), [(4, 0.25), (8, 0.35)])
def test_large_products_compute_with_packed_weights_and_small_ones_as_they_did(
    bits: int, share: float
) -> None:
    network = Network(("n", 256))
    network.add("MatMul", "x", random(256, 256, scale=0.1))
    network.add("Relu", network.last)
    network.add("Gemm", network.last, random(300, 256, seed=1, scale=0.1), random(300), transB=1)
    network.add("MatMul", network.last, random(300, 8, seed=2, scale=0.1))
    graph, x = network.graph(), random(16, 256, seed=3)
    assert blockwise_layers(graph) == ("matmul0", "gemm2")
    made = quantize_blockwise(graph, bits)
    operators = [node.op_type for node in made.nodes]
    assert operators.count("MatMulNBits") == 2
    assert operators.count("MatMul") == 1
    # What it computes is the network with the weights that the blocks stand for.
    plain = graph.copy()
    for name in ("matmul0", "gemm2"):
        node = plain.node(name)
        weights = plain.weight(node.input[1])
        if name == "gemm2":
            weights = weights.T
        restored = to_blocks(weights, bits).restored(256)
        plain.own_weight(node, 1, restored.T if name == "gemm2" else restored)
    wanted = run(plain, x)
    np.testing.assert_allclose(run(made, x), wanted, atol=0.03 * np.abs(wanted).max())
    assert len(made.to_bytes()) < share * len(graph.to_bytes())
