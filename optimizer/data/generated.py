"""Generated: calibration samples made from the model itself, where the spec has no training data.

They are made when they are first read, and kept. How they are made is
`optimizer.training.generation`'s; this module imports no torch before that.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.data.splits import Samples
from optimizer.data.table import Labels
from optimizer.errors import SpecInvalid
from optimizer.model_source import read_signature, source_digest
from optimizer.spec import ModelSource, OnnxSource, TorchKind

DEFAULT_SAMPLES = 128
VERSION = "1"
"""Changes with anything that changes what is generated."""
NOTE = (
    "there is no data.train: ranges for int8 come from inputs that were generated from the model's "
    "batch-norm statistics, not from data"
)


@dataclass(frozen=True, eq=False)
class GeneratedSplit:
    """`n` samples of the model's one input, without labels."""

    model: TorchKind
    input_name: str
    shape: tuple[int, ...]
    n: int
    seed: int
    digest: str
    folder: Path | None = None
    """Where they are kept beyond this process."""
    name: str = "calibration"
    labels: Labels | None = None
    _made: list[NDArray[Any]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return self.n

    def read(self, indices: Sequence[int] | NDArray[np.integer] | None = None) -> Samples:
        """See `Split.read`. Raises ValueError where the model has no batch normalization."""
        if not self._made:
            self._made.append(self._kept())
        chosen = np.arange(self.n) if indices is None else np.asarray(indices, dtype=np.intp)
        return Samples({self.input_name: self._made[0][chosen]}, None, self.digest)

    def check(self, source: str) -> None:
        """Raises SpecInvalid where the model of the spec `source` has no statistics to go by."""
        from optimizer.torch_source import load_source
        from optimizer.training.generation import can_generate

        if not can_generate(load_source(self.model)):
            problem = (
                "data.train: missing, and calibration inputs can't be generated: the model has no "
                "batch normalization, from whose statistics they are made"
            )
            raise SpecInvalid(source, [problem])

    def _kept(self) -> NDArray[Any]:
        path = None if self.folder is None else self.folder / f"generated-{self.digest}.npy"
        if path is not None:
            try:
                found = np.load(path, allow_pickle=False)
            except (OSError, ValueError):
                found = None
            if found is not None and found.shape == (self.n, *self.shape):
                return np.asarray(found)
        made = self._generated()
        if path is not None:
            _write(path, made)
        return made

    def _generated(self) -> NDArray[Any]:
        from optimizer.torch_source import load_source
        from optimizer.training.generation import generate

        return generate(load_source(self.model), self.shape, self.n, self.seed)


def generated_split(
    model: ModelSource, source: str, wanted: int | None, seed: int
) -> GeneratedSplit:
    """Calibration samples for the model of the spec `source`. Raises SpecInvalid for a model for
    which none can be made, as far as its signature tells."""
    signature = read_signature(model)
    first = signature.inputs[0]
    problem = ""
    if isinstance(model, OnnxSource):
        problem = "and calibration inputs can only be generated for a torch model"
    elif len(signature.inputs) != 1 or first.datatype != "FP32":
        given = ", ".join(f"{one.name} {one.datatype}" for one in signature.inputs)
        problem = f"and inputs can only be generated for models with one of FP32, this has {given}"
    elif -1 in first.shape:
        problem = (
            f"and inputs of variable size can't be generated: {first.name} {list(first.shape)}"
        )
    if problem:
        raise SpecInvalid(source, [f"data.train: missing, {problem}"])
    assert not isinstance(model, OnnxSource)
    n = DEFAULT_SAMPLES if wanted is None else wanted
    content = f"generated {VERSION} {source_digest(model)} {n} {seed}"
    digest = hashlib.sha256(content.encode()).hexdigest()
    return GeneratedSplit(model, first.name, tuple(first.shape), n, seed, digest)


def _write(path: Path, array: NDArray[Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
