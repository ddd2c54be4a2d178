"""Graph: an ONNX model in memory that can be edited, with who makes and who uses each tensor.

It knows nothing of quantization. Bodies of control flow stay as they are.
"""

import heapq
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Floats = NDArray[np.float32]


class Graph:
    """Owns its model. Every node has a name of its own."""

    def __init__(self, model: "onnx.ModelProto") -> None:
        self.model = model
        self._weights = {one.name: one for one in model.graph.initializer}
        self._names = _names(model.graph)
        seen: set[str] = set()
        for index, node in enumerate(model.graph.node):
            if not node.name or node.name in seen:
                node.name = f"{node.op_type}_node_{index}"
            seen.add(node.name)
        self._index()

    @property
    def nodes(self) -> "list[onnx.NodeProto]":
        """In an order in which they can be computed, as ONNX wants it."""
        return list(self.model.graph.node)

    @property
    def inputs(self) -> list[str]:
        return [one.name for one in self.model.graph.input if one.name not in self._weights]

    @property
    def outputs(self) -> list[str]:
        return [one.name for one in self.model.graph.output]

    def node(self, name: str) -> "onnx.NodeProto":
        return self._nodes[name]

    def maker(self, tensor: str) -> "onnx.NodeProto | None":
        """The node that gives the tensor; None for inputs and weights."""
        return self._makers.get(tensor)

    def users(self, tensor: str) -> "list[onnx.NodeProto]":
        """The nodes that take the tensor, each once."""
        return self._users.get(tensor, [])

    def sole_user(self, tensor: str) -> "onnx.NodeProto | None":
        """The one node that takes the tensor, where nothing else does, the caller included."""
        users = self.users(tensor)
        return users[0] if len(users) == 1 and tensor not in self.outputs else None

    def is_weight(self, tensor: str) -> bool:
        return tensor in self._weights

    def weight(self, tensor: str) -> NDArray[Any]:
        """The values of a stored tensor. Raises KeyError for any other."""
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self._weights[tensor]))

    def constant(self, node: "onnx.NodeProto", index: int) -> NDArray[Any] | None:
        """The stored value of the node's input at `index`; None where there is none."""
        name = node.input[index] if index < len(node.input) else ""
        return self.weight(name) if name in self._weights else None

    def set_weight(self, tensor: str, values: NDArray[Any]) -> None:
        from onnx import numpy_helper

        # Not ascontiguousarray, which makes a vector of a scalar: ONNX Runtime fuses no addition
        # whose scales are vectors.
        new = numpy_helper.from_array(np.asarray(values, order="C"), tensor)
        if tensor in self._weights:
            self._weights[tensor].CopyFrom(new)
        else:
            self.model.graph.initializer.append(new)
            self._weights[tensor] = self.model.graph.initializer[-1]
            self._names.add(tensor)

    def own_weight(self, node: "onnx.NodeProto", index: int, values: NDArray[Any]) -> str:
        """Give the node these values as its input at `index`, and no other node; the name."""
        old = node.input[index] if index < len(node.input) else ""
        if old and len(self.users(old)) == 1 and list(node.input).count(old) == 1:
            name = old
        else:
            name = self.fresh(old or f"{node.name}_input_{index}")
        self.set_weight(name, values)
        while len(node.input) <= index:
            node.input.append("")
        node.input[index] = name
        self._index()
        return name

    def fresh(self, name: str) -> str:
        """The name, or one like it, that no tensor has; taken from now on."""
        candidate, number = name, 0
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def replace_nodes(self, nodes: "Iterable[onnx.NodeProto]") -> None:
        """Take these as the nodes; they may be in any order in which every tensor has a maker."""
        ordered = _sorted(list(nodes))
        del self.model.graph.node[:]
        self.model.graph.node.extend(ordered)
        self._index()

    def drop_unused(self) -> None:
        """Remove weights that nobody takes, shapes that may no longer hold, and domains of
        operators that aren't there."""
        graph = self.model.graph
        used = {name for node in graph.node for name in _taken(node)} | set(self.outputs)
        kept = [one for one in graph.initializer if one.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        self._weights = {one.name: one for one in graph.initializer}
        del graph.value_info[:]
        domains = {node.domain for node in graph.node} | {""}
        imports = [one for one in self.model.opset_import if one.domain in domains]
        del self.model.opset_import[:]
        self.model.opset_import.extend(imports)

    def copy(self) -> "Graph":
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return Graph(model)

    def to_bytes(self) -> bytes:
        return bytes(self.model.SerializeToString(deterministic=True))

    def _index(self) -> None:
        self._nodes = {node.name: node for node in self.model.graph.node}
        self._makers = {out: node for node in self.model.graph.node for out in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in dict.fromkeys(_taken(node)):
                self._users.setdefault(name, []).append(node)


def folded(path: Path) -> Graph:
    """The model with constants computed and batch normalization inside of convolutions, by ONNX
    Runtime's basic optimizations, which leave only operators of ONNX."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "folded.onnx"
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = Graph(onnx.load(target))
    graph.drop_unused()
    return graph


def attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    """The node's attribute, as Python has it."""
    from onnx import helper

    found = next((one for one in node.attribute if one.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def renamed(node: "onnx.NodeProto", names: Mapping[str, str]) -> None:
    """Let the node take other tensors."""
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)


def _names(graph: "onnx.GraphProto") -> set[str]:
    names = {*_names_of(graph.input), *_names_of(graph.output), *_names_of(graph.initializer)}
    return names | {name for node in graph.node for name in (*node.input, *node.output)}


def _taken(node: "onnx.NodeProto") -> list[str]:
    """The tensors that a node takes, in the bodies of control flow too."""
    taken = [name for name in node.input if name]
    for one in node.attribute:
        graphs: list[onnx.GraphProto] = [*one.graphs]
        if one.HasField("g"):
            graphs.append(one.g)
        for body in graphs:
            taken += [name for inner in body.node for name in _taken(inner)]
            taken += _names_of(body.output)
    return taken


def _names_of(tensors: "Iterable[Any]") -> list[str]:
    return [one.name for one in tensors]


def _sorted(nodes: "list[onnx.NodeProto]") -> "list[onnx.NodeProto]":
    """Copies of the nodes, by what they take, otherwise as they come."""
    import onnx

    maker = {output: index for index, node in enumerate(nodes) for output in node.output}
    waits = [{maker[name] for name in _taken(node) if name in maker} for node in nodes]
    users: dict[int, list[int]] = {}
    for index, needed in enumerate(waits):
        for one in needed:
            users.setdefault(one, []).append(index)
    ready = [index for index, needed in enumerate(waits) if not needed]
    ordered: list[onnx.NodeProto] = []
    while ready:
        index = heapq.heappop(ready)
        copy = onnx.NodeProto()
        copy.CopyFrom(nodes[index])
        ordered.append(copy)
        for user in users.get(index, []):
            waits[user].discard(index)
            if not waits[user]:
                heapq.heappush(ready, user)
    if len(ordered) < len(nodes):
        stuck = next(node for node, needed in zip(nodes, waits, strict=True) if needed)
        raise ValueError(f"the graph has a cycle through {stuck.name!r}")
    return ordered
