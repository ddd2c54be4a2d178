"""A table of operators, each as an ONNX graph and as torch computes it.

Inputs are FP32[n, 4, 6, 6]; weights come from one seed, the same for both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

SHAPE = (4, 6, 6)
Weights = Mapping[str, np.ndarray]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Operator:
    """`nodes` lead from "x" over the weights' names to "y"."""

    nodes: tuple[onnx.NodeProto, ...]
    compute: Callable[[torch.Tensor, Tensors], torch.Tensor]
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        return {
            name: random.normal(size=shape).astype(np.float32) / 2
            for name, shape in self.weights.items()
        }

    def save(self, path: Path) -> Path:
        """With a variable batch."""
        stored = {**self.values(), **{n: np.asarray(v) for n, v in self.constants.items()}}
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            list(self.nodes),
            "operator",
            [value("x", TensorProto.FLOAT, ["batch", *SHAPE])],
            [value("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in stored.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(onnx.shape_inference.infer_shapes(made), path)
        return path

    def module(self) -> torch.nn.Module:
        compute, values = self.compute, self.values()

        class Module(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, array in values.items():
                    self.register_buffer(name, torch.from_numpy(array))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return compute(x, {name: getattr(self, name) for name in values})

        return Module().eval()


def one(kind: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, ["x", *inputs], ["y"], **attributes)


def _batch_norm(x: torch.Tensor, w: Tensors) -> torch.Tensor:
    return F.batch_norm(x, w["mean"], w["one"].square(), w["two"], w["three"])


OPERATORS: dict[str, Operator] = {
    "convolution": Operator(
        (one("Conv", "w", "b", pads=[1, 1, 1, 1]),),
        lambda x, w: F.conv2d(x, w["w"], w["b"], padding=1),
        {"w": (8, 4, 3, 3), "b": (8,)},
    ),
    "convolution with a stride and dilation": Operator(
        (one("Conv", "w", strides=[2, 2], dilations=[2, 2]),),
        lambda x, w: F.conv2d(x, w["w"], stride=2, dilation=2),
        {"w": (3, 4, 3, 3)},
    ),
    "depthwise convolution": Operator(
        (one("Conv", "w", pads=[1, 1, 1, 1], group=4),),
        lambda x, w: F.conv2d(x, w["w"], padding=1, groups=4),
        {"w": (4, 1, 3, 3)},
    ),
    "convolution, sum and activation": Operator(
        (
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["c", "x"], ["s"]),
            helper.make_node("Relu", ["s"], ["y"]),
        ),
        lambda x, w: F.relu(F.conv2d(x, w["w"], padding=1) + x),
        {"w": (4, 4, 3, 3)},
    ),
    "transposed convolution": Operator(
        (one("ConvTranspose", "w", strides=[2, 2]),),
        lambda x, w: F.conv_transpose2d(x, w["w"], stride=2),
        {"w": (4, 3, 2, 2)},
    ),
    "batch normalization": Operator(
        (
            helper.make_node("Mul", ["one", "one"], ["variance"]),
            one("BatchNormalization", "two", "three", "mean", "variance"),
        ),
        _batch_norm,
        {"one": (4,), "two": (4,), "three": (4,), "mean": (4,)},
    ),
    "layer normalization": Operator(
        (one("LayerNormalization", "w", "b"),),
        lambda x, w: F.layer_norm(x, (6,), w["w"], w["b"]),
        {"w": (6,), "b": (6,)},
    ),
    "matrix product": Operator(
        (one("MatMul", "w"),), lambda x, w: x @ w["w"], {"w": (6, 5)}
    ),
    "linear layer": Operator(
        (helper.make_node("Flatten", ["x"], ["f"]),
         helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1)),
        lambda x, w: F.linear(x.flatten(1), w["w"], w["b"]),
        {"w": (5, 144), "b": (5,)},
    ),
    "attention": Operator(
        (helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
         helper.make_node("MatMul", ["x", "t"], ["p"]),
         helper.make_node("Softmax", ["p"], ["s"], axis=-1),
         helper.make_node("MatMul", ["s", "x"], ["y"])),
        lambda x, w: (x @ x.transpose(2, 3)).softmax(-1) @ x,
    ),
    "rectifier": Operator((one("Relu"),), lambda x, w: F.relu(x)),
    "leaky rectifier": Operator(
        (one("LeakyRelu", alpha=0.1),), lambda x, w: F.leaky_relu(x, 0.1)
    ),
    "clipping": Operator(
        (one("Clip", "low", "high"),),
        lambda x, w: x.clamp(0, 1),
        constants={"low": np.float32(0), "high": np.float32(1)},
    ),
    "sigmoid": Operator((one("Sigmoid"),), lambda x, w: x.sigmoid()),
    "tanh": Operator((one("Tanh"),), lambda x, w: x.tanh()),
    "gelu": Operator((one("Gelu"),), lambda x, w: F.gelu(x)),
    "hard swish": Operator((one("HardSwish"),), lambda x, w: F.hardswish(x)),
    "error function": Operator((one("Erf"),), lambda x, w: x.erf()),
    "softmax": Operator((one("Softmax", axis=1),), lambda x, w: x.softmax(1)),
    "maximum pooling": Operator(
        (one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),),
        lambda x, w: F.max_pool2d(x, 3, 2, 1),
    ),
    "average pooling": Operator(
        (one("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),),
        lambda x, w: F.avg_pool2d(x, 2),
    ),
    "global average pooling": Operator(
        (one("GlobalAveragePool"),), lambda x, w: x.mean((2, 3), keepdim=True)
    ),
    "mean over an axis": Operator(
        (one("ReduceMean", "axes", keepdims=0),),
        lambda x, w: x.mean(2),
        constants={"axes": np.array([2])},
    ),
    "concatenation": Operator(
        (helper.make_node("Concat", ["x", "x"], ["y"], axis=1),),
        lambda x, w: torch.cat([x, x], 1),
    ),
    "padding": Operator(
        (one("Pad", "pads"),),
        lambda x, w: F.pad(x, (1, 2, 0, 1)),
        constants={"pads": np.array([0, 0, 0, 1, 0, 0, 1, 2])},
    ),
    "slicing": Operator(
        (one("Slice", "from", "to", "axes", "steps"),),
        lambda x, w: x[:, :, 1:6:2],
        constants={"from": np.array([1]), "to": np.array([6]), "axes": np.array([2]),
                   "steps": np.array([2])},
    ),
    "gathering": Operator(
        (one("Gather", "places", axis=1),),
        lambda x, w: x[:, [2, 0, 2]],
        constants={"places": np.array([2, 0, 2])},
    ),
    "transposition": Operator(
        (one("Transpose", perm=[0, 2, 3, 1]),), lambda x, w: x.permute(0, 2, 3, 1)
    ),
    "nearest upsampling": Operator(
        (helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest",
                          coordinate_transformation_mode="asymmetric", nearest_mode="floor"),),
        lambda x, w: F.interpolate(x, scale_factor=2, mode="nearest"),
        constants={"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "bilinear upsampling": Operator(
        (helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear",
                          coordinate_transformation_mode="half_pixel"),),
        lambda x, w: F.interpolate(x, scale_factor=2, mode="bilinear"),
        constants={"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "squeeze and excitation": Operator(
        (helper.make_node("GlobalAveragePool", ["x"], ["p"]),
         helper.make_node("Conv", ["p", "w"], ["c"]),
         helper.make_node("Sigmoid", ["c"], ["g"]),
         helper.make_node("Mul", ["x", "g"], ["y"])),
        lambda x, w: x * F.conv2d(x.mean((2, 3), keepdim=True), w["w"]).sigmoid(),
        {"w": (4, 4, 1, 1)},
    ),
}  # fmt: skip
