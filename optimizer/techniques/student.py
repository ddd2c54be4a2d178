"""Student: a given smaller network in the base's place, to be taught by it.

The spec names its factory. It decides nothing about the teaching: that is the recovery's, which
comes behind it as behind every change of the structure.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optimizer.importable import Importable
from optimizer.model_source import read_signature
from optimizer.recipe import Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.spec import StudentSpec
from optimizer.techniques import Context
from optimizer.torch_source import load_weights, named_outputs
from optimizer.torch_variant import load_torch, torch_model
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant

if TYPE_CHECKING:
    import torch
    from torch import nn

_EXAMPLE_BATCH = 2


class Student:
    traits = Traits(
        name="student",
        version="2",
        stage=Stage.ARCHITECTURE,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        packages=("torch",),
        preserves=False,
    )

    def __init__(self, spec: StudentSpec) -> None:
        self._spec = spec

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        try:
            student = self._build(context.seed)
        except Exception as error:  # noqa: BLE001  it is the user's code
            return f"{self._spec.factory} failed: {type(error).__name__}: {error}"
        return _difference(load_torch(model), student, model, context)

    def space(self, model: Model, context: Context) -> Space:
        """No choice; the digest puts the student's code and weights into the variant's id."""
        digest = hashlib.sha256(self._spec.factory.source_bytes())
        if self._spec.weights is not None:
            digest.update(self._spec.weights.read_bytes())
        return {
            "factory": Categorical((str(self._spec.factory),)),
            "digest": Categorical((digest.hexdigest(),)),
        }

    def describe(self, parameters: Parameters) -> str:
        return f"student {parameters['factory']}"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        student = self._build(context.seed)
        operations = {"factory": parameters["factory"], "seed": context.seed}
        return torch_model(directory, model, student, self, operations)

    def restructure(self, module: "nn.Module", operations: Json) -> "nn.Module":
        """The student, whatever the module was. Raises ValueError where it is another's."""
        own = str(self._spec.factory)
        if operations["factory"] != own:
            raise ValueError(f"the plan has the student {operations['factory']}, this is {own}")
        return _called(self._spec.factory, operations["seed"])

    def _build(self, seed: int) -> "nn.Module":
        """With its weights, or those that the factory draws by the seed; eval mode."""
        student = _called(self._spec.factory, seed)
        if self._spec.weights is not None:
            problems = load_weights(student, self._spec.weights)
            if problems:
                raise ValueError(f"techniques.student.weights: {'; '.join(problems)}")
        return student


def _called(factory: Importable, seed: int) -> "nn.Module":
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory.call()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"it returned {type(module).__name__}, want a torch.nn.Module")
    return module.eval()


def _difference(
    base: "nn.Module", student: "nn.Module", model: TorchModel, context: Context
) -> str | None:
    """Why the student can't take the base's place: it fails, or gives other outputs."""
    import torch

    signature = read_signature(model.source)
    given = context.calibration.read(np.arange(_EXAMPLE_BATCH) % len(context.calibration)).inputs
    inputs = [torch.from_numpy(np.ascontiguousarray(given[name])) for name in signature.input_names]

    def shapes(module: "nn.Module") -> "dict[str, torch.Size]":
        with torch.inference_mode():
            outputs = named_outputs(module(*inputs), signature.output_names)
        return {name: output.shape for name, output in outputs.items()}

    wanted = shapes(base)
    try:
        own = shapes(student)
    except Exception as error:  # noqa: BLE001  it is the user's code
        return f"the student fails on the base's inputs: {type(error).__name__}: {error}"
    for name, shape in wanted.items():
        if own[name] != shape:
            return f"the student's {name} is {list(own[name])}, the base's {list(shape)}"
    return None
