"""The cases that are answered: requests, and the tensors that must come back, bit for bit.

What is refused is in `refusals`. All expectations are numpy's; no server was asked for them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from serve.errors import ServeError
from tests.conformance.messages import (
    DTYPES,
    Array,
    Input,
    Output,
    Parameter,
    Request,
    text_array,
)
from tests.conformance.models import (
    LABELS,
    MAX_BATCH_SIZE,
    MAX_LENGTH,
    MAX_TOKENS,
    N_WIDE,
    SPLIT_BATCH_SIZE,
    SPLIT_QUEUE_SIZE,
    TABLE,
    WORDS,
    masked_by_hand,
)


@dataclass(frozen=True)
class Refused:
    """The `error` whose row in the table of statuses decides, and what its message names."""

    error: type[ServeError]
    says: str = ""


@dataclass(frozen=True, eq=False)
class Case:
    """`expected` are the outputs by name in their order, or the refusal. `version` is the one
    that answers."""

    name: str
    request: Request
    expected: Mapping[str, Array] | Refused
    version: str = "1"


def value_cases() -> list[Case]:
    """Everything that comes back exactly."""
    return [
        *_datatypes(),
        *_shapes(),
        *_signatures(),
        *_batches(),
        *_requested_outputs(),
        *_names(),
        *_parameters(),
        *_values_without_json(),
        *_classifications(),
        *_transforms(),
    ]


# --- datatypes


def _echo(name: str, values: Array) -> Case:
    """`values` [length] as a row of an echoing model."""
    kind = next(kind for kind, dtype in DTYPES.items() if dtype == values.dtype).lower()
    row = values.reshape(1, -1)
    return Case(name, Request(f"rows_{kind}", (Input("x", row),)), {"y": row})


def _datatypes() -> Iterator[Case]:
    for datatype, dtype in DTYPES.items():
        if dtype.kind in "iu":
            yield _echo(f"the extremes of {datatype} come back", _integers(dtype))
    yield _echo("both of BOOL come back", np.array([True, False, False]))
    for datatype in ("FP32", "FP64"):
        finite = _floats(DTYPES[datatype])
        yield _echo(f"signed zeros, subnormals and extremes of {datatype} come back", finite)
        infinite = np.array([np.inf, -np.inf, 1], DTYPES[datatype])
        yield _echo(f"infinities of {datatype} come back", infinite)
        yield _echo(f"NaNs of {datatype} keep their sign and payload", _nans(DTYPES[datatype]))
    for datatype in ("FP16", "BF16"):
        every = np.arange(2**16, dtype=np.uint16).view(DTYPES[datatype])
        yield _echo(f"every bit pattern of {datatype} comes back", every)
    texts = [
        "",
        "a",
        "\0",
        "a\0b\0",
        " \t\n",
        '"\\/',
        "naïve",
        "日本",
        "🙂",
        "\u2028",
        "x" * 70_000,
    ]
    yield _echo("BYTES that are empty, long, of NULs or of any script come back", text_array(texts))
    yield _echo("BYTES that are all empty come back", text_array(["", "", ""]))


def _integers(dtype: np.dtype[Any]) -> Array:
    limits = np.iinfo(dtype)
    values = {limits.min, limits.min + 1, 0, 1, limits.max - 1, limits.max}
    # Around what doubles and signed integers hold.
    for edge in (2**53 + 1, -(2**53) - 1, 2**63 - 1, 2**63, 2**63 + 1):
        if limits.min <= edge <= limits.max:
            values.add(edge)
    return np.array(sorted(values), dtype)


def _floats(dtype: np.dtype[Any]) -> Array:
    limits = np.finfo(dtype)
    positive = [0, limits.smallest_subnormal, limits.smallest_normal, limits.max, 0.1, 1 / 3, 1e10]
    halves = np.array(positive, dtype)
    return np.concatenate([halves, np.negative(halves)])


def _nans(dtype: np.dtype[Any]) -> Array:
    """Quiet and signalling ones, of both signs, with payloads."""
    width, mantissa = dtype.itemsize * 8, 23 if dtype.itemsize == 4 else 52
    infinity = (2 ** (width - 1 - mantissa) - 1) << mantissa
    quiet = infinity | 1 << (mantissa - 1)
    bits = [quiet, quiet | 12345, infinity | 1, infinity | 54321]
    bits += [one | 1 << (width - 1) for one in bits]
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)


# --- shapes


def whole_request(scalar: Array, vector: Array, cube: Array, datatype: str) -> Request:
    inputs = {"scalar": scalar, "vector": vector, "cube": cube}
    return Request(
        f"whole_{datatype.lower()}", tuple(Input(name, array) for name, array in inputs.items())
    )


def whole_case(name: str, datatype: str, scalar: Array, vector: Array, cube: Array) -> Case:
    """A model that echoes tensors of no, one and three axes, none of them a batch."""
    expected = {"scalar_echo": scalar, "vector_echo": vector, "cube_echo": cube}
    return Case(name, whole_request(scalar, vector, cube, datatype), expected)


def _shapes() -> Iterator[Case]:
    for datatype in DTYPES:
        seven = _some(datatype, 7)
        full = (seven[0:1].reshape(()), seven[1:3], seven[1:7].reshape(1, 3, 2))
        yield whole_case(f"a scalar, a vector and a cube of {datatype} come back", datatype, *full)
        empty = (seven[6:7].reshape(()), seven[:0], seven[:0].reshape(2, 0, 3))
        yield whole_case(f"empty tensors of {datatype} come back", datatype, *empty)
        nothing = seven[:0].reshape(3, 0)
        yield Case(
            f"rows of no element of {datatype} come back",
            Request(f"rows_{datatype.lower()}", (Input("x", nothing),)),
            {"y": nothing},
        )
    deep = np.arange(2 * 2 * 3 * 5 * 2, dtype=np.int16).reshape(2, 1, 2, 3, 1, 5, 2, 1)
    yield Case("eight axes come back", Request("deep", (Input("x", deep),)), {"y": deep})
    none = deep[:, :, :, :0]
    yield Case(
        "eight axes, one of them empty, come back", Request("deep", (Input("x", none),)),
        {"y": none},
    )  # fmt: skip


def _some(datatype: str, n: int) -> Array:
    """`n` different values that every encoding of the datatype carries."""
    if datatype == "BYTES":
        return text_array([f"té{i}" for i in range(n)])
    values = np.arange(n) % 2 == 0 if datatype == "BOOL" else np.arange(n) + 1
    return values.astype(DTYPES[datatype])


# --- signatures and batches


def many_inputs(n_rows: int = 1) -> dict[str, Array]:
    count = np.arange(n_rows)
    return {
        "a": np.stack([count + 0.5, -count], 1).astype(np.float32),
        "n": np.stack([count, 2**40 + count], 1),
        "words": text_array([f"word {i}" for i in count], (n_rows, 1)),
        "flags": np.stack([count % 2 == 0, count % 3 == 0, count < 0], 1),
    }


def many_outputs(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {
        "sum": inputs["a"] + inputs["n"].astype(np.float32),
        "doubled": np.multiply(inputs["n"], 2),
        "words_echo": inputs["words"],
        "unset": np.logical_not(inputs["flags"]),
    }


def many_request(n_rows: int = 1, **changes: Array) -> Request:
    inputs = many_inputs(n_rows) | changes
    return Request("many", tuple(Input(name, array) for name, array in inputs.items()))


def _signatures() -> Iterator[Case]:
    expected = many_outputs(many_inputs(2))
    request = many_request(2)
    yield Case("inputs and outputs of many datatypes have their order", request, expected)
    turned = replace(request, inputs=request.inputs[::-1])
    yield Case("inputs in another order than the model's are the same", turned, expected)
    columns = [np.array([[i], [2**31 - 1 - i]], np.int32) for i in range(N_WIDE)]
    inputs = tuple(Input(f"x{i}", column) for i, column in enumerate(columns))
    yield Case(
        "many inputs and outputs find each other", Request("wide", inputs),
        {f"y{i}": -column for i, column in enumerate(columns)},
    )  # fmt: skip
    three = np.array([1.5, 0, -2], np.float32)
    yield Case(
        "a model without a batch dimension answers", Request("fixed", (Input("x", three),)),
        {"y": -three},
    )  # fmt: skip


def pairs(n_rows: int) -> Array:
    """FP32[row, 2]."""
    return np.arange(2 * n_rows, dtype=np.float32).reshape(n_rows, 2) + np.float32(0.25)


def _batches() -> Iterator[Case]:
    for n_rows, words in ((1, "one row"), (5, "several rows"), (MAX_BATCH_SIZE, "all it may have")):
        request = Request("rows_fp32", (Input("x", pairs(n_rows)),))
        yield Case(f"a batch of {words} comes back", request, {"y": pairs(n_rows)})
    sizes = {
        "as large as one run": SPLIT_BATCH_SIZE,
        "one row larger than a run": SPLIT_BATCH_SIZE + 1,
        "as large as all runs that may queue": SPLIT_BATCH_SIZE * SPLIT_QUEUE_SIZE,
    }
    for words, n_rows in sizes.items():
        request = Request("splitting", (Input("x", pairs(n_rows)),))
        yield Case(f"a batch {words} comes back whole", request, {"y": pairs(n_rows)})


# --- what is asked for


def _requested_outputs() -> Iterator[Case]:
    everything = many_outputs(many_inputs())
    lists: dict[str, tuple[str, ...]] = {
        "one output alone is all that comes": ("doubled",),
        "some outputs come in the order asked for": ("unset", "sum"),
        "all outputs come in the order asked for": ("words_echo", "unset", "doubled", "sum"),
        "an empty list of outputs asks for all": (),
    }
    for words, names in lists.items():
        wanted = tuple(Output(name) for name in names)
        expected = {name: everything[name] for name in names or everything}
        yield Case(words, replace(many_request(), outputs=wanted), expected)


PAIR = Request("rows_fp32", (Input("x", pairs(1)),))
ECHOED = {"y": pairs(1)}


def _names() -> Iterator[Case]:
    ids = {
        "a word": "abc-1",
        "a number": "18446744073709551616",
        "any script": "日本🙂é",
        "long": "i" * 4000,
        "full of what other formats escape": '"\\\n\r\t\0<&%2F ',
    }
    for words, given in ids.items():
        yield Case(f"an id that is {words} comes back", replace(PAIR, id=given), ECHOED)
    request = Request("versioned", (Input("x", pairs(2)),))
    negated, same = {"y": -pairs(2)}, {"y": pairs(2)}
    yield Case("the newest version answers where none is asked for", request, same, "2")
    yield Case("an older version answers where it is asked for", replace(request, version="1"),
               negated, "1")  # fmt: skip
    yield Case("the newest version answers where it is asked for", replace(request, version="2"),
               same, "2")  # fmt: skip


def _parameters() -> Iterator[Case]:
    given: dict[str, dict[str, Parameter]] = {
        "a timeout of a minute leaves time": {"timeout": 60_000_000},
        "a timeout of 0 is none": {"timeout": 0},
        "a priority changes nothing in an answer": {"priority": 2},
        "parameters that nobody knows change nothing": {"b": True, "i": -7, "s": "é", "f": 1.5},
        "a parameter that only unsigned integers hold changes nothing": {"u": 2**64 - 1},
    }
    for words, parameters in given.items():
        yield Case(words, replace(PAIR, parameters=parameters), ECHOED)


def _values_without_json() -> Iterator[Case]:
    """Outputs that JSON can't carry, of inputs that it can; each once more as binary."""
    x = np.array([[0.5, -2], [1024, -0.0]], np.float32)
    expected: dict[str, Array] = {
        "half": x.astype(np.float16), "brain": x.astype(DTYPES["BF16"]), "full": x
    }  # fmt: skip
    request = Request("halves", (Input("x", x),))
    yield Case("outputs of FP16, BF16 and FP32 come together", request, expected)
    binary = replace(request, outputs=tuple(Output(name, binary=True) for name in expected))
    yield Case("outputs of FP16, BF16 and FP32 come as binary", binary, expected)
    mixed = (Output("full"), Output("half", binary=True))
    yield Case("an output in the encoding's form comes beside one in binary",
               replace(request, outputs=mixed),
               {name: expected[name] for name in ("full", "half")})  # fmt: skip
    yield Case("an output comes without its half precision neighbours",
               replace(request, outputs=(Output("full"),)), {"full": x})  # fmt: skip
    index = np.arange(len(TABLE), dtype=np.int64)[None]
    looked_up = Request("table", (Input("index", index),))
    yield Case("outputs that aren't finite come", looked_up, {"y": TABLE[index]})
    yield Case("outputs that aren't finite come as binary",
               replace(looked_up, outputs=(Output("y", binary=True),)),
               {"y": TABLE[index]})  # fmt: skip
    nothing = replace(PAIR, model="rows_fp32", inputs=(Input("x", pairs(1)[:, :0]),),
                      outputs=(Output("y", binary=True),))  # fmt: skip
    yield Case("an output of no byte comes as binary", nothing, {"y": pairs(1)[:, :0]})


# --- classification

SCORES = np.array([[0.5, 2, -1, 2, 1e-3], [-0.0, -5, 7.25, 100, 1e6]], np.float32)
COUNTS = np.array([[3, 1, 2, 5, 4], [-(2**63), 2**63 - 1, 0, 2**53 + 1, 2**53]])


def score_request(*outputs: Output, model: str = "scores") -> Request:
    return Request(model, (Input("x", SCORES), Input("n", COUNTS)), outputs)


def best_of(array: Array, k: int, labels: tuple[str, ...] = ()) -> Array:
    """The k best of each row [row, class] by plain sorting: "value:index:label", the lower index
    first of equals."""
    texts = []
    for row in array.tolist():
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))[:k]
        for index in order:
            value = f"{row[index]:.6f}" if isinstance(row[index], float) else f"{row[index]}"
            label = f":{labels[index]}" if labels else ""
            texts.append(f"{value}:{index}{label}")
    return text_array(texts, (len(array), min(k, array.shape[1])))


def _classifications() -> Iterator[Case]:
    for k, words in ((1, "the best class comes"), (3, "the three best classes come")):
        yield Case(f"{words} with their labels", score_request(Output("y", k)),
                   {"y": best_of(SCORES, k, LABELS)})  # fmt: skip
    yield Case("all classes come where more are asked for", score_request(Output("y", 1000)),
               {"y": best_of(SCORES, 5, LABELS)})  # fmt: skip
    yield Case("classes of integers come exactly and without labels",
               score_request(Output("m", 4)), {"m": best_of(COUNTS, 4)})  # fmt: skip
    both = score_request(Output("m"), Output("y", 2))
    yield Case("classes of one output come beside another output", both,
               {"m": COUNTS, "y": best_of(SCORES, 2, LABELS)})  # fmt: skip
    three = np.array([1.5, 3, -2], np.float32)
    yield Case("the best classes of a model without a batch dimension come",
               Request("fixed", (Input("x", three),), (Output("y", 2),)),
               {"y": best_of(-three[None], 2)[0]})  # fmt: skip
    index = np.arange(4)[None]
    infinite = text_array(["inf:2", "0.500000:0", "-0.000000:1", "-inf:3"], (1, 4))
    yield Case("classes come in text where scores are infinite",
               Request("table", (Input("index", index),), (Output("y", 4),)),
               {"y": infinite})  # fmt: skip


# --- transforms


def text_request(*texts: bytes | str) -> Request:
    return Request("sentences", (Input("text", text_array(texts, (len(texts), 1))),))


def sentences_by_hand(*texts: str) -> dict[str, Array]:
    """Ids by word, cut to the model's limit, and filled up with 0 to the longest row."""
    ids = [
        [WORDS.get(word, WORDS["[UNK]"]) for word in text.split()][:MAX_TOKENS] for text in texts
    ]
    real = np.zeros((len(texts), max(map(len, ids))), np.int64)
    for row, known in zip(real, ids, strict=True):
        row[: len(known)] = known
    return {"total": real.sum(1, keepdims=True), "real": real}


def _transforms() -> Iterator[Case]:
    best = np.argsort(-SCORES, 1, kind="stable")[:, :2]  # [row, rank]
    labels = np.array([label.encode() for label in LABELS], object)
    expected: dict[str, Array] = {
        "y": SCORES,
        "label": labels[best],
        "score": np.take_along_axis(SCORES, best, 1),
        "m": COUNTS,
    }
    everything = score_request(model="labelled")
    yield Case("labels and scores come behind the output that they are of", everything, expected)
    yield Case("labels come alone where only they are asked for",
               score_request(Output("label"), model="labelled"),
               {"label": expected["label"]})  # fmt: skip
    yield Case("classes have the labels of the transform",
               score_request(Output("y", 2), model="labelled"),
               {"y": best_of(SCORES, 2, LABELS)})  # fmt: skip
    sentences: dict[str, tuple[str, ...]] = {
        "a text becomes its tokens": ("the cat",),
        "texts of unequal length share a batch": ("the", "the cat sat", "sat sat"),
        "words that nobody knows are tokens too": ("the dog naïve",),
        "a text beyond the limit is cut": ("the cat sat " * 9,),
    }
    for words, texts in sentences.items():
        yield Case(words, text_request(*texts), sentences_by_hand(*texts))


# --- padding: the only cases that are compared with a tolerance


def masked_request(ids: Array, mask: Array | None = None) -> Request:
    inputs = (Input("ids", ids),) if mask is None else (Input("ids", ids), Input("mask", mask))
    return Request("masked", inputs)


def token_ids(n_rows: int, length: int) -> Array:
    """INT64[row, token], none of them what is filled up with."""
    return np.random.default_rng(length).integers(0, 5, (n_rows, length))


def padded_cases() -> list[Case]:
    """Lengths on and between the buckets. The engine adds up more terms than the request has, so
    the last bits may differ from numpy's."""
    lengths = {
        "fills a bucket": 4,
        "is filled up to a bucket": 5,
        "is a single token": 1,
        "fills the largest bucket": MAX_LENGTH,
        "is empty": 0,
    }
    cases = []
    for words, length in lengths.items():
        ids = token_ids(2, length)
        expected = masked_by_hand(ids, np.ones_like(ids))
        cases.append(Case(f"a row that {words} needs no mask", masked_request(ids), expected))
    ids = token_ids(2, 3)
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    cases.append(
        Case("a mask of the client's own counts", masked_request(ids, mask),
             masked_by_hand(ids, mask))
    )  # fmt: skip
    ones = masked_request(ids, np.ones_like(ids))
    expected = masked_by_hand(ids, np.ones_like(ids))
    cases.append(Case("a mask of ones is like none", ones, expected))
    pooled = replace(masked_request(ids), outputs=(Output("pooled"),))
    cases.append(Case("an output without a length isn't cut", pooled,
                      {"pooled": expected["pooled"]}))  # fmt: skip
    return cases
