"""Quantization: an fp32 ONNX model to int8 or fp16, after training.

Statically, with ranges of activations from calibration samples; for matrix products also with
ranges found in each call, or with 8- or 4-bit weights alone where they are many. In fp16 where a
target computes in it, but for operators whose values it can't hold. The arithmetic
is that of `optimizer.quantization`; which layout runs in 8-bit kernels is measured in
docs/experiments.md.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.data.generated import GeneratedSplit
from optimizer.quantization.blockwise import blockwise_layers, quantize_blockwise
from optimizer.quantization.dynamic import dynamic_layers, quantize_dynamic
from optimizer.quantization.equalization import pairs_of
from optimizer.quantization.graph import Graph, folded
from optimizer.quantization.half import kept_in_fp32, to_half
from optimizer.quantization.layout import layers_of
from optimizer.quantization.processor import kernel_layout
from optimizer.quantization.qdq import Arithmetic
from optimizer.quantization.smoothing import smoothable
from optimizer.quantization.static import Settings, quantize_static
from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Distribution, Parameters, Space, Value
from optimizer.targets.onnxruntime import why_no_half
from optimizer.techniques import Context
from optimizer.variant import Kind, Model, OnnxModel, Stage, onnx_model

if TYPE_CHECKING:
    import onnx

_INPUTS = "inputs"
"""Says in recipe and label that the calibration samples aren't data; no choice."""
_FILE = "model.onnx"
_FLOAT16 = 10
"""ONNX's number of the type."""
_HEAVY = ("Conv", "MatMul", "Gemm")
_MIN_OPSET = 13
"""The first whose QuantizeLinear has an axis, for weights per channel."""
_WEIGHTS: Mapping[str, int] = {"int8_weights": 8, "int4_weights": 4}
"""Formats of weights alone, and their bits."""
_HALF = "fp16"
_STATIC: Mapping[str, tuple[Value, ...]] = {"format": ("static",)}
_METHODS = ("mse", "minmax", "entropy", "percentile")
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
_ALPHAS = (0.75, 0.5, 0.9)


class Quantization:
    traits = Traits(
        name="quantization",
        version="5",
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
        if any(one.data_type == _FLOAT16 for one in proto.graph.initializer):
            return "the model has weights in fp16 already"
        if not layers_of(_folded(model)):
            return f"none of the operators worth it ({', '.join(_HEAVY)}) has stored weights"
        if not len(context.calibration):
            return "there are no calibration samples"
        return None

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, OnnxModel)
        graph = _folded(model)
        activations, reduce_range = kernel_layout(context.machine)
        formats = _formats(graph)
        in_int8 = {"format": formats}
        if why_no_half(context) is None:
            formats = (*formats, _HALF)
        space: dict[str, Distribution] = {
            "format": Categorical(formats, is_baseline=True),
            "calibration": Categorical(_METHODS, when=_STATIC),
            "percentile": Categorical((99.99, 99.9, 99.999), when={"calibration": ("percentile",)}),
        }
        if pairs_of(graph):
            space["equalize"] = Categorical(("none", "weights", "activations"), when=_STATIC)
        if smoothable(graph) and _is_mostly_products(graph):
            space["smooth"] = Categorical((True, False), when=_STATIC)
            space["alpha"] = Categorical(_ALPHAS, when={"smooth": (True,)})
        if len(layers_of(graph)) > 1:
            space["keep_fp32"] = Categorical(_SHARES, when=_STATIC)
        if isinstance(context.calibration, GeneratedSplit):
            space[_INPUTS] = Categorical(("generated",), when=_STATIC)
        space["activations"] = Categorical((activations,), when=in_int8)
        space["reduce_range"] = Categorical((reduce_range,), when=in_int8)
        return space

    def missing(self, model: Model, context: Context) -> Mapping[str, str]:
        del model
        reason = why_no_half(context)
        return {} if reason is None else {_HALF: reason}

    def describe(self, parameters: Parameters) -> str:
        if parameters["format"] in _WEIGHTS:
            return f"int{_WEIGHTS[str(parameters['format'])]} weights"
        if parameters["format"] == _HALF:
            return _HALF
        words = [str(parameters.get("calibration", parameters["format"]))]
        if _INPUTS in parameters:
            words.append(f"on {parameters[_INPUTS]} inputs")
        if "percentile" in parameters:
            words[0] += f" {parameters['percentile']}"
        if parameters.get("equalize", "none") != "none":
            words.append(f"equalized by {parameters['equalize']}")
        if parameters.get("smooth"):
            words.append(f"smoothed {parameters['alpha']}")
        if parameters.get("keep_fp32"):
            words.append(f"{parameters['keep_fp32']:.0%} of the work in fp32")
        return f"int8 ({', '.join(words)})"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> OnnxModel:
        assert isinstance(model, OnnxModel)
        graph, notes, bits = folded(model.path), model.notes, 8
        if parameters["format"] == _HALF:
            return _in_half(graph, notes, context, directory)
        settings = settings_of(parameters)
        if parameters["format"] in _WEIGHTS:
            bits = _WEIGHTS[str(parameters["format"])]
            made = quantize_blockwise(graph, bits)
        elif parameters["format"] == "dynamic":
            made = quantize_dynamic(
                graph,
                pairs_saturate=settings.arithmetic.pairs_saturate,
                least_error=settings.arithmetic.least_error,
            )
        else:
            made, n_kept = quantize_static(graph, context.calibration, settings)
            if n_kept:
                n_layers = len(layers_of(graph))
                notes = (*notes, f"{n_kept} of {n_layers} layers stay in fp32, the most sensitive")
        (directory / _FILE).write_bytes(made.to_bytes())
        return onnx_model(directory, _FILE, f"int{bits}", notes)


def _in_half(graph: Graph, notes: tuple[str, ...], context: Context, directory: Path) -> OnnxModel:
    kept = kept_in_fp32(graph, context.calibration)
    if kept:
        notes = (*notes, f"{len(kept)} of {len(graph.nodes)} operators stay in fp32, which hold "
                 "values that fp16 can't")  # fmt: skip
    (directory / _FILE).write_bytes(to_half(graph, kept).to_bytes())
    return onnx_model(directory, _FILE, _HALF, notes)


def settings_of(parameters: Parameters) -> Settings:
    """The parameters as `optimizer.quantization.static` takes them."""
    return Settings(
        arithmetic=Arithmetic(
            signed=parameters["activations"] == "int8",
            pairs_saturate=bool(parameters["reduce_range"]),
            least_error=True,
        ),
        method=str(parameters.get("calibration", "minmax")),
        percent=float(parameters.get("percentile", 100.0)),
        equalize=str(parameters.get("equalize", "none")),
        smoothing=float(parameters["alpha"]) if parameters.get("smooth") else None,
        kept_share=float(parameters.get("keep_fp32", 0.0)),
    )


def _formats(graph: Graph) -> tuple[str, ...]:
    if not _is_mostly_products(graph):
        return ("static",)
    large = tuple(_WEIGHTS) if blockwise_layers(graph) else ()
    return ("static", "dynamic", *large)


def _is_mostly_products(graph: Graph) -> bool:
    """Whether at least half of the layers are matrix products, as in encoders: a convolutional
    network's last layer isn't worth formats of its own."""
    return 2 * len(dynamic_layers(graph)) >= len(layers_of(graph))


@lru_cache(maxsize=1)
def _folded_at(path: Path, _digest: str) -> Graph:
    return folded(path)


def _folded(model: OnnxModel) -> Graph:
    """To be read, not edited."""
    return _folded_at(model.path, model.digest)


def _load(model: OnnxModel) -> "onnx.ModelProto":
    import onnx

    return onnx.load(model.path, load_external_data=False)
