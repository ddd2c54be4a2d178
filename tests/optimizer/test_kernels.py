"""What an engine ran, from profiles made up and real."""

import pytest

from optimizer.kernels import KernelProof, fallback_reason, is_heavy, sum_up
from serve.engines import KernelTime

PROFILE = (
    KernelTime("conv1", "Conv", "Conv (CPU)", "fp32", 3.0),
    KernelTime("conv2", "QLinearConv", "QLinearConv (CPU)", "int8", 1.0),
    KernelTime("conv3", "QLinearConv", "QLinearConv (CPU)", "int8", 4.0),
    KernelTime("relu", "Relu", "Relu (CPU)", "fp32", 2.0),
)


def test_shares_are_of_the_heavy_operators() -> None:
    proof = sum_up(PROFILE)
    assert proof.int8_time_share == 5 / 8
    assert (proof.n_heavy, proof.n_int8) == (3, 2)


def test_kernels_are_grouped_and_the_longest_come_first() -> None:
    kernels = sum_up(PROFILE).kernels
    assert [(kernel.kernel, kernel.n_nodes) for kernel in kernels] == [
        ("QLinearConv (CPU)", 2),
        ("Conv (CPU)", 1),
        ("Relu (CPU)", 1),
    ]
    assert sum(kernel.time_share for kernel in kernels) == pytest.approx(1.0)


def test_proof_of_an_empty_profile_claims_nothing() -> None:
    assert sum_up(()) == KernelProof(0.0, 0, 0, ())


def test_proof_survives_a_round_trip() -> None:
    proof = sum_up(PROFILE)
    assert KernelProof.from_dict(proof.to_dict()) == proof


@pytest.mark.parametrize(
    ("operator", "heavy"),
    [
        ("QLinearConv", True),
        ("Convolution", True),
        ("GroupConvolution", True),
        ("FullyConnectedQuantizedLegacy", True),
        ("QGemm", True),
        ("MatMul", True),
        ("Convert", False),
        ("Add", False),
    ],
)
def test_heavy_operators_are_known_by_each_engine_s_names(operator: str, heavy: bool) -> None:
    assert is_heavy(operator) is heavy


@pytest.mark.parametrize(
    ("n_int8", "n_expected", "fell_back"),
    [
        pytest.param(56, 56, False, id="all ran"),
        pytest.param(54, 56, False, id="two were fused away"),
        pytest.param(28, 56, True, id="half of them in fp32"),
        pytest.param(2, 2, False, id="few were meant to"),
        pytest.param(0, 1, True, id="none ran"),
        pytest.param(0, 0, False, id="none was meant to"),
    ],
)
def test_fallback_is_judged_by_what_the_graph_has_quantized(
    n_int8: int, n_expected: int, fell_back: bool
) -> None:
    reason = fallback_reason(KernelProof(1.0, 60, n_int8, ()), n_expected)
    assert (reason is not None) is fell_back
