"""Names of an exported graph's inputs and outputs, so that no inner tensor bears them.

Exporters name inner tensors after operators and layers; a graph whose output was named like one of
them holds a name twice, and engines refuse to load it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

_INNER = "_inner"


def placeholders(kind: str, n: int) -> list[str]:
    """Names to export with, which no exporter makes up."""
    return [f"trimserve::{kind}::{place}" for place in range(n)]


def name_tensors(model: "onnx.ModelProto", inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs, in the graph's order, these names, in place; inner tensors that
    bear one of them get another. Raises ValueError where their number is another."""
    graph = model.graph
    given = [value.name for value in [*graph.input, *graph.output]]
    wanted = [*inputs, *outputs]
    if len(given) != len(wanted):
        raise ValueError(f"the graph has {len(given)} inputs and outputs, want {len(wanted)}")
    taken = set(_names(graph))
    renamed = {}
    for name in wanted:
        if name in taken and name not in given:
            renamed[name] = _free(name, taken | {*wanted})
            taken.add(renamed[name])
    _rename(graph, {**renamed, **dict(zip(given, wanted, strict=True))})


def _free(name: str, taken: set[str]) -> str:
    free = name + _INNER
    while free in taken:
        free += _INNER
    return free


def _graphs(graph: "onnx.GraphProto") -> "Iterator[onnx.GraphProto]":
    """The graph and those in its nodes, which see its names."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                if inner.node or inner.output:
                    yield from _graphs(inner)


def _values(graph: "onnx.GraphProto") -> list[Any]:
    """What has a name of its own beside the nodes' tensors."""
    return [*graph.initializer, *graph.input, *graph.output, *graph.value_info]


def _names(graph: "onnx.GraphProto") -> Iterator[str]:
    for one in _graphs(graph):
        for node in one.node:
            yield from (*node.input, *node.output)
        yield from (value.name for value in _values(one))


def _rename(graph: "onnx.GraphProto", names: Mapping[str, str]) -> None:
    for one in _graphs(graph):
        for node in one.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for value in _values(one):
            value.name = names.get(value.name, value.name)
