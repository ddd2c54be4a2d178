"""Torch variants on disk: the weights, and the structural plan that is replayed to hold them.

A folder with `model.safetensors` and `plan.json`. The plan names the base by its digest and
lists what was done to its structure, technique by technique, so that no module is ever pickled.
It doesn't know what a technique's operations mean.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.techniques import Restructuring
from optimizer.torch_source import load_source, load_weights
from optimizer.variant import (
    Json,
    Model,
    Stage,
    StoredTorch,
    TorchModel,
    TorchVariant,
    canonical_json,
    directory_digest,
)

if TYPE_CHECKING:
    import torch

_WEIGHTS = "model.safetensors"
_PLAN = "plan.json"
_FORMAT = 1
"""Of plan.json."""


@dataclass(frozen=True)
class PlanStep:
    """What one technique did to the structure; its own `restructure` reads `operations`."""

    technique: str
    technique_version: str
    operations: Json


@dataclass(frozen=True)
class Plan:
    """The steps from the base, whose digest `base` is, to a variant's structure."""

    base: str
    steps: tuple[PlanStep, ...] = ()


def torch_model(
    directory: Path,
    parent: TorchModel,
    module: "torch.nn.Module",
    technique: Restructuring | None = None,
    operations: Json = None,
    notes: tuple[str, ...] = (),
) -> TorchVariant:
    """Write what a technique made of the parent into the empty `directory`.

    Of equal modules and plans the files are equal. A `technique` that changed the structure gives
    itself and its `operations`; one that changed only weights gives neither. The plan is replayed
    here and the result compared with `module`. Raises ValueError where they differ, or where
    `operations` can't be JSON.
    """
    plan = read_plan(parent)
    techniques = dict(parent.techniques) if isinstance(parent, TorchVariant) else {}
    if technique is not None:
        traits = technique.traits
        step = PlanStep(traits.name, traits.version, operations)
        plan = Plan(plan.base, (*plan.steps, step))
        techniques[traits.name] = technique
    (directory / _PLAN).write_text(canonical_json({"format": _FORMAT, **asdict(plan)}))
    _save_weights(module, directory / _WEIGHTS)
    made = TorchVariant(
        source=parent.source,
        digest=directory_digest(directory),
        precision=parent.precision,
        notes=parent.notes + notes,
        directory=directory,
        techniques=techniques,
    )
    difference = _difference(module, load_torch(made))
    if difference:
        raise ValueError(f"the replayed plan doesn't give the module again: {difference}")
    return made


def load_torch(model: TorchModel) -> "torch.nn.Module":
    """Build the model: the source, then the plan's steps, then the weights; eval mode.

    Nobody else holds the module, so it may be edited. Raises SpecInvalid where the source fails,
    and ValueError where the weights don't fit the plan.
    """
    module = load_source(model.source)
    if not isinstance(model, TorchVariant):
        return module
    for step in read_plan(model).steps:
        technique = model.techniques[step.technique]
        version = technique.traits.version
        if version != step.technique_version:
            raise ValueError(
                f"the plan was made by {step.technique} {step.technique_version}, "
                f"but this is {version}"
            )
        module = technique.restructure(module, step.operations)
    problems = load_weights(module, model.directory / _WEIGHTS)
    if problems:
        raise ValueError(f"the weights don't fit the replayed plan: {'; '.join(problems)}")
    return module.eval()


def read_plan(model: TorchModel) -> Plan:
    """The model's plan; without steps for one that is as its source gives it."""
    if not isinstance(model, TorchVariant):
        return Plan(model.digest)
    return _read(model.directory)


def keeps_base(model: TorchModel) -> bool:
    """Whether no step has put another network in the base's place. A layer is then the base's of
    that name, or was made of it."""
    return not isinstance(model, TorchVariant) or all(
        model.techniques[step.technique].traits.stage is not Stage.ARCHITECTURE
        for step in read_plan(model).steps
    )


def bound(stored: StoredTorch, base: Model, techniques: Mapping[str, object]) -> TorchVariant:
    """A stored variant with its study's source and techniques, so that it can be built.

    Raises ValueError for the wrong base, or where a technique of its plan isn't among them.
    """
    plan = _read(stored.directory)
    if not isinstance(base, TorchModel) or base.digest != plan.base:
        raise ValueError(f"the variant comes from the model {plan.base}, not from {base.digest}")
    replaying: dict[str, Restructuring] = {}
    for step in plan.steps:
        technique = techniques.get(step.technique)
        if not isinstance(technique, Restructuring):
            raise ValueError(f"the variant's plan needs {step.technique}, which can't replay it")
        replaying[step.technique] = technique
    return TorchVariant(
        source=base.source,
        digest=stored.digest,
        precision=stored.precision,
        notes=stored.notes,
        directory=stored.directory,
        techniques=replaying,
    )


def _read(directory: Path) -> Plan:
    stored = json.loads((directory / _PLAN).read_text())
    if stored["format"] != _FORMAT:
        raise ValueError(f"plan.json has the format {stored['format']}, want {_FORMAT}")
    return Plan(stored["base"], tuple(PlanStep(**step) for step in stored["steps"]))


def _save_weights(module: "torch.nn.Module", path: Path) -> None:
    """The state dict, tied tensors under the first of their names."""
    from safetensors.torch import save_file

    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in sorted(module.state_dict().items()):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.detach().cpu().clone().contiguous()
    save_file(kept, path)


def _difference(wanted: "torch.nn.Module", given: "torch.nn.Module") -> str:
    """Where the modules differ first: in a layer as it prints, or in a tensor, buffers outside
    of the state dict included; empty for nowhere."""
    for line, wanted_line in zip(repr(given).splitlines(), repr(wanted).splitlines(), strict=False):
        if line != wanted_line:
            return f"got {line.strip()}, want {wanted_line.strip()}"
    want, got = _tensors(wanted), _tensors(given)
    names = sorted(want.keys() ^ got.keys())
    if names:
        return f"{names[0]} is in one of them only"
    for name, tensor in sorted(want.items()):
        other = got[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{name} is {list(other.shape)} {other.dtype}"
        if not _equal(tensor, other):
            return f"{name} has other values"
    return ""


def _tensors(module: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    buffers = module.named_buffers(remove_duplicate=False)
    return {**module.state_dict(), **{name: buffer.detach() for name, buffer in buffers}}


def _equal(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    other = other.to(one.device)
    if torch.equal(one, other):
        return True
    # NaN is judged by who runs the module; here it is a value like others.
    return one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
