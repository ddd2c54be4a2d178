"""The fusion report: which operators of a graph ended in which kernel, with the time of each.

Before is the same graph in ONNX Runtime without any optimization, an operator a kernel; after is
what the engine ran. It reads the graph, not its weights. Which operators were fused it tells by
what the engine says, and by the names that kernels bear: an operator without a kernel of its own
is part of the one before it, or else of the one behind it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.kernels import is_heavy
from optimizer.result import Fusion
from serve.engines import KernelTime

PROTOCOL_VERSION = 1
# What engines append to the names of nodes and tensors.
_SUFFIX = re.compile(
    r"(_token_\d+|_nchwc|_quant|_matmul|/WithoutBiases.*|/DequantizationMultiply.*|/fq_\w+)+$"
)
_MAX_STEPS = 64
"""Operators that one without a kernel may be away from one that has one."""
_PLUMBING = ("QuantizeLinear", "DequantizeLinear")
_CONSTANT = "Constant"


@dataclass
class _Ran:
    """A kernel, and the nodes that it computes."""

    kernel: KernelTime
    nodes: list[int] = field(default_factory=list)


def fusions_of(
    path: Path, base_kernels: Sequence[KernelTime], kernels: Sequence[KernelTime]
) -> tuple[Fusion, ...]:
    """Kernels of one kind that compute the same operators together, the longest first.

    `path` is the graph that was compiled; `base_kernels` ran it unoptimized, `kernels` in the
    engine. Operators that are gone without a kernel (folded, or of no name that tells) have a row
    without a kernel, where they took time before.
    """
    graph = _Graph(path)
    before = _seconds(graph, base_kernels)
    ran = _attributed(graph, kernels)
    done = {node for one in ran for node in one.nodes}
    rows = [_row(graph, one.nodes, before, one.kernel) for one in ran] + [
        _row(graph, [node], before, None) for node in before if node not in done
    ]
    return tuple(sorted(_grouped(rows), key=lambda row: (-row.seconds, -row.base_s)))


def from_stored(stored: Sequence[Mapping[str, Any]]) -> tuple[Fusion, ...]:
    """Rows as JSON holds them."""
    return tuple(Fusion(**{**one, "operators": tuple(one["operators"])}) for one in stored)


class _Graph:
    """The nodes by what kernels may be named after."""

    def __init__(self, path: Path) -> None:
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        self.nodes = [node for node in graph.node if node.op_type != _CONSTANT]
        self.by_name: dict[str, int] = {}
        self._makers: dict[str, int] = {}
        self._users: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for output in node.output:
                self.by_name.setdefault(output, index)
                self._makers[output] = index
            for tensor in node.input:
                self._users.setdefault(tensor, []).append(index)
        # A node's own name goes before that of a tensor.
        self.by_name |= {node.name: index for index, node in enumerate(self.nodes) if node.name}

    def find(self, name: str) -> int | None:
        """The node that a kernel's name is made of, or its output's."""
        for one in (name, _SUFFIX.sub("", name)):
            if one in self.by_name:
                return self.by_name[one]
        return None

    def before(self, index: int) -> Iterator[int]:
        """Nodes on the way back along the first input that another node makes."""
        for _ in range(_MAX_STEPS):
            made = (self._makers[one] for one in self.nodes[index].input if one in self._makers)
            found = next(made, None)
            if found is None:
                return
            index = found
            yield index

    def behind(self, index: int) -> Iterator[int]:
        """Nodes on the way on, as long as there is one user only."""
        for _ in range(_MAX_STEPS):
            users = self._users.get(self.nodes[index].output[0], [])
            if len(users) != 1:
                return
            index = users[0]
            yield index


def _seconds(graph: _Graph, kernels: Sequence[KernelTime]) -> dict[int, float]:
    """Of each node, unoptimized."""
    seconds: dict[int, float] = {}
    for kernel in kernels:
        node = graph.find(kernel.node)
        if node is not None:
            seconds[node] = seconds.get(node, 0.0) + kernel.duration_s
    return seconds


def _attributed(graph: _Graph, kernels: Sequence[KernelTime]) -> list[_Ran]:
    ran = [_Ran(kernel) for kernel in kernels]
    owners: dict[int, _Ran] = {}
    for one in sorted(ran, key=lambda one: not is_heavy(one.kernel.operator)):
        for node in map(graph.find, (one.kernel.node, *one.kernel.sources)):
            if node is not None and node not in owners:
                owners[node] = one
                one.nodes.append(node)
    for node in range(len(graph.nodes)):
        if node not in owners:
            owner = _owner(graph, node, owners)
            if owner is not None:
                owner.nodes.append(node)
    return ran


def _owner(graph: _Graph, node: int, owners: Mapping[int, _Ran]) -> _Ran | None:
    """The kernel that a node without one is part of: a convolution or product before it takes in
    what follows, one behind it what prepares its inputs."""
    back = next((owners[one] for one in graph.before(node) if one in owners), None)
    on = next((owners[one] for one in graph.behind(node) if one in owners), None)
    is_input = graph.nodes[node].op_type in _PLUMBING
    first, second = (on, back) if is_input else (back, on)
    return first or second


def _row(
    graph: _Graph, nodes: Sequence[int], before: Mapping[int, float], kernel: KernelTime | None
) -> Fusion:
    kinds = [graph.nodes[node].op_type for node in sorted(nodes)]
    kinds = [kind for kind in kinds if kind not in _PLUMBING] or kinds
    return Fusion(
        operators=tuple(dict.fromkeys(kinds)),
        kernel=kernel.kernel if kernel else "",
        precision=kernel.precision if kernel else "",
        n=1,
        base_s=sum(before.get(node, 0.0) for node in nodes),
        seconds=kernel.duration_s if kernel else 0.0,
    )


def _grouped(rows: Sequence[Fusion]) -> Iterator[Fusion]:
    groups: dict[tuple[object, ...], list[Fusion]] = {}
    for row in rows:
        groups.setdefault((row.operators, row.kernel, row.precision), []).append(row)
    for same in groups.values():
        first = same[0]
        yield Fusion(
            operators=first.operators,
            kernel=first.kernel,
            precision=first.precision,
            n=len(same),
            base_s=sum(row.base_s for row in same),
            seconds=sum(row.seconds for row in same),
        )
