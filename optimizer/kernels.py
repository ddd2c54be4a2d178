"""Proof of what ran: the kernels that an engine executed, by its own profile.

Operator names in a graph promise nothing: an engine may run a quantized graph in fp32. It judges
by the heavy operators, convolutions and matrix products, where the time and the promise lie.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optimizer.result import KernelShare
from serve.engines import EngineSpec, KernelTime, engine_module
from serve.tensor import Array

PROTOCOL_VERSION = 3
MIN_INT8_SHARE = 0.8
"""Of the heavy operators that the graph has quantized: so many must have run in int8 kernels,
else the variant isn't what it says. Fusing may hide one or the other."""
MIN_TOLD_SHARE = 0.8
"""Of the multiply-accumulates: so many must be known by the names of kernels to be judged by."""
N_RUNS = 5
"""That a profile is the mean of."""
_MAX_SHOWN = 12
_INTEGER = ("ConvInteger", "MatMulInteger")
"""Operators of ONNX that take 8-bit numbers as they are."""
PACKED = "MatMulNBits"
"""ONNX Runtime's product with weights alone in few bits."""
# Parts of the names that the engines give their heavy operators, in lower case.
_HEAVY = ("conv", "matmul", "gemm", "fullyconnected", "attention")


@dataclass(frozen=True)
class KernelProof:
    """What ran. The share is of the heavy operators' time, 0 to 1."""

    int8_time_share: float
    n_heavy: int
    n_int8: int
    """Heavy operators that ran in int8 kernels."""
    kernels: tuple[KernelShare, ...]
    precisions: Mapping[str, int] = field(default_factory=dict)
    """Heavy operators by the precision of the kernel that ran them."""
    mac_shares: Mapping[str, float] = field(default_factory=dict)
    """Precision → share of the graph's multiply-accumulates that kernels of it ran. Empty where
    the graph isn't ONNX; less than 1 together where names of kernels tell too little."""

    @property
    def is_told(self) -> bool:
        """Whether the kernels of most multiply-accumulates are known."""
        return sum(self.mac_shares.values()) >= MIN_TOLD_SHARE

    @property
    def int8_share(self) -> float:
        """Of the multiply-accumulates where those are told, else of the heavy operators' time."""
        return self.mac_shares.get("int8", 0.0) if self.is_told else self.int8_time_share

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "KernelProof":
        kernels = tuple(KernelShare(**kernel) for kernel in stored["kernels"])
        return cls(
            stored["int8_time_share"],
            stored["n_heavy"],
            stored["n_int8"],
            kernels,
            stored.get("precisions", {}),
            stored.get("mac_shares", {}),
        )


def prove(directory: Path, spec: EngineSpec, inputs: Mapping[str, Array]) -> KernelProof:
    """Profile a few runs on `inputs` and sum up the kernels."""
    return sum_up(engine_module(spec.name).profile(directory, spec, inputs, N_RUNS))


def sum_up(
    times: Sequence[KernelTime], mac_shares: Mapping[str, float] | None = None
) -> KernelProof:
    """The shares of executed kernels, longest first; `mac_shares` as `KernelProof` has them."""
    heavy = [time for time in times if is_heavy(time.operator)]
    int8 = [time for time in heavy if time.precision == "int8"]
    return KernelProof(
        int8_time_share=_share(_total(int8), _total(heavy)),
        n_heavy=len(heavy),
        n_int8=len(int8),
        kernels=_grouped(times),
        precisions=dict(Counter(time.precision for time in heavy)),
        mac_shares=dict(mac_shares or {}),
    )


def is_heavy(operator: str) -> bool:
    """Whether it is a convolution or matrix product, by the engine's name for it."""
    name = operator.lower()
    return not name.startswith("convert") and any(part in name for part in _HEAVY)


def n_quantized(path: Path) -> int:
    """Heavy operators of an ONNX graph that take integers, or inputs that are all dequantized from
    8 bits (biases apart): those that an engine should run in int8. With weights alone in few bits
    it may compute as it likes."""
    return len(quantized_nodes(path))


def quantized_nodes(path: Path) -> list[str]:
    """Their names, as `optimizer.macs` has them."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    dequantized = {
        output
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        for output in node.output
    }
    return [
        node.name or f"{node.op_type}_{index}"
        for index, node in enumerate(graph.node)
        if node.op_type in _INTEGER
        or (is_heavy(node.op_type) and dequantized.issuperset(node.input[:2]))
    ]


def precision_of(path: Path) -> str:
    """Of an ONNX graph as it is given: int4 or int8 where any of its heavy operators is."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    bits = {one.i for node in nodes if node.op_type == PACKED
            for one in node.attribute if one.name == "bits"}  # fmt: skip
    if bits & {2, 3, 4}:
        return "int4"
    return "int8" if bits or n_quantized(path) else "fp32"


def fallback_reason(
    proof: KernelProof, n_expected: int, mac_share_expected: float = 0.0
) -> str | None:
    """Why the engine didn't do what the graph says, or None. `mac_share_expected` is the share of
    multiply-accumulates in the operators that the graph has quantized."""
    if proof.n_int8 < MIN_INT8_SHARE * n_expected:
        return (
            f"{n_expected} convolutions and matrix products are quantized, but {proof.n_int8} ran "
            f"in int8 kernels, want at least {MIN_INT8_SHARE:.0%} of them: the engine fell back"
        )
    ran = proof.mac_shares.get("int8", 0.0)
    if proof.is_told and ran < MIN_INT8_SHARE * mac_share_expected:
        return (
            f"{mac_share_expected:.0%} of the multiply-accumulates are quantized, but {ran:.0%} "
            f"ran in int8 kernels, want at least {MIN_INT8_SHARE:.0%} of them: the engine fell back"
        )
    return None


def precision_reason(proof: KernelProof, declared: str) -> str | None:
    """Why the engine isn't of the precision that it declares, or None: one that says fp32 ran
    nothing lower, and one that says bf16 or fp16 ran some of it."""
    if declared == "fp32":
        lower = sorted({"bf16", "fp16", "int8"} & {p for p, n in proof.precisions.items() if n})
        if lower:
            n = proof.precisions[lower[0]]
            return f"it says fp32, but {n} convolutions and matrix products ran in {lower[0]}"
    if declared in ("bf16", "fp16") and proof.n_heavy and not proof.precisions.get(declared):
        ran = ", ".join(sorted(proof.precisions))
        return f"it says {declared}, but convolutions and matrix products ran in {ran}"
    return None


def _grouped(times: Sequence[KernelTime]) -> tuple[KernelShare, ...]:
    groups: dict[tuple[str, str, str], list[KernelTime]] = {}
    for time in times:
        groups.setdefault((time.kernel, time.operator, time.precision), []).append(time)
    total = _total(times)
    shares = [
        KernelShare(kernel, operator, precision, len(group), _share(_total(group), total))
        for (kernel, operator, precision), group in groups.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.time_share)[:_MAX_SHOWN])


def _total(times: Sequence[KernelTime]) -> float:
    return sum(time.duration_s for time in times)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
