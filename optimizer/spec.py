"""The optimization spec: model, data, objective and budget, read from a YAML file.

Reading resolves paths and checks that the files are there; it imports no user code and opens
neither model nor data (`optimizer.model_source` and `optimizer.data` do that).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from loadtest.document import DocumentInvalid, Strict, read_document
from loadtest.slo import PositiveFloat, Slo, read_slo
from optimizer.architecture.options import ArchitectureSpec
from optimizer.errors import SpecInvalid
from optimizer.importable import Importable
from optimizer.spec_values import (
    ExistingFile,
    ExistingPath,
    FunctionName,
    Name,
    Share,
    Weights,
    listed,
    within,
)
from serve.transform.text import MAX_LENGTH

if TYPE_CHECKING:
    import torch

Objective = Literal["cost", "latency", "size", "energy"]
TechniqueName = Literal[
    "sparsity_training", "pruning", "decomposition", "recovery", "quantization_aware_training",
    "quantization", "compilation", "torch_compilation",
]  # fmt: skip
TECHNIQUES: tuple[TechniqueName, ...] = (
    "sparsity_training", "pruning", "decomposition", "recovery", "quantization_aware_training",
    "quantization", "compilation", "torch_compilation",
)  # fmt: skip
"""Those that a spec can name, in the order of a recipe's stages."""
_BY_DEFAULT: tuple[TechniqueName, ...] = ("quantization", "compilation", "torch_compilation")
"""What trains nothing."""
_STRUCTURAL: tuple[TechniqueName, ...] = ("pruning", "decomposition")
"""What changes the network, which recovery then trains."""
Datatype = Literal[
    "BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"
]  # Open Inference Protocol


class InputSpec(Strict):
    """A model input; `shape` is without the batch axis, -1 for an axis of variable length."""

    name: Name
    datatype: Datatype = "FP32"
    shape: Annotated[tuple[int, ...], BeforeValidator(listed)]

    @field_validator("shape")
    @classmethod
    def _axes_are_lengths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(axis < 1 and axis != -1 for axis in value):
            raise ValueError("want axes of at least 1, or -1 where the length varies")
        return value


class OutputSpec(Strict):
    """A model output, in the order in which `forward` returns them."""

    name: Name


@dataclass(frozen=True)
class TorchSource:
    """A torch model that can be built again in any process: a factory and its weights."""

    factory: Importable
    weights: Path
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]


@dataclass(frozen=True)
class ExportedSource:
    """A torch model as an archive of `torch.export`. Empty `inputs` or `outputs` mean those of
    the program; read them by `optimizer.model_source.read_signature`."""

    path: Path
    inputs: tuple[InputSpec, ...] = ()
    outputs: tuple[OutputSpec, ...] = ()


@dataclass(frozen=True, eq=False)
class ModuleSource:
    """A torch model given as an object from Python; it is copied before anything is done to it.
    Only this process has it: NOT_RESUMABLE is what the result has to say."""

    module: "torch.nn.Module"
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]


NOT_RESUMABLE = (
    "the model was given as an object: the study can't be resumed in another process; name a "
    "factory in the spec for that"
)


@dataclass(frozen=True)
class OnnxSource:
    """A model that exists only as ONNX; its signature is read from the file."""

    path: Path


TorchKind = TorchSource | ExportedSource | ModuleSource
ModelSource = TorchKind | OnnxSource


class ModelSection(Strict):
    """The key `model`: `factory`, `weights`, `inputs`, `outputs`; or `exported`, with `inputs`
    and `outputs` to name them otherwise; or `onnx` alone."""

    factory: FunctionName | None = None
    weights: Weights | None = None
    inputs: Annotated[tuple[InputSpec, ...], BeforeValidator(listed)] = ()
    outputs: Annotated[tuple[OutputSpec, ...], BeforeValidator(listed)] = ()
    exported: ExistingFile | None = None
    """It can carry code and is trusted as the factory is."""
    onnx: ExistingFile | None = None

    @field_validator("inputs", "outputs")
    @classmethod
    def _names_are_distinct(
        cls, value: tuple[InputSpec | OutputSpec, ...]
    ) -> tuple[InputSpec | OutputSpec, ...]:
        names = [tensor.name for tensor in value]
        if len(set(names)) < len(names):
            raise ValueError("want every tensor name once")
        return value

    @field_validator("exported")
    @classmethod
    def _is_an_archive(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix != ".pt2":
            raise ValueError("want a .pt2 file, as torch.export.save(program, path) writes it")
        return value

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        torch_keys = ("factory", "weights", "inputs", "outputs")
        given = [key for key in torch_keys if getattr(self, key)]
        if self.onnx is not None and (given or self.exported is not None):
            raise ValueError(f"want either onnx or exported or {', '.join(torch_keys)}, not both")
        if self.exported is not None and {"factory", "weights"} & set(given):
            raise ValueError("want either exported or factory and weights, not both")
        missing = [key for key in torch_keys if key not in given]
        if self.onnx is None and self.exported is None and missing:
            raise ValueError(f"want {', '.join(missing)} (or exported, or onnx alone)")
        return self

    def source(self) -> ModelSource:
        """The model as one of the kinds that a file can name."""
        if self.onnx is not None:
            return OnnxSource(self.onnx)
        if self.exported is not None:
            return ExportedSource(self.exported, self.inputs, self.outputs)
        assert self.factory is not None
        assert self.weights is not None
        return TorchSource(self.factory, self.weights, self.inputs, self.outputs)


class SplitSpec(Strict):
    """Where the samples of one split are: a file, a folder or a function, and which of its rows."""

    path: ExistingPath | None = None
    call: FunctionName | None = None
    rows: Annotated[tuple[int, int], BeforeValidator(listed)] | None = None
    """Half-open [start, stop), counted from 0; without it all rows."""

    @field_validator("rows")
    @classmethod
    def _rows_are_a_range(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError("want [start, stop] with 0 <= start < stop")
        return value

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.path is None) == (self.call is None):
            raise ValueError("want either path or call")
        return self


class Columns(Strict):
    """Names of columns (parquet) or arrays (.npz), where they aren't the model's own."""

    inputs: dict[str, str] = Field(default_factory=dict)
    """Model input → column. An input that isn't listed is read from the column of its name."""
    label: str | None = "label"
    """Integer class labels; of an image folder they are its subfolders, whatever the name. None:
    the data has no labels, and variants are judged by how faithful they are to the base."""

    def of_input(self, name: str) -> str:
        return self.inputs.get(name, name)


class ImageSpec(Strict):
    """Preprocessing of images: pixels / 255, less `mean`, by `std`; float32 [channel, y, x].

    One mean makes images grey, three make them RGB. `resize` scales the short side to that many
    pixels; `size` [height, width] is a centre crop, for which an image is first scaled to just
    cover it unless `resize` is given.
    """

    mean: Annotated[tuple[float, ...], BeforeValidator(listed)]
    std: Annotated[tuple[PositiveFloat, ...], BeforeValidator(listed)]
    resize: int | None = Field(default=None, ge=1, le=4096)
    size: Annotated[tuple[int, int], BeforeValidator(listed)] | None = None

    @field_validator("mean")
    @classmethod
    def _channels_are_grey_or_rgb(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (1, 3):
            raise ValueError("want 1 (grey) or 3 (RGB) values")
        return value

    @field_validator("size")
    @classmethod
    def _size_is_bounded(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not all(1 <= axis <= 4096 for axis in value):
            raise ValueError("want [height, width] of 1 to 4096")
        return value

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        if len(self.std) != len(self.mean):
            raise ValueError(f"want as many values in std as in mean ({len(self.mean)})")
        if self.resize is not None and self.size is not None and self.resize < max(self.size):
            raise ValueError("want resize to be at least the longer side of size")
        return self


class TextSpec(Strict):
    """How texts become inputs: by a tokenizer, as the server tokenizes them
    (`serve.transform.text.TextInput`)."""

    tokenizer: ExistingFile
    """A tokenizer.json of the `tokenizers` library."""
    max_length: int = Field(ge=1, le=MAX_LENGTH)
    """Tokens, special ones included; longer texts are truncated."""
    column: Name = "text"
    ids: Name = "input_ids"
    """The model's input that takes the numbers of tokens."""
    mask: Name | None = None
    """The one that takes 1 for tokens and 0 for what was filled in."""
    types: Name | None = None
    """The one that takes segments."""
    datatype: Literal["INT64", "INT32"] = "INT64"
    """Of those inputs."""
    padding: Literal["longest", "max_length"] = "longest"
    """Texts that are read together are filled up to the longest of them, or always to
    `max_length`, for models with a fixed length."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model's inputs that are made of a text."""
        return tuple(name for name in (self.ids, self.mask, self.types) if name is not None)

    @model_validator(mode="after")
    def _inputs_are_distinct(self) -> Self:
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError("want different inputs in ids, mask and types")
        return self


class DataSpec(Strict):
    """Three disjoint sets of samples: to learn from, to choose by, and to report once."""

    format: Literal["parquet", "numpy", "image_folder", "importable"]
    train: SplitSpec | None = None
    """Without it calibration samples are generated from the model, and nothing can be trained."""
    validation: SplitSpec
    test: SplitSpec
    columns: Columns = Columns()
    image: ImageSpec | None = None
    """How images become inputs. Columns of a parquet file are images with it; arrays are taken as
    they are without it, and as uint8 [n, y, x] or [n, y, x, channel] images with it."""
    text: TextSpec | None = None
    """How texts of a parquet file become inputs."""
    n_classes: int | None = Field(default=None, ge=2, le=1_000_000)
    """Without it: the names of the label's classes in the file, the subfolders of train, or the
    largest label of train and one."""
    calibration_samples: int | None = Field(default=None, ge=1)
    """Drawn from train by the spec's seed. Without it 512, or all of a smaller train split; 128
    where they are generated."""
    overlap: Literal["refuse", "drop"] = "refuse"
    """Of a sample in two splits: an error, or leave it out of train (first) or validation;
    test always stays whole."""

    @model_validator(mode="after")
    def _origins_fit_the_format(self) -> Self:
        wanted = "call" if self.format == "importable" else "path"
        kind = "folder" if self.format == "image_folder" else "file"
        for name in ("train", "validation", "test"):
            split: SplitSpec | None = getattr(self, name)
            if split is None:
                continue
            if getattr(split, wanted) is None:
                raise ValueError(f"want {wanted} in {name} for the format {self.format}")
            if split.path is not None and split.path.is_dir() != (kind == "folder"):
                raise ValueError(f"want a {kind} as {name}.path for the format {self.format}")
        return self

    @model_validator(mode="after")
    def _preprocessing_fits_the_format(self) -> Self:
        if self.format == "image_folder" and self.image is None:
            raise ValueError("want image (mean, std) for the format image_folder")
        if self.text is not None and self.format != "parquet":
            raise ValueError(f"want no text for the format {self.format}: it is parquet's")
        if self.text is not None and self.image is not None:
            raise ValueError("want either image or text, not both")
        return self


class TaskSpec(Strict):
    """What accuracy means: see `optimizer.tasks`."""

    kind: Literal["classification", "embedding", "custom"] = "classification"
    metric: FunctionName | None = None
    """With custom: a function of outputs and labels that scores each sample."""
    output: Name | None = None
    """The output that is scored. Without it the model's first; a custom metric gets all."""
    range: Annotated[tuple[float, float], BeforeValidator(listed)] = (0.0, 1.0)
    """With custom: the lowest and the highest score that the metric can give."""

    @field_validator("range")
    @classmethod
    def _range_is_finite(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not -math.inf < value[0] < value[1] < math.inf:
            raise ValueError("want [low, high], finite numbers with low < high")
        return value

    @model_validator(mode="after")
    def _metric_fits_the_kind(self) -> Self:
        if self.kind == "custom" and self.metric is None:
            raise ValueError("want metric for the kind custom: 'module:function'")
        given = [name for name in ("metric", "range") if name in self.model_fields_set]
        if self.kind != "custom" and given:
            raise ValueError(f"want {' and '.join(given)} only for the kind custom")
        return self


class Budget(Strict):
    """When the search stops: at the first of both."""

    wall_clock_s: PositiveFloat
    trials: int = Field(ge=1, le=1_000_000)
    training_epochs: float | None = Field(default=None, ge=0)
    """Passes over the train split that techniques may spend on training. Without it as many as
    the time allows."""
    trials_at_once: int = Field(default=1, ge=1, le=64)
    """That are proposed together and run at the same time, as far as there are places."""


class TrainingSpec(Strict):
    """How techniques train: see docs/techniques.md. Of what lists several values the first is the
    default, and the others are searched."""

    epochs: float = Field(default=5.0, ge=0, le=10_000)
    """Passes over train of a full training; 0 for recalibration alone."""
    short_epochs: float = Field(default=0.5, ge=0, le=10_000)
    """Of the short one, which tells what a full one is worth."""
    batch_size: int = Field(default=128, ge=2, le=65_536)
    optimizer: Literal["sgd", "adamw"] | None = None
    """Without it sgd for networks with batch normalization, adamw for others."""
    learning_rate: PositiveFloat | None = None
    """The peak. Without it 0.02 for sgd, 0.0003 for adamw."""
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    augmentation: Literal["none", "flip", "flip_and_crop", "swap_spans"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    embeddings: Literal["kept", "trained"] = "kept"
    """Whether tables of embeddings that are the base's own stand still while the rest learns."""
    patience: int = Field(default=0, ge=0, le=1000)
    """Epochs without a better loss on a held-out part of train after which training ends, with the
    best epoch's weights; 0 for all epochs."""
    reconstruction_samples: int = Field(default=512, ge=0, le=1_000_000)
    """Of train, to which recovery fits layers that read less than before; 0 for none."""
    losses: Annotated[
        tuple[Literal["answers", "dist", "attention", "feature", "hidden", "relational"], ...],
        BeforeValidator(listed),
        Field(min_length=1),
    ] = ("answers", "dist")
    alphas: Annotated[tuple[Share, ...], BeforeValidator(listed), Field(min_length=1)] = (0.1, 0.5)
    """Share of the labels' loss, for classification with labels."""
    temperatures: Annotated[
        tuple[PositiveFloat, ...], BeforeValidator(listed), Field(min_length=1)
    ] = (4.0, 2.0)
    pruning_rounds: int = Field(default=1, ge=1, le=100)
    """In which pruning takes channels, with a training between each and the next; 1 for all at
    once."""
    pruning_round_epochs: float = Field(default=1.0, gt=0, le=10_000)
    """Passes over train of each of those trainings."""
    sparsity_epochs: float = Field(default=5.0, gt=0, le=10_000)
    """Passes over train of sparsity training, which comes before pruning."""
    sparsity_forms: Annotated[
        tuple[Literal["group", "l1"], ...], BeforeValidator(listed), Field(min_length=1)
    ] = ("group", "l1")
    sparsity_strengths: Annotated[
        tuple[PositiveFloat, ...], BeforeValidator(listed), Field(min_length=1)
    ] = (0.01, 0.001)

    @model_validator(mode="after")
    def _values_fit_each_other(self) -> Self:
        if self.short_epochs > self.epochs:
            raise ValueError(f"want short_epochs of at most epochs ({self.epochs:g})")
        for name in (
            "losses", "alphas", "temperatures", "sparsity_forms", "sparsity_strengths",
        ):  # fmt: skip
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"want every value once in {name}")
        return self


class StudentSpec(Strict):
    """A smaller network that the base teaches."""

    factory: FunctionName
    weights: Weights | None = None
    """Without it as the factory draws them, by the seed."""


class Techniques(Strict):
    """Which techniques recipes may be made of."""

    include: Annotated[tuple[TechniqueName, ...], BeforeValidator(listed)] = _BY_DEFAULT
    exclude: Annotated[tuple[TechniqueName, ...], BeforeValidator(listed)] = ()
    plugins: Annotated[tuple[FunctionName, ...], BeforeValidator(listed)] = ()
    """Techniques of the user's own, `module:Class` by the contract of `optimizer.techniques`."""
    student: StudentSpec | None = None
    architecture: ArchitectureSpec | None = None

    @property
    def enabled(self) -> tuple[TechniqueName, ...]:
        """Included and not excluded, in the order of a recipe's stages; recovery also where what
        needs it is there, unless it is excluded."""
        others = self.student is not None or self.architecture is not None
        needs_recovery = others or set(_STRUCTURAL) & set(self.include)
        wanted = {*self.include, *(("recovery",) if needs_recovery else ())}
        return tuple(name for name in TECHNIQUES if name in wanted and name not in self.exclude)

    @property
    def named(self) -> tuple[str, ...]:
        """Those of ours that the author has asked for."""
        listed = self.include if "include" in self.model_fields_set else ()
        keys = [key for key in ("student", "architecture") if getattr(self, key) is not None]
        return (*listed, *keys)

    @model_validator(mode="after")
    def _lists_dont_contradict(self) -> Self:
        both = "include" in self.model_fields_set and set(self.include) & set(self.exclude)
        if both:
            raise ValueError(f"want {', '.join(sorted(both))} in include or exclude, not both")
        if "compilation" not in self.enabled:
            raise ValueError("want compilation among those left: it makes what the server runs")
        if self.architecture is not None and "recovery" not in self.enabled:
            raise ValueError("want recovery among those left: architecture's networks need it")
        if "quantization_aware_training" in self.enabled and "quantization" not in self.enabled:
            raise ValueError(
                "want quantization among those left: quantization_aware_training prepares for it"
            )
        searched = self.architecture.precisions if self.architecture is not None else ()
        if "int8" in searched and "quantization" not in self.enabled:
            raise ValueError(
                "want quantization among those left: architecture.precisions has int8, which it "
                "makes"
            )
        if "sparsity_training" in self.enabled and not {"pruning", "recovery"} <= set(self.enabled):
            raise ValueError(
                "want pruning and recovery among those left: sparsity_training prepares for them"
            )
        return self


class Constraints(Strict):
    """What a variant must not exceed, beside the SLO."""

    size_bytes: int | None = Field(default=None, ge=1)
    """Of the artifact."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Resident memory of a replica's instances, beyond the bare process."""


class Search(Strict):
    """How recipes are proposed."""

    sampler: Literal["gp", "tpe", "random", "nsga2", "grid"] = "gp"


class Target(Strict):
    """The machine to serve on; measurements are taken on it."""

    device: Literal["cpu"] = "cpu"
    cores: int | None = Field(default=None, ge=1, le=4096)
    """Cores of one replica. Without it, all that the measuring process may use."""
    agent: str | None = Field(default=None, pattern=r"^https?://[^\s/@]+/?$")
    """URL of the `trimserve measure` that measures on the target, where it isn't this machine."""
    price_per_core_hour: PositiveFloat
    """In any currency: the cost is reported in it."""


class SpecBody(Strict):
    """All of a spec but its SLO, which a file names and who submits a job sends along."""

    api_version: Literal["trimserve/v1"] = Field(alias="apiVersion")
    kind: Literal["Optimization"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: ModelSection | None = None
    """Must, unless the model is given as an object."""
    data: DataSpec
    objective: Objective = "cost"
    constraints: Constraints = Constraints()
    task: TaskSpec = TaskSpec()
    budget: Budget
    techniques: Techniques = Techniques()
    training: TrainingSpec = TrainingSpec()
    search: Search = Search()
    target: Target


class SpecDocument(SpecBody):
    """A spec as written; `read_spec` makes a `Spec` of it."""

    slo: ExistingFile


@dataclass(frozen=True)
class Spec:
    """A checked spec: paths are absolute, and the SLO is read."""

    source: Path
    """The file it was read from."""
    name: str
    """Of the model in the repository that variants are published under."""
    slo: Slo
    slo_path: Path
    seed: int
    model: ModelSource
    data: DataSpec
    objective: Objective
    """What to minimize among the variants that keep the SLO: money per million inferences,
    the SLO's quantile of latency, the bytes of the artifact, or joules per inference."""
    budget: Budget
    techniques: Techniques
    target: Target
    constraints: Constraints = field(default_factory=Constraints)
    search: Search = field(default_factory=Search)
    task: TaskSpec = field(default_factory=TaskSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)


def read_spec(
    path: Path, environ: Mapping[str, str] | None = None, model: ModuleSource | None = None
) -> Spec:
    """Read the spec at `path`, and the SLO that it names; `model` stands in for the key.

    Relative paths count from the spec's directory; `${VAR}` in them is taken from `environ`
    (the process's own by default). Raises SpecInvalid with every problem found.
    """
    path = Path(os.path.abspath(path))
    try:
        with within(path.parent, os.environ if environ is None else environ):
            document = read_document(path, SpecDocument)
        slo = read_slo(document.slo)
    except DocumentInvalid as error:
        raise SpecInvalid(error.source, error.problems) from error
    named = document.model.source() if document.model is not None else None
    chosen = named if model is None else model
    if chosen is None:
        raise SpecInvalid(str(path), [f"{path}:1: model: missing, it must be given"])
    return Spec(
        source=path,
        name=document.name,
        slo=slo,
        slo_path=document.slo,
        seed=document.seed,
        model=chosen,
        data=document.data,
        objective=document.objective,
        budget=document.budget,
        techniques=document.techniques,
        target=document.target,
        constraints=document.constraints,
        search=document.search,
        task=document.task,
        training=document.training,
    )
