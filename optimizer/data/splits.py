"""The four disjoint sets of a study: train, calibration (part of train), validation, test.

They are made of tables; this module knows about overlap, labels and digests, not about files.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.data.arrays import call_importable, read_npz
from optimizer.data.image_folder import read_folder
from optimizer.data.parquet import read_columns, read_images, read_texts
from optimizer.data.table import Indices, Labels, RowsMissing, Table
from optimizer.data.text import preprocessing_of
from optimizer.errors import SpecInvalid
from optimizer.spec import DataSpec, SplitSpec, TextSpec

DEFAULT_CALIBRATION_SAMPLES = 512
_SOURCE = "data"
_ORDER = ("train", "calibration", "validation", "test")


@dataclass(frozen=True, eq=False)
class Samples:
    """Decoded samples; n may be 0."""

    inputs: Mapping[str, NDArray[Any]]
    """Model input → [n, *shape], preprocessed; float32 for images and floats."""
    labels: Labels | None
    """int64 [n], or None where the data has no labels."""
    digest: str
    """As `Split.digest`, of these samples in this order."""


class Split(Protocol):
    """A set of samples that are decoded when they are asked for."""

    @property
    def name(self) -> str:
        """train, calibration, validation or test."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the ordered hashes of raw samples, their labels and the
        preprocessing: equal digests mean equal samples."""

    @property
    def labels(self) -> Labels | None:
        """int64 [n], without decoding anything."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | NDArray[np.integer] | None = None) -> Samples:
        """Decode the samples at `indices` of this split, in that order; all without.

        Nothing is kept: who needs samples again holds on to them. Raises SpecInvalid for a
        sample that can't be decoded, IndexError for one that isn't there.
        """


@dataclass(frozen=True, eq=False)
class TableSplit:
    """Some rows of a table, in a given order."""

    name: str
    table: Table
    rows: Indices
    hashes: tuple[bytes, ...]
    """Of these rows, in their order."""
    preprocessing: str

    @property
    def labels(self) -> Labels | None:
        return None if self.table.labels is None else self.table.labels[self.rows]

    @cached_property
    def digest(self) -> str:
        return self._digest(np.arange(len(self)))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int] | NDArray[np.integer] | None = None) -> Samples:
        if indices is None:
            chosen = np.arange(len(self), dtype=np.intp)
        else:
            chosen = np.asarray(indices, dtype=np.intp)
        rows = self.rows[chosen]
        labels = None if self.table.labels is None else self.table.labels[rows]
        return Samples(self.table.read(rows), labels, self._digest(chosen))

    def subset(self, name: str, indices: Indices) -> "TableSplit":
        """The samples at `indices`, as a split of its own."""
        hashes = tuple(self.hashes[index] for index in indices)
        return TableSplit(name, self.table, self.rows[indices], hashes, self.preprocessing)

    def _digest(self, indices: Indices) -> str:
        digest = hashlib.sha256(self.preprocessing.encode())
        labels = self.table.labels
        for index in indices:
            digest.update(self.hashes[index])
            if labels is not None:
                digest.update(labels[self.rows[index]].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class DataSplits:
    """All data of a study. Train, validation and test share no sample."""

    train: Split | None
    """None where the spec has no training data."""
    calibration: Split
    validation: Split
    test: Split
    digest: str
    """SHA-256 (hex) over the digests of the four."""
    n_classes: int
    """Labels are below it; 0 where the data has no labels."""
    n_dropped: Mapping[str, int]
    """Split → samples left out since they are in another split too (`data.overlap: drop`)."""
    n_duplicates: Mapping[str, int]
    """Split → samples that equal an earlier one of the same split. They are kept, since they
    leak nothing, but a confidence bound over them takes them for independent."""


def load_splits(
    data: DataSpec, input_names: Sequence[str], seed: int, generated: Split | None = None
) -> DataSplits:
    """Read, hash and divide the data; `input_names` are the model's inputs, `generated` the
    calibration samples of a spec without training data.

    Raises SpecInvalid for files that can't be read, labels that don't fit, or overlap.
    """
    _check_inputs(data, input_names)
    tables: dict[str, Table] = {}
    given = {"train": data.train, "validation": data.validation, "test": data.test}
    for name, spec in given.items():
        if spec is not None:
            classes = next(iter(tables.values())).classes if tables else None
            with _named(name):
                tables[name] = _table(spec, data, input_names, classes)
    preprocessing = _preprocessing(data)
    splits = {name: _whole(name, table, preprocessing) for name, table in tables.items()}
    n_classes = _n_classes(splits, data.n_classes)
    separate, n_dropped = _separated(splits, data.overlap)
    calibration = generated
    if "train" in separate:
        calibration = _calibration(separate["train"], data.calibration_samples, seed)
    assert calibration is not None, "who leaves out train gives generated samples"
    named: dict[str, Split] = {**separate, "calibration": calibration}
    combined = "".join(named[name].digest for name in _ORDER if name in named)
    return DataSplits(
        train=named.get("train"),
        calibration=calibration,
        validation=named["validation"],
        test=named["test"],
        digest=hashlib.sha256(combined.encode()).hexdigest(),
        n_classes=n_classes,
        n_dropped=n_dropped,
        n_duplicates={
            name: len(split) - len(set(split.hashes)) for name, split in separate.items()
        },
    )


def _check_inputs(data: DataSpec, input_names: Sequence[str]) -> None:
    unknown = sorted(set(data.columns.inputs) - set(input_names))
    known = ", ".join(input_names)
    problems = [
        f"data.columns.inputs: got '{name}', want an input of the model: {known}"
        for name in unknown
    ]
    if data.image is not None and len(input_names) != 1:
        problems.append(f"data.image: want a model with one input, it has {known}")
    if data.text is not None:
        problems += _text_problems(data.text, input_names)
    if problems:
        raise SpecInvalid(_SOURCE, problems)


def _text_problems(text: TextSpec, input_names: Sequence[str]) -> list[str]:
    """Every input is made of the text, and nothing else is."""
    made, known = ", ".join(text.inputs), ", ".join(input_names)
    if set(text.inputs) == set(input_names):
        return []
    return [
        f"data.text: makes {made}, want all inputs of the model and no other ({known}): "
        "set ids, mask and types"
    ]


@contextmanager
def _named(split: str) -> Iterator[None]:
    """Problems that don't begin with a key of the spec do with the split's."""
    try:
        yield
    except RowsMissing as error:
        problem = f"data.{split}.rows: {error.problem}"
        raise SpecInvalid(error.source, [problem]) from error
    except SpecInvalid as error:
        problems = [
            problem if problem.startswith("data.") else f"data.{split}: {problem}"
            for problem in error.problems
        ]
        raise SpecInvalid(error.source, problems) from error


def _table(
    spec: SplitSpec, data: DataSpec, input_names: Sequence[str], classes: Sequence[str] | None
) -> Table:
    """`classes` are train's, where it names any."""
    if spec.call is not None:
        return call_importable(spec.call, spec.rows, data.image, input_names)
    assert spec.path is not None
    path, rows, columns = spec.path, spec.rows, data.columns
    if data.format == "numpy":
        return read_npz(path, rows, columns, data.image, input_names)
    if data.format == "image_folder":
        assert data.image is not None
        has_labels = columns.label is not None
        return read_folder(
            path, rows, data.image, input_names[0], has_labels=has_labels, classes=classes
        )
    if data.image is not None:
        return read_images(path, rows, columns, data.image, input_names[0])
    if data.text is not None:
        return read_texts(path, rows, columns, data.text)
    return read_columns(path, rows, columns, input_names)


def _preprocessing(data: DataSpec) -> str:
    if data.text is not None:
        return preprocessing_of(data.text)
    return data.image.model_dump_json() if data.image is not None else ""


def _whole(name: str, table: Table, preprocessing: str) -> TableSplit:
    hashes = tuple(table.hashes)
    return TableSplit(name, table, np.arange(len(hashes), dtype=np.intp), hashes, preprocessing)


def _n_classes(splits: Mapping[str, TableSplit], given: int | None) -> int:
    """How many classes there are; every label must be one of them.

    As given, or as the training file names them, or one more than its largest label; without
    training data validation's.
    """
    labels = {name: split.labels for name, split in splits.items()}
    without = [name for name, values in labels.items() if values is None]
    if len(without) == len(labels):
        return 0
    if without:
        raise SpecInvalid(
            _SOURCE, [f"data.{name}: has no labels, though others have" for name in without]
        )
    first = next(iter(splits))
    own = labels[first]
    assert own is not None
    if len(np.unique(own)) < 2:
        raise SpecInvalid(
            _SOURCE, [f"data.{first}: every label is {own[0]}, want at least 2 classes"]
        )
    n_classes = given or splits[first].table.n_classes or int(own.max()) + 1
    problems = [
        f"data.{name}: got the label {outside[0]} at sample "
        f"{int(np.flatnonzero(values == outside[0])[0])} ({len(outside)} in all), "
        f"want 0 to {n_classes - 1}: correct it, or set data.n_classes"
        for name, values in labels.items()
        if values is not None and len(outside := values[(values < 0) | (values >= n_classes)])
    ]
    if problems:
        raise SpecInvalid(_SOURCE, problems)
    return n_classes


def _separated(
    splits: Mapping[str, TableSplit], overlap: str
) -> tuple[dict[str, TableSplit], dict[str, int]]:
    """Splits without what they share with a later one, and how many samples that were."""
    order = tuple(splits)
    shared = {
        (name, other): _n_shared(splits[name], splits[other])
        for index, name in enumerate(order)
        for other in order[index + 1 :]
    }
    problems = [
        f"data: {count} samples of {name} are in {other} too, want disjoint splits: "
        "correct rows or files, or leave them out of the former by data.overlap: drop"
        for (name, other), count in shared.items()
        if count
    ]
    if problems and overlap == "refuse":
        raise SpecInvalid(_SOURCE, problems)
    later: set[bytes] = set()
    separate, n_dropped = {}, {}
    for name in reversed(order):
        split = splits[name]
        keep = [index for index, sample in enumerate(split.hashes) if sample not in later]
        if not keep:
            raise SpecInvalid(_SOURCE, [f"data.{name}: every sample is in a later split too"])
        separate[name] = split.subset(name, np.asarray(keep, dtype=np.intp))
        n_dropped[name] = len(split) - len(keep)
        later |= set(split.hashes)
    return separate, n_dropped


def _n_shared(split: TableSplit, other: TableSplit) -> int:
    counts = Counter(split.hashes)
    return sum(counts[sample] for sample in counts.keys() & set(other.hashes))


def _calibration(train: TableSplit, wanted: int | None, seed: int) -> TableSplit:
    n_samples = min(DEFAULT_CALIBRATION_SAMPLES, len(train)) if wanted is None else wanted
    if n_samples > len(train):
        raise SpecInvalid(
            _SOURCE,
            [f"data.calibration_samples: got {n_samples}, want at most train's {len(train)}"],
        )
    chosen = np.random.default_rng(seed).choice(len(train), n_samples, replace=False)
    return train.subset("calibration", np.sort(chosen).astype(np.intp))
