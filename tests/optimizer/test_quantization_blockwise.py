"""Weights in 4 bits against arithmetic written down plainly, and in ONNX Runtime's kernel."""

import numpy as np
import pytest

from optimizer.quantization.blockwise import (
    BLOCK,
    blockwise_layers,
    quantize_blockwise,
    to_blocks,
)
from tests.optimizer.onnx_networks import Network, random, run


@pytest.mark.parametrize("n_inputs", [32, 70])
def test_blocks_stand_for_the_nearest_of_16_levels(n_inputs: int) -> None:
    weights = random(n_inputs, 5)
    blocks = to_blocks(weights)
    restored = blocks.restored(n_inputs)
    for output in range(5):
        for index in range(n_inputs):
            scale = float(blocks.scales[output, index // BLOCK])
            level = min(max(round(float(weights[index, output]) / scale), -8), 7)
            assert restored[index, output] == pytest.approx(level * scale, abs=1e-6)


def test_blocks_lose_less_than_a_scale_that_clips_nothing() -> None:
    weights = random(256, 16)
    rows = weights.T.reshape(16, -1, BLOCK)
    scales = np.abs(rows).max(axis=-1, keepdims=True) / 7
    plain = ((np.round(rows / scales) * scales - rows) ** 2).sum()
    assert ((to_blocks(weights).restored(256) - weights) ** 2).sum() < 0.9 * plain


def test_blocks_of_zero_stay_zero() -> None:
    assert not to_blocks(np.zeros((40, 3), np.float32)).restored(40).any()


def test_blocks_are_refused_when_weights_are_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_blocks(np.full((32, 2), np.inf, np.float32))


def test_large_products_compute_with_4_bit_weights_and_small_ones_as_they_did() -> None:
    network = Network(("n", 256))
    network.add("MatMul", "x", random(256, 256, scale=0.1))
    network.add("Relu", network.last)
    network.add("Gemm", network.last, random(300, 256, seed=1, scale=0.1), random(300), transB=1)
    network.add("MatMul", network.last, random(300, 8, seed=2, scale=0.1))
    graph, x = network.graph(), random(16, 256, seed=3)
    assert blockwise_layers(graph) == ("matmul0", "gemm2")
    made = quantize_blockwise(graph)
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
        restored = to_blocks(weights).restored(256)
        plain.own_weight(node, 1, restored.T if name == "gemm2" else restored)
    wanted = run(plain, x)
    np.testing.assert_allclose(run(made, x), wanted, atol=0.03 * np.abs(wanted).max())
    assert len(made.to_bytes()) < 0.25 * len(graph.to_bytes())
