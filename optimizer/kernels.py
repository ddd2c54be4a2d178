"""Proof of what ran: the kernels that an engine executed, by its own profile.

Operator names in a graph promise nothing: an engine may run a quantized graph in fp32. It judges
by the heavy operators, convolutions and matrix products, where the time and the promise lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimizer.result import KernelShare
from serve.engines import EngineSpec, KernelTime, engine_module
from serve.tensor import Array

PROTOCOL_VERSION = 1
MIN_INT8_SHARE = 0.8
"""Of the heavy operators that the graph has quantized: so many must have run in int8 kernels,
else the variant isn't what it says. Fusing may hide one or the other."""
N_RUNS = 5
"""That a profile is the mean of."""
_MAX_SHOWN = 12
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

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "KernelProof":
        kernels = tuple(KernelShare(**kernel) for kernel in stored["kernels"])
        return cls(stored["int8_time_share"], stored["n_heavy"], stored["n_int8"], kernels)


def prove(directory: Path, spec: EngineSpec, inputs: Mapping[str, Array]) -> KernelProof:
    """Profile a few runs on `inputs` and sum up the kernels."""
    return sum_up(engine_module(spec.name).profile(directory, spec, inputs, N_RUNS))


def sum_up(times: Sequence[KernelTime]) -> KernelProof:
    """The shares of executed kernels, longest first."""
    heavy = [time for time in times if is_heavy(time.operator)]
    int8 = [time for time in heavy if time.precision == "int8"]
    return KernelProof(
        int8_time_share=_share(_total(int8), _total(heavy)),
        n_heavy=len(heavy),
        n_int8=len(int8),
        kernels=_grouped(times),
    )


def is_heavy(operator: str) -> bool:
    """Whether it is a convolution or matrix product, by the engine's name for it."""
    name = operator.lower()
    return not name.startswith("convert") and any(part in name for part in _HEAVY)


def n_quantized(path: Path) -> int:
    """Heavy operators of an ONNX graph whose inputs are all dequantized from 8 bits (biases
    apart): those that an engine should run in int8."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    dequantized = {
        output
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        for output in node.output
    }
    return sum(
        is_heavy(node.op_type) and dequantized.issuperset(node.input[:2]) for node in graph.node
    )


def fallback_reason(proof: KernelProof, n_expected: int) -> str | None:
    """Why the engine didn't do what the graph says, or None."""
    if proof.n_int8 >= MIN_INT8_SHARE * n_expected:
        return None
    return (
        f"{n_expected} convolutions and matrix products are quantized, but {proof.n_int8} ran in "
        f"int8 kernels, want at least {MIN_INT8_SHARE:.0%} of them: the engine fell back"
    )


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
