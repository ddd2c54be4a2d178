"""Quantization: an fp32 ONNX model to static int8, after training.

QuantizeLinear and DequantizeLinear pairs around every operator that has 8-bit kernels (residual
additions and pooling too, so that activations stay in 8 bits between convolutions), weights per
output channel (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"). Ranges of activations come from calibration samples. The
arithmetic is onnxruntime.quantization's; which layout runs in 8-bit kernels is measured in
docs/experiments.md.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

import contextlib
import io
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Split
from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.variant import Kind, Model, OnnxModel, Stage, onnx_model
from serve.machine import Machine

if TYPE_CHECKING:
    import onnx

_FILE = "model.onnx"
_HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_MIN_OPSET = 13
"""The first whose QuantizeLinear has an axis, for weights per channel."""
_BATCH_SIZE = 32
"""Samples a calibration run computes at once; the ranges don't depend on it."""
_METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
# keep_fp32 -> how it is shown
_KEPT = {
    "none": "",
    "first": "first layer fp32",
    "last": "last layer fp32",
    "first_and_last": "first and last layer fp32",
}
_TYPES = {"uint8": "QUInt8", "int8": "QInt8"}
# Instructions that add four 8-bit products to 32 bits without saturating in between.
_DOT_PRODUCT_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


class Quantization:
    traits = Traits(
        name="quantization",
        version="1",
        stage=Stage.PRECISION,
        accepts=Kind.ONNX,
        gives=Kind.ONNX,
        needs=Needs.UNLABELLED,
        packages=("onnxruntime", "onnx", "numpy"),
    )

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, OnnxModel)
        if model.precision != "fp32":
            return f"the model is {model.precision} already"
        proto = _load(model)
        opset = next((one.version for one in proto.opset_import if not one.domain), 0)
        if opset < _MIN_OPSET:
            return f"weights per channel need ONNX opset {_MIN_OPSET}, the model has {opset}"
        if any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
            return "the model is quantized already"
        if not any(node.op_type in _HEAVY for node in proto.graph.node):
            return f"the model has no operator worth it ({', '.join(_HEAVY)})"
        return None

    def space(self, model: Model, context: Context) -> Space:
        activations, reduce_range = _kernel_layout(context.machine)
        return {
            "calibration": Categorical(("minmax", "entropy", "percentile")),
            "percentile": Categorical((99.99, 99.9, 99.999), when={"calibration": ("percentile",)}),
            "keep_fp32": Categorical(tuple(_KEPT)),
            "activations": Categorical((activations,)),
            "reduce_range": Categorical((reduce_range,)),
        }

    def describe(self, parameters: Parameters) -> str:
        how = str(parameters["calibration"])
        if "percentile" in parameters:
            how += f" {parameters['percentile']}"
        kept = _KEPT[str(parameters["keep_fp32"])]
        return f"int8 ({how}{', ' if kept else ''}{kept})"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> OnnxModel:
        assert isinstance(model, OnnxModel)
        options: dict[str, Any] = {}
        if "percentile" in parameters:
            options["CalibPercentile"] = parameters["percentile"]
        method = _METHODS[str(parameters["calibration"])]
        with tempfile.TemporaryDirectory() as scratch, _quiet():
            from onnxruntime import quantization
            from onnxruntime.quantization.shape_inference import quant_pre_process

            folded = Path(scratch) / "folded.onnx"
            # Folds batch normalization into convolutions and infers shapes: a tensor without
            # one isn't quantized. Symbolic inference needs sympy and adds nothing for CNNs.
            quant_pre_process(str(model.path), str(folded), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(folded),
                str(Path(scratch) / _FILE),
                _CalibrationReader(context.calibration),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType[_TYPES[str(parameters["activations"])]],
                reduce_range=bool(parameters["reduce_range"]),
                calibrate_method=quantization.CalibrationMethod[method],
                nodes_to_exclude=_kept(folded, str(parameters["keep_fp32"])),
                extra_options=options,
            )
            content = (Path(scratch) / _FILE).read_bytes()
        (directory / _FILE).write_bytes(content)
        return onnx_model(directory, _FILE, "int8")


def _kernel_layout(machine: Machine) -> tuple[str, bool]:
    """(type of activations, whether weights keep to 7 bits) for the fast and exact kernels.

    x86 multiplies unsigned by signed bytes; before VNNI the sum of two products saturates at 16
    bits (vpmaddubsw), which 7-bit weights avoid. ARM multiplies signed by signed.
    """
    if "x86_64" not in machine.system and "AMD64" not in machine.system:
        return "int8", False
    return "uint8", not _DOT_PRODUCT_FLAGS & set(machine.flags)


class _CalibrationReader:
    """Batches of a split, decoded as they are asked for: onnxruntime's protocol."""

    def __init__(self, split: Split) -> None:
        self._batches = _batches(split)

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        return next(self._batches, None)


def _batches(split: Split) -> Iterator[Mapping[str, NDArray[Any]]]:
    for start in range(0, len(split), _BATCH_SIZE):
        yield dict(split.read(np.arange(start, min(start + _BATCH_SIZE, len(split)))).inputs)


def _kept(path: Path, which: str) -> list[str]:
    """Names of the heavy nodes that stay in fp32, by the order of the graph."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    heavy = [node.name for node in graph.node if node.op_type in _HEAVY]
    chosen = {"none": [], "first": heavy[:1], "last": heavy[-1:]}
    chosen["first_and_last"] = [*chosen["first"], *chosen["last"]]
    return chosen[which]


def _load(model: OnnxModel) -> "onnx.ModelProto":
    import onnx

    return onnx.load(model.path, load_external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime.quantization does to the process: it prints, logs through the
    root logger, configures that on import, and puts a folder with modules of common names
    (`optimizer` among them) on sys.path."""
    root = logging.getLogger()
    disabled, level, handlers, path = root.disabled, root.level, [*root.handlers], [*sys.path]
    root.disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.disabled = disabled
        root.setLevel(level)
        root.handlers[:] = handlers
        sys.path[:] = path
