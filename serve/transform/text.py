"""Text: UTF-8 to the numbers of its tokens, a mask and segments.

A request's rows are filled up to its longest one; lengths that batches share are
`serve.padding`'s matter. It doesn't know a request's other inputs, nor who declares.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from serve.engines import EngineUnavailable
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.tensor import NUMPY_DTYPES, Array, TensorSpec
from serve.transform.checks import Check, Problem, first_problem
from serve.transform.rows import allocated

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

DATATYPES = ("INT64", "INT32")
"""Of the engine's inputs."""
MAX_LENGTH = 1_048_576
"""Of `max_length`, in tokens."""
MAX_TEXT_BYTES = 262_144
"""Of a row: all of it is tokenized before it is truncated."""
MAX_TOKENIZER_BYTES = 128_000_000
PAD_TOKENS = ("[PAD]", "<pad>")
"""What the vocabularies of BERT and of RoBERTa, T5 and their kin call it, in whose files a padding
is often not configured."""


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """The public input `name`, BYTES [row, 1] of UTF-8 text, becomes the engine's `ids` and, where
    it has them, `mask` (1 for tokens, 0 for what was filled in) and `types` (segments), each
    [row, token]. `file` is a tokenizer.json; texts of more than `max_length` tokens, special ones
    included, are truncated."""

    name: str
    file: str
    ids: str
    max_length: int
    mask: str | None = None
    types: str | None = None
    kind: Literal["text"] = "text"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The engine's inputs that are made."""
        return tuple(self.parts.values())

    @property
    def parts(self) -> dict[str, str]:
        """Those of the fields `ids`, `mask` and `types` that are declared."""
        names = {"ids": self.ids, "mask": self.mask, "types": self.types}
        return {field: name for field, name in names.items() if name is not None}

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,)

    def problem(self) -> Problem | None:
        """What is out of bounds by itself."""
        return first_problem(self._checks())

    def misfit(self, inputs: Mapping[str, TensorSpec]) -> Problem | None:
        """What doesn't fit the engine's inputs."""
        return first_problem(self._fits(inputs))

    def _checks(self) -> Iterator[Check]:
        yield "file", self.file, bool(self.file), "the name of a tokenizer.json"
        fits = 1 <= self.max_length <= MAX_LENGTH
        yield "max_length", self.max_length, fits, f"1 to {MAX_LENGTH}"

    def _fits(self, inputs: Mapping[str, TensorSpec]) -> Iterator[Check]:
        for field, name in self.parts.items():
            yield field, name, name in inputs, f"one of {', '.join(inputs)}"
            spec = inputs[name]
            known = spec.datatype in DATATYPES
            yield field, spec.datatype, known, f"an input of one of {', '.join(DATATYPES)}"
            shape, length = list(spec.shape), inputs[self.ids].shape[-1]
            fits = len(shape) == 2 and shape[1] == length
            yield field, shape, fits, f"an input of [-1, {length}]"
        fits = length == -1 or self.max_length <= length
        yield "max_length", self.max_length, fits, f"at most {length}, the length of {self.ids!r}"


@dataclass(frozen=True, eq=False)
class TextStep:
    """A declared text input at work; from any number of threads at a time, since the tokenizer is
    never configured again once it is loaded."""

    spec: TextInput
    tokenizer: "Tokenizer"
    inputs: Mapping[str, TensorSpec]
    fill_values: Mapping[str, int]
    """What each input is filled up with behind a row's tokens."""

    def tensors(self, rows: Sequence[bytes]) -> dict[str, Array]:
        """The engine's inputs. Raises InvalidRequest that names the row."""
        texts = [self._tokens(row, text) for row, text in enumerate(rows)]
        # An engine with a fixed length takes no other.
        fixed = self.inputs[self.spec.ids].shape[1]
        shape = (len(rows), max(fixed, *(len(tokens[self.spec.ids]) for tokens in texts)))
        tensors = {}
        for name, value in self.fill_values.items():
            tensor = allocated(self.spec.name, shape, NUMPY_DTYPES[self.inputs[name].datatype])
            tensor.fill(value)
            for row, tokens in enumerate(texts):
                tensor[row, : len(tokens[name])] = tokens[name]
            tensors[name] = tensor
        return tensors

    def _tokens(self, row: int, text: bytes) -> dict[str, Array]:
        """Arrays, not the encoding: it holds what was truncated as well."""
        encoding = self._encoded(f"inputs.{self.spec.name}[{row}]", text)
        values = {"ids": encoding.ids, "mask": encoding.attention_mask, "types": encoding.type_ids}
        return {
            name: np.array(values[field], NUMPY_DTYPES[self.inputs[name].datatype])
            for field, name in self.spec.parts.items()
        }

    def _encoded(self, field: str, text: bytes) -> "Encoding":
        if len(text) > MAX_TEXT_BYTES:
            raise InvalidRequest(field, f"{len(text)} bytes", f"at most {MAX_TEXT_BYTES}")
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            got = f"byte 0x{text[error.start]:02x} at {error.start}"
            raise InvalidRequest(field, got, "UTF-8 text") from error
        # One text at a time, in this thread and without the interpreter's lock: batches would start
        # a thread on every core, beside those of the engine's instances.
        try:
            encoding = self.tokenizer.encode(decoded)
        except Exception as error:
            if type(error) is not Exception:  # the library's own are of no narrower class
                raise
            want = "text that the model's tokenizer can encode"
            raise InvalidRequest(field, str(error), want) from error
        if not encoding.ids:
            raise InvalidRequest(field, f"{len(text)} bytes of no token", "at least one token")
        return encoding


def load_text(directory: Path, spec: TextInput, inputs: Mapping[str, TensorSpec]) -> TextStep:
    """Make ready what `spec` declares, which fits `inputs`. Raises ArtifactInvalid for a file that
    is no tokenizer, EngineUnavailable without the library."""
    path = directory / spec.file
    tokenizer = _read_tokenizer(path, spec.name)
    n_special = tokenizer.num_special_tokens_to_add(False)
    if spec.max_length <= n_special:
        raise ArtifactInvalid(
            str(path), f"adds {n_special} special tokens, max_length {spec.max_length} wants fewer"
        )
    fill_values = _fill_values(tokenizer, spec)
    direction = (tokenizer.truncation or {}).get("direction", "right")
    tokenizer.enable_truncation(spec.max_length, direction=direction)
    tokenizer.no_padding()
    return TextStep(spec, tokenizer, {name: inputs[name] for name in spec.tensors}, fill_values)


def _read_tokenizer(path: Path, name: str) -> "Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EngineUnavailable(
            f"texts of input {name!r} can't be tokenized ({error}); pip install 'trimserve[text]'"
        ) from error
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOKENIZER_BYTES + 1)
        if len(content) > MAX_TOKENIZER_BYTES:
            raise ArtifactInvalid(str(path), f"over {MAX_TOKENIZER_BYTES} bytes")
        return Tokenizer.from_buffer(content)
    except OSError as error:
        raise ArtifactInvalid(str(path), error.strerror or str(error)) from error
    except ValueError as error:
        raise ArtifactInvalid(str(path), f"not a tokenizer.json: {error}") from error


def _fill_values(tokenizer: "Tokenizer", spec: TextInput) -> dict[str, int]:
    segment = (tokenizer.padding or {}).get("pad_type_id", 0)
    values = {"ids": _pad_id(tokenizer), "mask": 0, "types": segment}
    return {name: values[field] for field, name in spec.parts.items()}


def _pad_id(tokenizer: "Tokenizer") -> int:
    if tokenizer.padding is not None:
        configured: int = tokenizer.padding["pad_id"]
        return configured
    known = (tokenizer.token_to_id(token) for token in PAD_TOKENS)
    return next((number for number in known if number is not None), 0)
