"""The cases that are refused: requests, and the error of the server's table that must come.

What is answered is in `cases`.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from serve.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    NotSupported,
)
from tests.conformance.cases import (
    PAIR,
    Case,
    Refused,
    many_inputs,
    many_request,
    masked_request,
    pairs,
    score_request,
    text_request,
    token_ids,
)
from tests.conformance.messages import Array, Input, Output, Parameter, Request, text_array
from tests.conformance.models import (
    BAD_INDEX,
    MAX_BATCH_SIZE,
    MAX_LENGTH,
    SPLIT_BATCH_SIZE,
    SPLIT_QUEUE_SIZE,
)

MANY_TENSORS = 1100  # of a request: more than the server takes


def refused_cases() -> list[Case]:
    return [
        *_models(),
        *_inputs(),
        *_too_many(),
        *_datatypes(),
        *_shapes(),
        *_batches(),
        *_outputs(),
        *_classifications(),
        *_parameters(),
        *_content(),
    ]


def _invalid(name: str, request: Request, says: str) -> Case:
    return Case(name, request, Refused(InvalidRequest, says))


def _models() -> Iterator[Case]:
    names = {
        "unknown": "nothing",
        "of another case": "ROWS_FP32",
        "a path": "../rows_fp32",
        "a path inside": "rows_fp32/1",
        "empty": "",
        "of any script": "モデル",
        "very long": "m" * 3000,
    }
    for words, name in names.items():
        refused = Refused(ModelNotFound)
        yield Case(
            f"a model's name that is {words} isn't found", replace(PAIR, model=name), refused
        )
    for version in ("2", "0", "01", "-1", "1.0", "latest", "9" * 100):
        refused = Refused(ModelNotFound, version[:20])
        yield Case(f"version {version[:9]} isn't found", replace(PAIR, version=version), refused)


def _inputs() -> Iterator[Case]:
    request = many_request()
    first, *others = request.inputs
    yield _invalid("a missing input is named", replace(request, inputs=tuple(others)), "also a")
    yield _invalid("no input at all is refused", replace(request, inputs=()), "inputs")
    yield _invalid("an input that comes twice is refused",
                   replace(request, inputs=(*request.inputs, first)),
                   "each input once")  # fmt: skip
    yield _invalid("an input that the model hasn't is named",
                   replace(request, inputs=(*request.inputs, Input("more", pairs(1)))),
                   "'more'")  # fmt: skip
    yield _invalid("an output is no input", replace(PAIR, inputs=(Input("y", pairs(1)),)), "'y'")
    yield _invalid("an input without a name is refused",
                   replace(PAIR, inputs=(Input("", pairs(1)),)), "inputs.name")  # fmt: skip


def _too_many() -> Iterator[Case]:
    inputs = tuple(Input(f"x{i}", pairs(1)) for i in range(MANY_TENSORS))
    yield _invalid("a thousand inputs and more are refused", replace(PAIR, inputs=inputs),
                   f"{MANY_TENSORS} tensors")  # fmt: skip
    outputs = tuple(Output(f"y{i}") for i in range(MANY_TENSORS))
    yield _invalid("a thousand outputs and more are refused", replace(PAIR, outputs=outputs),
                   f"{MANY_TENSORS + 1} tensors")  # fmt: skip


def _datatypes() -> Iterator[Case]:
    others: dict[str, Array] = {
        "integers": np.ones((1, 2), np.int32),
        "doubles": np.ones((1, 2)),
        "booleans": np.ones((1, 2), np.bool_),
        "text": text_array(["1", "2"], (1, 2)),
    }
    for words, array in others.items():
        request = replace(PAIR, inputs=(Input("x", array),))
        yield _invalid(f"{words} are refused for FP32", request, "inputs.x.datatype")
    beyond: dict[str, tuple[str, Array]] = {
        "an integer above INT8": ("INT8", np.array([[1, 128]], np.int32)),
        "an integer below INT16": ("INT16", np.array([[-(2**15) - 1, 0]], np.int32)),
        "an integer above UINT8": ("UINT8", np.array([[256, 0]], np.uint32)),
        "an integer above UINT32": ("UINT32", np.array([[2**32, 0]], np.uint64)),
        "a negative integer for UINT16": ("UINT16", np.array([[-1, 0]], np.int32)),
        "a double above FP32": ("FP32", np.array([[1e300, 0]])),
        "a number other than 0 and 1 for BOOL": ("BOOL", np.array([[2, 0]], np.uint8)),
    }
    for words, (datatype, array) in beyond.items():
        request = Request(f"rows_{datatype.lower()}", (Input("x", array, datatype),))
        yield _invalid(f"{words} is refused", request, "inputs.x")
    for datatype in ("FLOAT", "fp32", "TYPE_FP32", "FP8", "STRING"):
        request = replace(PAIR, inputs=(Input("x", pairs(1), datatype),))
        yield _invalid(f"datatype {datatype} is refused", request, "inputs.x.datatype")


def _said(name: str, shape: tuple[int, ...], array: Array | None = None, says: str = "") -> Case:
    """A tensor [1, 2] that is said to have another shape."""
    given = Input("x", pairs(1) if array is None else array, shape=shape)
    return _invalid(name, replace(PAIR, inputs=(given,)), says or "inputs.x")


def _shapes() -> Iterator[Case]:
    empty = pairs(1)[:0]
    shape = "inputs.x.shape"
    yield _said("an axis too few is refused", (2,), says=shape)
    yield _said("an axis too many is refused", (1, 2, 1), says=shape)
    yield _said("a scalar is refused for two axes", (), pairs(1)[0, :1], shape)
    yield _said("more axes than any model has are refused", (1,) * 33, pairs(1)[0, :1], shape)
    yield _said("a negative dimension is refused", (-1, 2), says=shape)
    yield _said("negative dimensions of a positive product are refused", (-1, -2), says=shape)
    yield _said("the least dimension of all is refused", (-(2**63), 2), says=shape)
    yield _said("dimensions whose product wraps to 0 are refused", (2**32, 2**32), empty, shape)
    wrapping = (3, (2**64 + 2) // 3)
    yield _said("dimensions whose product wraps to 2 are refused", wrapping, says=shape)
    yield _said("the largest dimension of all is refused", (2**63 - 1, 1), says=shape)
    yield _said("a huge dimension beside an empty one is refused", (0, 2**62), empty, shape)
    yield _said("fewer elements than the shape says are refused", (1, 3))
    yield _said("more elements than the shape says are refused", (1, 1))
    yield _said("elements for an empty shape are refused", (1, 0))
    yield _said("no elements for a full shape are refused", (1, 2), empty)
    four = Input("x", np.zeros(4, np.float32))
    yield _invalid("a dimension other than the model's is refused",
                   Request("fixed", (four,)), shape)  # fmt: skip
    yield _invalid("no elements for a fixed dimension are refused",
                   Request("fixed", (replace(four, array=four.array[:0]),)), shape)  # fmt: skip
    wide = np.zeros((1, 3), np.float32)
    yield _invalid("a dimension other than the model's behind the batch is refused",
                   many_request(a=wide), "inputs.a.shape")  # fmt: skip
    words = Input("x", text_array(["a", "b"], (1, 2)), shape=(1, 3))
    yield _invalid("fewer BYTES than the shape says are refused",
                   Request("rows_bytes", (words,)), "inputs.x")  # fmt: skip
    words = replace(words, shape=(1, 1))
    yield _invalid("more BYTES than the shape says are refused",
                   Request("rows_bytes", (words,)), "inputs.x")  # fmt: skip
    vector = Input("scalar", np.zeros(1, np.int32))
    others = (Input("vector", np.zeros(2, np.int32)), Input("cube", np.zeros((1, 1, 1), np.int32)))
    yield _invalid("a vector of one is no scalar",
                   Request("whole_int32", (vector, *others)), "inputs.scalar.shape")  # fmt: skip


def _batches() -> Iterator[Case]:
    def batch(model: str, n_rows: int) -> Request:
        return Request(model, (Input("x", pairs(n_rows)),))

    limit, most = MAX_BATCH_SIZE, SPLIT_BATCH_SIZE * SPLIT_QUEUE_SIZE
    yield _invalid(
        "a batch of nothing is refused", batch("rows_fp32", 0), f"a batch of 1 to {limit}"
    )
    yield _invalid("a batch of one row too many is refused", batch("rows_fp32", limit + 1),
                   f"a batch of 1 to {limit}")  # fmt: skip
    yield _invalid("a batch of nothing is refused where batches are split", batch("splitting", 0),
                   f"a batch of 1 to {most}")  # fmt: skip
    yield _invalid("a batch beyond what may queue is refused where batches are split",
                   batch("splitting", most + 1), f"a batch of 1 to {most}")  # fmt: skip
    yield _invalid("inputs of unequal batches are refused",
                   many_request(2, n=many_inputs(3)["n"]), "equal batch dimensions")  # fmt: skip


def _outputs() -> Iterator[Case]:
    def wanting(*names: str) -> Request:
        return replace(many_request(), outputs=tuple(Output(name) for name in names))

    yield _invalid(
        "an output that the model hasn't is named", wanting("sum", "product"), "'product'"
    )
    yield _invalid("an input is no output", wanting("words"), "'words'")
    yield _invalid("an output that is wanted twice is refused",
                   wanting("sum", "doubled", "sum"), "each output once")  # fmt: skip
    yield _invalid("an output without a name is refused", wanting(""), "outputs.name")


def _classifications() -> Iterator[Case]:
    numbers: dict[str, Parameter] = {
        "no": 0,
        "fewer than no": -1,
        "half a": 0.5,
        "a word for a number of": "two",
        "true": True,
    }
    for words, k in numbers.items():
        yield _invalid(f"{words} classes are refused", score_request(Output("y", k)),
                       "outputs.y.parameters.classification")  # fmt: skip
    for output, words in (("words_echo", "BYTES"), ("unset", "BOOL")):
        request = replace(many_request(), outputs=(Output(output, 1),))
        yield _invalid(f"classes of {words} are refused", request, f"outputs.{output}")
    yield _invalid("classes of an output that the model hasn't are refused",
                   score_request(Output("z", 1)), "'z'")  # fmt: skip


def _parameters() -> Iterator[Case]:
    timeouts: dict[str, Parameter] = {
        "negative": -1,
        "a word": "soon",
        "a fraction": 1.5,
        "true": True,
        "beyond signed integers": 2**63,
    }
    for words, timeout in timeouts.items():
        request = replace(PAIR, parameters={"timeout": timeout})
        yield _invalid(f"a timeout that is {words} is refused", request, "parameters.timeout")
    late = replace(PAIR, parameters={"timeout": 1})
    yield Case("a timeout of a microsecond has passed", late, Refused(DeadlineExceeded, "deadline"))
    sequences: dict[str, Parameter] = {
        "sequence_id": 7,
        "sequence_start": True,
        "sequence_end": False,
    }
    for name, value in (*sequences.items(), ("sequence_id", "seven")):
        request = replace(PAIR, parameters={name: value})
        yield Case(f"{name} {value} isn't supported", request, Refused(NotSupported, name))


def _content() -> Iterator[Case]:
    bad = np.array([[0, BAD_INDEX]])
    yield Case("an index that the engine fails on is the engine's failure",
               Request("table", (Input("index", bad),)),
               Refused(EngineFailed, "'table'"))  # fmt: skip
    no_text = text_array([b"\xff\xfe", b"ok"], (1, 2))
    yield _invalid("BYTES that are no UTF-8 are refused by an engine of text",
                   Request("rows_bytes", (Input("x", no_text),)), "")  # fmt: skip
    yield _invalid("a text that is no UTF-8 is refused", text_request(b"the \xc3("), "")
    yield _invalid("a text of no token is refused", text_request("the cat", " "), "inputs.text[1]")
    long, mask = token_ids(1, MAX_LENGTH + 1), np.ones((1, MAX_LENGTH + 1), np.int64)
    for words, request in (
        ("", masked_request(long)),
        (" with its mask", masked_request(long, mask)),
    ):
        yield _invalid(f"a row longer than the largest bucket{words} is refused", request,
                       f"at most {MAX_LENGTH}")  # fmt: skip
    yield _invalid("a mask of another length is refused",
                   masked_request(long[:, :3], mask[:, :2]), "equal lengths")  # fmt: skip
    yield _invalid("a mask of another batch is refused",
                   masked_request(token_ids(2, 3), mask[:, :3]),
                   "equal batch dimensions")  # fmt: skip
