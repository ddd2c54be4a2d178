"""Techniques: the optimization methods, one module each.

This module holds the contract and the table of names; it imports no method. A technique knows
one model and its parameters; it knows neither the others nor the search.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from optimizer.blocks import Block
from optimizer.data.splits import Split
from optimizer.recipe import Traits
from optimizer.space import Parameters, Space
from optimizer.spec import TaskSpec, TrainingSpec
from optimizer.telling import Tell, untold
from optimizer.variant import EngineModel, Json, Model, StoredModel
from serve.machine import Machine

if TYPE_CHECKING:
    import torch

# technique name -> (module, attribute)
TECHNIQUES: Mapping[str, tuple[str, str]] = {
    "sparsity_training": ("optimizer.techniques.sparsity_training", "SparsityTraining"),
    "pruning": ("optimizer.techniques.pruning", "Pruning"),
    "decomposition": ("optimizer.techniques.decomposition", "Decomposition"),
    "recovery": ("optimizer.techniques.recovery", "Recovery"),
    "quantization_aware_training": (
        "optimizer.techniques.quantization_aware_training",
        "QuantizationAwareTraining",
    ),
    "export": ("optimizer.techniques.export", "Export"),
    "quantization": ("optimizer.techniques.quantization", "Quantization"),
    "compilation": ("optimizer.techniques.compilation", "Compilation"),
    "torch_compilation": ("optimizer.techniques.torch_compilation", "TorchCompilation"),
}


@dataclass(frozen=True)
class Context:
    """What a technique may use beside the model: nothing else decides its result."""

    calibration: Split
    """Part of train, for techniques that need data."""
    machine: Machine
    """The target that will serve. It may shape the space; `apply` takes its decisions from the
    parameters alone, so that a variant's id covers them."""
    seed: int
    max_batch_size: int
    train: Split | None = None
    """All of train, for techniques that train; their id covers its digest."""
    training: TrainingSpec = field(default_factory=TrainingSpec)
    """How to train, and `task`, what for. They may shape the space, as the machine may: what
    decides a result enters through the parameters."""
    task: TaskSpec = field(default_factory=TaskSpec)
    checkpoints: Path | None = None
    """A folder that outlives a killed build, where a training may keep how far it has come. It
    decides no result."""
    block_seconds: Callable[[Block], float | None] | None = None
    """What the target takes for a batch of a single layer, None where that wasn't measured. As
    with the machine, what decides a result enters through the parameters."""
    network_seconds: Callable[[str], float | None] | None = None
    """What the target takes for a batch of the same size of a whole network, by its key: see
    `Sampled`."""
    tell: Tell = untold
    """For a step that takes long: how far it has come, in a few words, as often as it likes."""


class Technique(Protocol):
    @property
    def traits(self) -> Traits: ...

    def check(self, model: Model, context: Context) -> str | None:
        """Why the technique can't work on this model or target, shown to the user; else None."""
        ...

    def space(self, model: Model, context: Context) -> Space:
        """The parameters, with distributions that depend on the model and the target."""
        ...

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> StoredModel:
        """Write the new model into the empty `directory` and return a handle on it.

        Pure: equal model, parameters, seed and data give equal digests, and what it is given
        stays as it is. Raises whatever goes wrong; the caller says whose fault it was.
        """
        ...

    def describe(self, parameters: Parameters) -> str:
        """The choice in a few words, for tables; empty where there is nothing to tell."""
        ...


@runtime_checkable
class Training(Protocol):
    """What a technique that trains offers beside the contract: it says what it costs. One of stage
    RECOVER has the parameter `recipe.EFFORT`, any other `recipe.EPOCHS`, as far as it trains."""

    def epochs(self, parameters: Parameters, context: Context) -> float:
        """Passes over the training split that applying it takes with these parameters."""
        ...


@runtime_checkable
class Partial(Protocol):
    """What a technique offers beside the contract where it has parts that some machines lack."""

    def missing(self, model: Model, context: Context) -> Mapping[str, str]:
        """Part → why it can't be used here, shown to the user."""
        ...


@runtime_checkable
class Timed(Protocol):
    """What a technique offers beside the contract where the target's times of layers shape it."""

    def timed_blocks(self, model: Model, context: Context) -> Sequence[Block]:
        """The layers to be timed before its space is asked for; then the context has their
        seconds."""
        ...


@dataclass(frozen=True, eq=False)
class TimedNetwork:
    """A network that takes the base's inputs, to be timed whole. `key` is an SHA-256 (hex) of
    what it is; `write` puts it into an empty directory, as ONNX Runtime serves it."""

    key: str
    write: Callable[[Path], EngineModel]


@runtime_checkable
class Sampled(Protocol):
    """What a technique offers beside the contract where times of layers shape it, and whole
    networks tell how far their sums can be believed."""

    def timed_networks(self, model: Model, context: Context) -> Sequence[TimedNetwork]:
        """Those to be timed once the layers were, and before its space is asked for; then the
        context has their seconds."""
        ...


@runtime_checkable
class Restructuring(Protocol):
    """What a technique can do beside, if it changes the structure of torch models: do it again.

    Its variants are kept as weights and a plan (`optimizer.torch_variant.torch_model`).
    """

    @property
    def traits(self) -> Traits: ...

    def restructure(self, module: "torch.nn.Module", operations: Json) -> "torch.nn.Module":
        """Do to the module what `apply` decided to do, as `operations` say; values of weights
        don't matter. It may be edited in place: nobody else holds it. Pure otherwise."""
        ...


def load_technique(name: str) -> Technique:
    """The technique of that name. Raises KeyError for one that isn't in the table, ImportError
    where a package of the optimizer's extra is missing."""
    module, attribute = TECHNIQUES[name]
    found: Any = getattr(importlib.import_module(module), attribute)
    return cast(Technique, found())
