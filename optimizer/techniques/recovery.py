"""Recovery: a changed network's accuracy won back, by recalibration and then by training.

Batch normalization's statistics are taken anew, then the network is trained with the study's base
as teacher, with labels where there are any (Hinton et al. 2015). The loop and the losses are
`optimizer.training`'s; how it is to train is the spec's, and comes as parameters.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.model_source import read_signature
from optimizer.recipe import EFFORT, EFFORTS, Needs, Traits
from optimizer.space import Categorical, Parameters, Space, Value
from optimizer.spec import TrainingSpec
from optimizer.techniques import Context
from optimizer.torch_source import load_source
from optimizer.torch_variant import load_torch, read_plan, torch_model
from optimizer.variant import Kind, Model, Stage, TorchModel, TorchVariant, canonical_json
from serve.machine import this_machine

if TYPE_CHECKING:
    from torch import nn

    from optimizer.training.batches import Batches
    from optimizer.training.checkpoint import Checkpoint
    from optimizer.training.distillation import Distillation, Mixture
    from optimizer.training.loop import Settings

_RECALIBRATION_BATCH = 128
_RATES = {"sgd": 0.02, "adamw": 3e-4}
"""Peaks for weights that were trained before, at a batch of 128."""
_LEARNS = {"classification": "classes", "embedding": "embedding", "custom": "values"}
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_IMAGE_AXES = 3
# Parameters that are the spec's `training` as it is.
_GIVEN = ("epochs", "short_epochs", "batch_size", "weight_decay", "schedule", "augmentation",
          "precision", "patience")  # fmt: skip


class Recovery:
    traits = Traits(
        name="recovery",
        version="1",
        stage=Stage.RECOVER,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        needs=Needs.UNLABELLED,
        packages=("torch", "numpy"),
        optional=False,
        preserves=False,
    )

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        training = context.training
        if context.train is None:
            return "there is no training data"
        if training.precision == "bf16" and not _BF16_FLAGS & set(this_machine().flags):
            return "training.precision is bf16, and this machine has no instructions for it"
        inputs = read_signature(model.source).inputs
        is_image = len(inputs) == 1 and len(inputs[0].shape) == _IMAGE_AXES
        if training.augmentation != "none" and not is_image:
            shapes = ", ".join(f"{one.name} {list(one.shape)}" for one in inputs)
            return (
                f"training.augmentation is {training.augmentation}, and the model takes {shapes}: "
                "want one input [channel, y, x]"
            )
        return None

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, TorchModel)
        training = context.training
        learns = _LEARNS[context.task.kind]
        optimizer = training.optimizer or _optimizer_for(load_torch(model))
        output = context.task.output or read_signature(model.source).output_names[0]
        fixed: dict[str, Value] = {
            **{name: getattr(training, name) for name in _GIVEN},
            "optimizer": optimizer,
            "learning_rate": training.learning_rate or _RATES[optimizer],
            "learns": learns,
            "output": output,
        }
        return {
            EFFORT: Categorical(EFFORTS),
            **_mixed(training, learns, _has_labels(context)),
            **{name: Categorical((value,)) for name, value in fixed.items()},
        }

    def describe(self, parameters: Parameters) -> str:
        effort = str(parameters[EFFORT])
        epochs = _epochs(parameters)
        if not epochs:
            return "recalibrated"
        alpha = float(parameters["alpha"])
        loss = str(parameters["loss"])
        how = "fine-tuned" if alpha == 1 and loss in ("answers", "dist") else "distilled"
        with_ = "" if loss == "answers" else f", {loss}"
        labels = f", {alpha:g} of labels" if 0 < alpha < 1 else ""
        return f"{how} {epochs:g} epochs ({effort}{with_}{labels})"

    def epochs(self, parameters: Parameters, context: Context) -> float:
        """Of training; recalibration takes a part of one, which isn't counted."""
        return _epochs(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        assert context.train is not None
        from optimizer.training.batches import Batches
        from optimizer.training.loop import train
        from optimizer.training.masks import Masks

        module = load_torch(model)
        data = Batches(context.train, read_signature(model.source).input_names)
        _recalibrate(module, data, context.seed)
        if _epochs(parameters):
            loss = _loss(model, module, data, parameters, context.seed)
            masks = Masks(module, _masked(model))
            settings = _settings(parameters, context.seed)
            checkpoint = _checkpoint(model, parameters, context)
            train(module, data, loss, settings, masks, checkpoint)
            if checkpoint is not None:
                checkpoint.remove()
            _recalibrate(module, data, context.seed)
        return torch_model(directory, model, module)


def _mixed(training: TrainingSpec, learns: str, has_labels: bool) -> dict[str, Categorical]:
    """What is searched of the loss."""
    is_classes = learns == "classes"
    losses = tuple(one for one in training.losses if one != "dist" or is_classes) or ("answers",)
    alphas = training.alphas if is_classes and has_labels else (0.0,)
    space = {"loss": Categorical(losses), "alpha": Categorical(alphas)}
    softened = tuple(alpha for alpha in alphas if alpha < 1)
    if is_classes and softened:
        space["temperature"] = Categorical(training.temperatures, when={"alpha": softened})
    return space


def _epochs(parameters: Parameters) -> float:
    effort = parameters[EFFORT]
    key = {"recalibrate": None, "short": "short_epochs", "full": "epochs"}[str(effort)]
    return float(parameters[key]) if key is not None else 0.0


def _has_labels(context: Context) -> bool:
    return context.train is not None and context.train.labels is not None


def _optimizer_for(module: "nn.Module") -> str:
    """What such networks are usually trained by: SGD with batch normalization, else AdamW."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return "sgd" if any(isinstance(part, _BatchNorm) for part in module.modules()) else "adamw"


def _recalibrate(module: "nn.Module", data: "Batches", seed: int) -> None:
    from optimizer.training.recalibration import N_SAMPLES, recalibrate

    order = np.random.default_rng(seed).permutation(len(data))
    recalibrate(module, data.each(order[:N_SAMPLES], _RECALIBRATION_BATCH, whole=True))


def _settings(parameters: Parameters, seed: int) -> "Settings":
    from optimizer.training.loop import Settings

    names = ("batch_size", "learning_rate", "optimizer", "weight_decay", "schedule",
             "augmentation", "precision", "patience")  # fmt: skip
    given: Mapping[str, Any] = {name: parameters[name] for name in names}
    return Settings(epochs=_epochs(parameters), seed=seed, **given)


def _checkpoint(model: TorchModel, parameters: Parameters, context: Context) -> "Checkpoint | None":
    """Of this very training, so that a build that was killed goes on where it was."""
    from optimizer.training.checkpoint import Checkpoint

    if context.checkpoints is None or context.train is None:
        return None
    traits = Recovery.traits
    packages = {name: metadata.version(name) for name in traits.packages}
    content = [model.digest, traits.version, dict(parameters), context.seed, context.train.digest]
    identity = hashlib.sha256(canonical_json([*content, packages]).encode()).hexdigest()
    return Checkpoint(context.checkpoints / f"{identity}.safetensors", identity)


def _loss(
    model: TorchModel, module: "nn.Module", data: "Batches", parameters: Parameters, seed: int
) -> "Distillation":
    import torch

    from optimizer.training.distillation import NEED_FEATURES, Distillation
    from optimizer.training.features import places_of
    from optimizer.training.teacher import Teacher, answering

    mixture = _mixture(parameters)
    signature = read_signature(model.source)
    answer = answering(signature.output_names, str(parameters["output"]))
    if not mixture.needs_teacher:
        return Distillation(mixture, answer, None)
    network = load_source(model.source)
    places = None
    if mixture.loss in NEED_FEATURES:
        places = places_of(module, network, data.read(np.arange(min(2, len(data)))).inputs)
    n_kept = len(data) if parameters["augmentation"] == "none" else 0
    teacher = Teacher(network, answer, places.teacher if places else (), n_kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the projections
        return Distillation(mixture, answer, teacher, places)


def _mixture(parameters: Parameters) -> "Mixture":
    from optimizer.training.distillation import Mixture

    given: Mapping[str, Any] = {
        name: parameters[name] for name in ("loss", "alpha", "temperature") if name in parameters
    }
    return Mixture(kind=parameters["learns"], **given)  # type: ignore[arg-type]


def _masked(model: TorchModel) -> list[str]:
    """Layers that the plan's `masks` name, whichever technique put them there."""
    steps = [step.operations for step in read_plan(model).steps]
    return [
        name
        for operations in steps
        if isinstance(operations, Mapping)
        for name in operations.get("masks", ())
    ]
