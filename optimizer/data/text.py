"""Texts to the numbers of their tokens, as the server makes them.

It translates `optimizer.spec.TextSpec` for `serve.transform`, whose code it calls, and knows no
files but the tokenizer's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.table import Indices, Labels
from optimizer.errors import SpecInvalid
from optimizer.spec import TextSpec
from serve.engines import EngineUnavailable
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.tensor import TensorSpec
from serve.transform.text import TextInput, TextStep, load_text

__all__ = ["Texts", "load_tokenizer", "preprocessing_of", "text_input"]

_NAME = "text"


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts, which make all inputs of a model. The hash is that of a text's UTF-8 bytes.

    Those that are read together are filled up to the longest of them, or to `max_length` where
    the spec says so; a mask, where the model takes one, tells tokens from what was filled in.
    """

    source: str
    texts: Sequence[bytes]
    labels: Labels | None
    n_classes: int | None
    spec: TextSpec
    tokenizer: TextStep
    first_row: int
    """Row of the first sample in its file, for errors."""
    classes: tuple[str, ...] | None = None

    @property
    def hashes(self) -> Sequence[bytes]:
        return [hashlib.sha256(text).digest() for text in self.texts]

    def read(self, indices: Indices) -> dict[str, NDArray[Any]]:
        """Each input [len(indices), length]. Raises SpecInvalid that names the row."""
        if not len(indices):
            empty = np.empty((0, 0), dtype=np.dtype(self.spec.datatype.lower()))
            return dict.fromkeys(self.spec.inputs, empty)
        try:
            return self.tokenizer.tensors([self.texts[int(index)] for index in indices])
        except InvalidRequest as error:
            raise SpecInvalid(self.source, [self._problem(indices, error)]) from error

    def _problem(self, indices: Indices, error: InvalidRequest) -> str:
        """The request's row becomes the file's."""
        _, _, place = error.field.partition("[")
        if not place:
            return f"{self.source}: {len(indices)} texts: got {error.got}, want {error.want}"
        row = self.first_row + int(indices[int(place.rstrip("]"))])
        return f"{self.source}: row {row}: got {error.got}, want {error.want}"


def load_tokenizer(spec: TextSpec) -> TextStep:
    """The server's tokenizing step. Raises SpecInvalid for a file that is no tokenizer, or without
    the library."""
    length = spec.max_length if spec.padding == "max_length" else -1
    inputs = {name: TensorSpec(name, spec.datatype, (-1, length)) for name in spec.inputs}
    try:
        return load_text(spec.tokenizer.parent, text_input(spec), inputs)
    except (ArtifactInvalid, EngineUnavailable) as error:
        raise SpecInvalid(str(spec.tokenizer), [f"data.text.tokenizer: {error}"]) from error


def text_input(spec: TextSpec, name: str = _NAME) -> TextInput:
    """What a manifest declares to have the server tokenize texts as `spec` says; the version's
    folder must hold the tokenizer's file under its own name."""
    return TextInput(
        name=name,
        file=spec.tokenizer.name,
        ids=spec.ids,
        max_length=spec.max_length,
        mask=spec.mask,
        types=spec.types,
    )


def preprocessing_of(spec: TextSpec) -> str:
    """All that decides what tensors texts become, for digests: with the tokenizer's content in
    place of its path."""
    content = hashlib.sha256(spec.tokenizer.read_bytes()).hexdigest()
    return f"{spec.model_dump_json(exclude={'tokenizer', 'column'})} {content}"
