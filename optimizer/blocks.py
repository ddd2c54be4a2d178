"""Blocks: the convolutions and matrix products of a torch module, each as a model of its own.

A module is traced by one run with hooks on its leaves; what it computes between them isn't seen.
Equal shapes are one block, so that a table of few measured blocks covers many networks. It times
nothing and judges nothing.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.variant import EngineModel, canonical_json, engine_model
from serve.engines import EngineSpec
from serve.machine import Machine

if TYPE_CHECKING:
    import onnx
    import torch
    from numpy.typing import NDArray

    from optimizer.data.splits import Samples
    from optimizer.data.table import Labels

PROTOCOL_VERSION = 3
_OPSET = 17
_FILE = "model.onnx"
_INT8 = "int8"
_N_CALIBRATED = 32
"""Random inputs that an int8 block's ranges are taken from: they make no difference to its time."""


@dataclass(frozen=True)
class Block:
    """`conv`: input [channels, *spatial] (1 or 2 axes of space); `linear`: input [*leading,
    features]. Shapes are without the batch."""

    kind: str
    input_shape: tuple[int, ...]
    n_outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    """Before each axis of space, then after each: `same` isn't symmetric for even kernels."""
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True
    precision: str = "fp32"
    """Or `int8`: weights and activations in 8 bits, quantized statically."""

    @property
    def key(self) -> str:
        """SHA-256 (hex) of all of it: the id under which its times are kept."""
        return hashlib.sha256(f"block {canonical_json(asdict(self))}".encode()).hexdigest()


def blocks_of(module: "torch.nn.Module", example: Sequence["torch.Tensor"]) -> Counter[Block]:
    """How often each block occurs in a run of the module on `example` (batch first).

    The module is run in eval mode without gradients and left as it was, the mode of each part
    included.
    """
    return Counter(block for _, block in _met(module, example))


def named_blocks(module: "torch.nn.Module", example: Sequence["torch.Tensor"]) -> dict[str, Block]:
    """Layer's name → its block, as `blocks_of` finds them; without layers that a run meets with
    different shapes."""
    found: dict[str, set[Block]] = defaultdict(set)
    for name, block in _met(module, example):
        found[name].add(block)
    return {name: next(iter(blocks)) for name, blocks in found.items() if len(blocks) == 1}


def _met(module: "torch.nn.Module", example: Sequence["torch.Tensor"]) -> list[tuple[str, Block]]:
    """Layers' names with their blocks, in the order in which the run comes by them."""
    import torch
    from torch import nn

    found: list[tuple[str, Block]] = []
    names = {leaf: name for name, leaf in module.named_modules()}

    def note(leaf: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            block = _block(leaf, tuple(inputs[0].shape[1:]))
            if block is not None:
                found.append((names[leaf], block))

    hooks = [
        leaf.register_forward_hook(note) for leaf in module.modules() if not list(leaf.children())
    ]
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        with torch.inference_mode():
            module(*example)
    finally:
        for part in training:
            part.training = True
        for hook in hooks:
            hook.remove()
    return found


def write_block(block: Block, engine: str, directory: Path, machine: Machine) -> EngineModel:
    """Write the block with random weights and a ReLU behind it to `directory`, as what
    `engine` runs.

    An int8 block is laid out for the kernels of `machine`. It takes and gives fp32 like any other,
    so both conversions are in its time. Raises ValueError for another precision.
    """
    if block.precision not in ("fp32", _INT8):
        raise ValueError(f"precision: got {block.precision}, want fp32 or int8")
    proto = _model(block)
    written = proto.SerializeToString(deterministic=True)
    if block.precision == _INT8:
        written = _quantized(block, proto, machine)
    (directory / _FILE).write_bytes(written)
    return engine_model(directory, EngineSpec(engine, _FILE, block.precision))


def block_inputs(block: Block, n_rows: int, seed: int) -> Mapping[str, Any]:
    """Random inputs for it, [n_rows, *input_shape] float32."""
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((n_rows, *block.input_shape)).astype(np.float32)}


def _block(leaf: "torch.nn.Module", shape: tuple[int, ...]) -> Block | None:
    from torch import nn

    if isinstance(leaf, nn.Conv1d | nn.Conv2d):
        return Block(
            "conv", shape, leaf.out_channels, leaf.kernel_size, leaf.stride, _padding(leaf),
            leaf.dilation, leaf.groups, leaf.bias is not None,
        )  # fmt: skip
    if isinstance(leaf, nn.Linear):
        return Block("linear", shape, leaf.out_features, bias=leaf.bias is not None)
    return None


def _padding(leaf: "torch.nn.Conv1d | torch.nn.Conv2d") -> tuple[int, ...]:
    if leaf.padding == "valid":
        return (0,) * (2 * len(leaf.kernel_size))
    if leaf.padding == "same":
        spans = zip(leaf.dilation, leaf.kernel_size, strict=True)
        totals = [dilation * (size - 1) for dilation, size in spans]
        # As torch does it: what is odd is added after.
        return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
    padding = tuple(int(size) for size in leaf.padding)
    return padding + padding


def _model(block: Block) -> "onnx.ModelProto":
    from onnx import TensorProto, helper

    weights, node = _conv(block) if block.kind == "conv" else _linear(block)
    graph = helper.make_graph(
        [*node, helper.make_node("Relu", ["y"], ["z"])],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *block.input_shape])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)


@dataclass(frozen=True, eq=False)
class _RandomSplit:
    """A block's random inputs as calibration samples."""

    block: Block
    name: str = "calibration"
    digest: str = ""
    labels: "Labels | None" = None

    def __len__(self) -> int:
        return _N_CALIBRATED

    def read(self, indices: "Sequence[int] | NDArray[np.integer] | None" = None) -> "Samples":
        from optimizer.data.splits import Samples

        inputs = block_inputs(self.block, len(self), seed=0)
        chosen = slice(None) if indices is None else np.asarray(indices, dtype=np.intp)
        return Samples({name: values[chosen] for name, values in inputs.items()}, None, "")


def _quantized(block: Block, proto: "onnx.ModelProto", machine: Machine) -> bytes:
    """The graph in 8 bits, as static quantization makes it."""
    from optimizer.quantization.graph import Graph
    from optimizer.quantization.processor import kernel_layout
    from optimizer.quantization.qdq import Arithmetic
    from optimizer.quantization.static import Settings, quantize_static

    activations, pairs_saturate = kernel_layout(machine)
    arithmetic = Arithmetic(activations == _INT8, pairs_saturate, least_error=False)
    settings = Settings(arithmetic, method="minmax")
    made, _ = quantize_static(Graph(proto), _RandomSplit(block), settings)
    return made.to_bytes()


def _conv(block: Block) -> tuple[list["onnx.TensorProto"], list["onnx.NodeProto"]]:
    from onnx import helper

    channels = block.input_shape[0]
    weights = [_random("w", (block.n_outputs, channels // block.groups, *block.kernel))]
    weights += [_random("b", (block.n_outputs,))] if block.bias else []
    node = helper.make_node(
        "Conv",
        ["x", *(weight.name for weight in weights)],
        ["y"],
        strides=list(block.stride),
        pads=list(block.padding),
        dilations=list(block.dilation),
        group=block.groups,
    )
    return weights, [node]


def _linear(block: Block) -> tuple[list["onnx.TensorProto"], list["onnx.NodeProto"]]:
    from onnx import helper

    weights = [_random("w", (block.input_shape[-1], block.n_outputs))]
    if not block.bias:
        return weights, [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights.append(_random("b", (block.n_outputs,)))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    return weights, nodes


def _random(name: str, shape: tuple[int, ...]) -> "onnx.TensorProto":
    from onnx import numpy_helper

    rng = np.random.default_rng(0)
    return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
