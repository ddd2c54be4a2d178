"""Models with declared pre- and postprocessing: images and texts in, labels out."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper
from PIL import Image

from serve.artifact import Batching, Manifest, write_version
from serve.engines import EngineSpec, load_engine
from serve.padding import CutOutput, PaddedInput, Padding
from serve.transform import ImageInput, LabelOutput, TextInput, TransformSpec

LABELS = ("red", "green", "blue")


def repository(scratch: Path) -> Path:
    """In `scratch`, with `colours` (an image in, labels out) and `texts` (an encoder's inputs)."""
    root = scratch / "models"
    labels = scratch / "labels.txt"
    labels.write_text("\n".join(LABELS) + "\n")
    publish(
        root, "colours", image_model(scratch / "image.onnx"), {"labels.txt": labels},
        transform=TransformSpec(
            inputs=(ImageInput(name="image", tensor="pixels", size=(8, 8), mean=(0.0,) * 3,
                               std=(1.0,) * 3),),
            outputs=(LabelOutput(tensor="scores", file="labels.txt", name="label", top=2,
                                 scores="confidence", keep=False),),
        ),
    )  # fmt: skip
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(scratch / "tokenizer.json"))
    publish(
        root, "texts", text_model(scratch / "text.onnx"),
        {"tokenizer.json": scratch / "tokenizer.json"},
        transform=TransformSpec(
            inputs=(TextInput(name="text", file="tokenizer.json", ids="ids", mask="mask",
                              max_length=16),),
        ),
        padding=Padding((PaddedInput("ids"), PaddedInput("mask")), (4, 8, 16),
                        (CutOutput("echo"),), mask="mask"),
    )  # fmt: skip
    return root


def image_model(path: Path) -> Path:
    """pixels FP32[-1, 3, 8, 8] -> scores FP32[-1, 3]: the mean of each channel."""
    mean = helper.make_node("ReduceMean", ["pixels", "axes"], ["scores"], keepdims=0)
    return save(path, [mean], [("pixels", 1, ["b", 3, 8, 8])], [("scores", 1, ["b", 3])],
                {"axes": np.array([2, 3], np.int64)})  # fmt: skip


def text_model(path: Path) -> Path:
    """ids, mask INT64[-1, -1] -> total FP32[-1] of what isn't masked, echo FP32[-1, -1]."""
    nodes = [
        helper.make_node("Mul", ["ids", "mask"], ["kept"]),
        helper.make_node("Cast", ["kept"], ["echo"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["echo", "axes"], ["total"], keepdims=0),
    ]
    inputs = [("ids", 7, ["b", "l"]), ("mask", 7, ["b", "l"])]
    outputs = [("total", 1, ["b"]), ("echo", 1, ["b", "l"])]
    return save(path, nodes, inputs, outputs, {"axes": np.array([1], np.int64)})


def save(path: Path, nodes: Any, inputs: Any, outputs: Any, constants: Any) -> Path:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def publish(root: Path, name: str, model: Path, files: dict[str, Path], **changes: Any) -> None:
    engine = load_engine(model.parent, EngineSpec("onnxruntime", model.name))
    signature = engine.signature
    engine.close()
    spec = EngineSpec("onnxruntime", "model.onnx", threads=1)
    manifest = Manifest(name, "1", signature, spec, Batching(8), **changes)
    write_version(root, manifest, {"model.onnx": model, **files})


def encoded(colour: tuple[int, int, int], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(buffer, kind)
    return buffer.getvalue()
