"""What an engine ran, from profiles made up and real."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from optimizer.kernels import (
    KernelProof,
    fallback_reason,
    is_heavy,
    precision_reason,
    quantized_nodes,
    sum_up,
)
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
    assert sum_up(()) == KernelProof(0.0, 0, 0, (), {}, {})


def test_proof_survives_a_round_trip() -> None:
    proof = sum_up(PROFILE, {"int8": 0.5, "fp32": 0.25})
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


@pytest.mark.parametrize(
    ("mac_shares", "expected", "fell_back"),
    [
        pytest.param({"int8": 0.95, "fp32": 0.05}, 0.95, False, id="what is quantized ran in int8"),
        pytest.param({"int8": 0.3, "fp32": 0.7}, 0.95, True, id="the largest ran in fp32"),
        pytest.param({"int8": 0.3, "fp32": 0.7}, 0.3, False, id="little was meant to"),
        pytest.param({"int8": 0.3}, 0.95, False, id="names of kernels tell too little"),
        pytest.param({}, 0.95, False, id="the graph is not known"),
    ],
)
def test_fallback_is_judged_by_multiply_accumulates_when_they_are_told(
    mac_shares: dict[str, float], expected: float, fell_back: bool
) -> None:
    proof = KernelProof(1.0, 10, 10, (), {}, mac_shares)
    assert (fallback_reason(proof, 10, expected) is not None) is fell_back


@pytest.mark.parametrize(
    ("ran", "declared", "said"),
    [
        pytest.param({"fp32": 9}, "fp32", None, id="fp32 is fp32"),
        pytest.param({"fp32": 8, "bf16": 1}, "fp32", "1 convolutions", id="bf16 is called fp32"),
        pytest.param({"bf16": 8, "fp32": 1}, "bf16", None, id="bf16 is bf16"),
        pytest.param({"fp32": 9}, "bf16", "ran in fp32", id="bf16 ran in fp32"),
        pytest.param({"int8": 9, "fp32": 1}, "int8", None, id="int8 is judged by its graph"),
        pytest.param({}, "fp16", None, id="there is nothing heavy"),
    ],
)
def test_precision_is_what_the_kernels_ran_in(
    ran: dict[str, int], declared: str, said: str | None
) -> None:
    reason = precision_reason(KernelProof(0.0, sum(ran.values()), 0, (), ran), declared)
    assert (reason is None) if said is None else (said in (reason or ""))


def test_products_of_integers_are_quantized_whatever_comes_before(tmp_path: Path) -> None:
    tensor = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["whole"], name="whole"),
        helper.make_node("Cast", ["whole"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["real", "v"], ["y"], name="plain"),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [
            tensor("x", TensorProto.UINT8, ["n", 4]),
            tensor("w", TensorProto.INT8, [4, 4]),
            tensor("v", TensorProto.FLOAT, [4, 4]),
        ],
        [tensor("y", TensorProto.FLOAT, ["n", 4])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert quantized_nodes(tmp_path / "model.onnx") == ["whole"]
