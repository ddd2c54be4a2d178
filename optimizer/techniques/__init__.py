"""Techniques: the optimization methods, one module each.

This module holds the contract and the table of names; it imports no method. A technique knows
one model and its parameters; it knows neither the others nor the search.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from optimizer.data.splits import Split
from optimizer.recipe import Traits
from optimizer.space import Parameters, Space
from optimizer.variant import Model, StoredModel
from serve.machine import Machine

# technique name -> (module, attribute)
TECHNIQUES: Mapping[str, tuple[str, str]] = {
    "export": ("optimizer.techniques.export", "Export"),
    "quantization": ("optimizer.techniques.quantization", "Quantization"),
    "compilation": ("optimizer.techniques.compilation", "Compilation"),
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


def load_technique(name: str) -> Technique:
    """The technique of that name. Raises KeyError for one that isn't in the table, ImportError
    where a package of the optimizer's extra is missing."""
    module, attribute = TECHNIQUES[name]
    found: Any = getattr(importlib.import_module(module), attribute)
    return cast(Technique, found())
