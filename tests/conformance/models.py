"""Tiny models for the cases, and the repository that the server is started on.

Most echo what they get, so that numpy knows their answers; it doesn't know encodings or cases.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serve.artifact import Batching, write_version
from serve.padding import CutOutput, PaddedInput, Padding
from serve.transform import LabelOutput, TextInput, TransformSpec
from tests.conformance.messages import Array
from tests.serve.versions import manifest_of

# OIP datatype -> ONNX's.
KINDS: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
MAX_BATCH_SIZE = 8
SPLIT_BATCH_SIZE, SPLIT_QUEUE_SIZE = 4, 3
N_WIDE = 24  # inputs and outputs of the model `wide`
LABELS = ("ant", "bee", "côté", "dog", "eel")

# Of the models `table` and `busy`, by index.
TABLE = np.array([0.5, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3.25], np.float32)
NORMAL = (0, 6)  # those that JSON carries, and sums too
BAD_INDEX = 1000  # the engine fails on it

# Of the model `masked`: [token, feature]. What is filled up with is no zero, so that a mask that
# is ignored shows.
EMBEDDING = np.random.default_rng(3).normal(size=(6, 2)).astype(np.float32)
FILL_TOKEN = 5
MAX_LENGTH = 8

WORDS = {"[UNK]": 1, "the": 2, "cat": 3, "sat": 4, "naïve": 5, "[PAD]": 9}
MAX_TOKENS = 6

Value = onnx.ValueInfoProto


@dataclass(frozen=True)
class TinyModel:
    """A version to publish. `changes` are fields of its manifest, `files` those beside the
    model's own."""

    name: str
    onnx: onnx.ModelProto
    changes: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def publish_all(repository: Path, scratch: Path) -> None:
    for model in tiny_models():
        path = scratch / "model.onnx"
        onnx.save(model.onnx, path)
        files = {"model.onnx": path}
        for name, content in model.files.items():
            files[name] = scratch / name
            files[name].write_bytes(content)
        write_version(repository, manifest_of(path, model.name, **model.changes), files)


def tiny_models() -> list[TinyModel]:
    """Every model of the cases; `rows_X` and `whole_X` for every datatype X."""
    return [
        *(TinyModel(f"rows_{kind.lower()}", rows(kind)) for kind in KINDS),
        *(TinyModel(f"whole_{kind.lower()}", whole(kind)) for kind in KINDS),
        *(TinyModel(builder.__name__, builder()) for builder in (deep, many, wide, fixed)),
        *(TinyModel(builder.__name__, builder()) for builder in (halves, table, busy)),
        TinyModel("versioned", echo("Neg"), {"version": "1"}),
        TinyModel("versioned", echo("Identity"), {"version": "2"}),
        TinyModel("splitting", echo("Identity"), {"batching": SPLITTING}),
        TinyModel("scores", scores(), {"labels": {"y": "labels.txt"}}, {"labels.txt": LABELS_FILE}),
        TinyModel("masked", masked(), {"padding": MASKED}),
        TinyModel("labelled", scores(), {"transform": LABELLED}, {"labels.txt": LABELS_FILE}),
        TinyModel(
            "sentences",
            sentences(),
            {"transform": TEXTS, "padding": TEXTS_PADDING},
            {"tokenizer.json": tokenizer()},
        ),
    ]


SPLITTING = Batching(SPLIT_BATCH_SIZE, max_queue_size=SPLIT_QUEUE_SIZE, oversize="split")
LABELS_FILE = "\n".join(LABELS).encode()
LABELLED = TransformSpec(
    outputs=(LabelOutput(tensor="y", file="labels.txt", name="label", top=2, scores="score"),)
)
MASKED = Padding(
    inputs=(PaddedInput("ids", value=FILL_TOKEN), PaddedInput("mask")),
    buckets=(2, 4, MAX_LENGTH),
    outputs=(CutOutput("hidden"),),
    mask="mask",
)
TEXTS = TransformSpec(
    inputs=(
        TextInput(
            name="text", file="tokenizer.json", ids="ids", mask="mask", max_length=MAX_TOKENS
        ),
    )
)
TEXTS_PADDING = Padding(
    inputs=(PaddedInput("ids", value=WORDS["[PAD]"]), PaddedInput("mask")),
    buckets=(2, MAX_TOKENS),
    outputs=(CutOutput("real"),),
    mask="mask",
)


# --- models


def rows(datatype: str) -> onnx.ModelProto:
    """x [-1, -1] -> y, the same; the first axis is the batch."""
    kind = KINDS[datatype]
    return _model(
        [_node("Identity", "x", "y")],
        [_value("x", kind, ["batch", "length"])],
        [_value("y", kind, ["batch", "length"])],
    )


def whole(datatype: str) -> onnx.ModelProto:
    """scalar [], vector [-1], cube [-1, -1, -1] -> the same, named X_echo; no axis is a batch."""
    kind = KINDS[datatype]
    shapes: dict[str, list[int | str]] = {"scalar": [], "vector": ["n"], "cube": ["p", "q", "r"]}
    return _model(
        [_node("Identity", name, f"{name}_echo") for name in shapes],
        [_value(name, kind, shape) for name, shape in shapes.items()],
        [_value(f"{name}_echo", kind, shape) for name, shape in shapes.items()],
    )


def deep() -> onnx.ModelProto:
    """x INT16 of eight axes -> y, the same."""
    shape: list[int | str] = ["batch", 1, 2, "a", 1, "b", 2, 1]
    return _model(
        [_node("Identity", "x", "y")],
        [_value("x", TensorProto.INT16, shape)],
        [_value("y", TensorProto.INT16, shape)],
    )


def many() -> onnx.ModelProto:
    """a FP32[-1, 2], n INT64[-1, 2], words BYTES[-1, 1], flags BOOL[-1, 3] -> sum FP32[-1, 2] of a
    and n, doubled INT64[-1, 2], words_echo, unset BOOL[-1, 3]."""
    return _model(
        [
            _node("Cast", "n", "n_real", to=TensorProto.FLOAT),
            _node("Add", "a", "n_real", "sum"),
            _node("Add", "n", "n", "doubled"),
            _node("Identity", "words", "words_echo"),
            _node("Not", "flags", "unset"),
        ],
        [
            _value("a", TensorProto.FLOAT, ["batch", 2]),
            _value("n", TensorProto.INT64, ["batch", 2]),
            _value("words", TensorProto.STRING, ["batch", 1]),
            _value("flags", TensorProto.BOOL, ["batch", 3]),
        ],
        [
            _value("sum", TensorProto.FLOAT, ["batch", 2]),
            _value("doubled", TensorProto.INT64, ["batch", 2]),
            _value("words_echo", TensorProto.STRING, ["batch", 1]),
            _value("unset", TensorProto.BOOL, ["batch", 3]),
        ],
    )


def wide() -> onnx.ModelProto:
    """x0, x1, ... INT32[-1, 1] -> y0, y1, ..., their negations."""
    kind = TensorProto.INT32
    return _model(
        [_node("Neg", f"x{i}", f"y{i}") for i in range(N_WIDE)],
        [_value(f"x{i}", kind, ["batch", 1]) for i in range(N_WIDE)],
        [_value(f"y{i}", kind, ["batch", 1]) for i in range(N_WIDE)],
    )


def fixed() -> onnx.ModelProto:
    """x FP32[3] -> y FP32[3], the negation: nothing varies."""
    return _model(
        [_node("Neg", "x", "y")],
        [_value("x", TensorProto.FLOAT, [3])],
        [_value("y", TensorProto.FLOAT, [3])],
    )


def echo(operator: str) -> onnx.ModelProto:
    """x FP32[-1, 2] -> y FP32[-1, 2] by `operator`."""
    return _model(
        [_node(operator, "x", "y")],
        [_value("x", TensorProto.FLOAT, ["batch", 2])],
        [_value("y", TensorProto.FLOAT, ["batch", 2])],
    )


def halves() -> onnx.ModelProto:
    """x FP32[-1, 2] -> half FP16, brain BF16 and full FP32, the same in three precisions."""
    kinds = {"half": "FP16", "brain": "BF16", "full": "FP32"}
    return _model(
        [_node("Cast", "x", name, to=KINDS[kind]) for name, kind in kinds.items()],
        [_value("x", TensorProto.FLOAT, ["batch", 2])],
        [_value(name, KINDS[kind], ["batch", 2]) for name, kind in kinds.items()],
    )


def table() -> onnx.ModelProto:
    """index INT64[-1, -1] -> y FP32[-1, -1] from `TABLE`."""
    return _model(
        [_node("Gather", "table", "index", "y")],
        [_value("index", TensorProto.INT64, ["batch", "length"])],
        [_value("y", TensorProto.FLOAT, ["batch", "length"])],
        {"table": TABLE},
    )


def scores() -> onnx.ModelProto:
    """x FP32[-1, 5], n INT64[-1, 5] -> y and m, the same."""
    return _model(
        [_node("Identity", "x", "y"), _node("Identity", "n", "m")],
        [_value("x", KINDS["FP32"], ["batch", 5]), _value("n", KINDS["INT64"], ["batch", 5])],
        [_value("y", KINDS["FP32"], ["batch", 5]), _value("m", KINDS["INT64"], ["batch", 5])],
    )


def busy() -> onnx.ModelProto:
    """turns INT64[-1], index INT64[-1] -> y FP32[-1] from `TABLE`, index_echo INT64[-1]; a batch
    takes as many turns of work as the row that asks for most."""
    kind = TensorProto.INT64
    body = helper.make_graph(
        [
            _node("Identity", "more", "more_out"),
            _node("MatMul", "state", "matrix", "product"),
            _node("Tanh", "product", "state_out"),
        ],
        "turn",
        [
            _value("turn", kind, []),
            _value("more", TensorProto.BOOL, []),
            _value("state", TensorProto.FLOAT, [64, 64]),
        ],
        [
            _value("more_out", TensorProto.BOOL, []),
            _value("state_out", TensorProto.FLOAT, [64, 64]),
        ],
    )
    return _model(
        [
            _node("ReduceMax", "turns", "most", keepdims=0),
            helper.make_node("Loop", ["most", "yes", "matrix"], ["end"], body=body),
            _node("ReduceMax", "end", "largest", keepdims=0),
            _node("Mul", "largest", "zero", "nothing"),
            _node("Gather", "table", "index", "found"),
            _node("Add", "found", "nothing", "y"),
            _node("Identity", "index", "index_echo"),
        ],
        [_value("turns", kind, ["batch"]), _value("index", kind, ["batch"])],
        [_value("y", TensorProto.FLOAT, ["batch"]), _value("index_echo", kind, ["batch"])],
        {
            "matrix": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
            "yes": np.array(True),
            "zero": np.array(0, np.float32),
            "table": TABLE,
        },
    )


def masked() -> onnx.ModelProto:
    """ids INT64[-1, -1], mask INT64[-1, -1] -> hidden FP32[-1, -1, 2], pooled FP32[-1, 2]: see
    `masked_by_hand`."""
    return _model(
        [
            _node("Gather", "embedding", "ids", "tokens"),
            _node("Cast", "mask", "real", to=TensorProto.FLOAT),
            _node("Unsqueeze", "real", "last", "weights"),
            _node("Mul", "tokens", "weights", "weighted"),
            _node("ReduceSum", "weighted", "middle", "total", keepdims=1),
            _node("ReduceSum", "weights", "middle", "count", keepdims=1),
            _node("Max", "count", "one", "divisor"),
            _node("Div", "total", "divisor", "mean"),
            _node("Add", "tokens", "mean", "hidden"),
            _node("Squeeze", "mean", "middle", "pooled"),
        ],
        [
            _value("ids", TensorProto.INT64, ["batch", "length"]),
            _value("mask", TensorProto.INT64, ["batch", "length"]),
        ],
        [
            _value("hidden", TensorProto.FLOAT, ["batch", "length", 2]),
            _value("pooled", TensorProto.FLOAT, ["batch", 2]),
        ],
        {
            "embedding": EMBEDDING,
            "one": np.array(1, np.float32),
            "middle": np.array([1], np.int64),
            "last": np.array([2], np.int64),
        },
    )


def masked_by_hand(ids: Array, mask: Array) -> dict[str, Array]:
    """What `masked` computes: each token's features and, added to them, the mean of the real
    ones', which is `pooled`."""
    tokens = EMBEDDING[ids.astype(np.int64)].astype(np.float64)  # [batch, length, feature]
    weights = mask.astype(np.float64)[:, :, None]
    mean = (tokens * weights).sum(1, keepdims=True) / np.maximum(weights.sum(1, keepdims=True), 1)
    hidden = (tokens + mean).astype(np.float32)
    return {"hidden": hidden, "pooled": mean[:, 0].astype(np.float32)}


def sentences() -> onnx.ModelProto:
    """ids INT64[-1, -1], mask INT64[-1, -1] -> total INT64[-1, 1], the sum of the real ids, and
    real INT64[-1, -1], the ids with 0 for those that aren't."""
    kind = TensorProto.INT64
    return _model(
        [
            _node("Mul", "ids", "mask", "real"),
            _node("ReduceSum", "real", "axes", "total", keepdims=1),
        ],
        [_value("ids", kind, ["batch", "length"]), _value("mask", kind, ["batch", "length"])],
        [_value("total", kind, ["batch", 1]), _value("real", kind, ["batch", "length"])],
        {"axes": np.array([1], np.int64)},
    )


def tokenizer() -> bytes:
    """A tokenizer.json of the words of `WORDS`, separated by white space."""
    document = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
    }
    return json.dumps(document).encode()


def _node(operator: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    """A node of one output, which is named last."""
    return helper.make_node(operator, names[:-1], names[-1:], **attributes)


def _value(name: str, kind: int, shape: list[int | str]) -> Value:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: list[Value],
    outputs: list[Value],
    constants: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    weights = [numpy_helper.from_array(array, n) for n, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
