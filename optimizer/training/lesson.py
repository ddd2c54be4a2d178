"""Lesson: how a network learns from the study's base, for the techniques that train.

The base is the teacher, with labels where there are any (Hinton et al. 2015). How it is to train is
the spec's, and comes as parameters. What is done to the network before and after, and why, is the
technique's matter; the loop and the losses have modules of their own.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.model_source import read_signature
from optimizer.recipe import EFFORT, EFFORTS, EPOCHS, Traits
from optimizer.space import Categorical, Parameters, Space, Value, defaults
from optimizer.spec import InputSpec, TrainingSpec
from optimizer.techniques import Context
from optimizer.torch_source import load_source
from optimizer.torch_variant import keeps_base, load_torch, read_plan
from optimizer.variant import TorchModel, canonical_json
from serve.machine import this_machine

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from optimizer.training.batches import Batches
    from optimizer.training.checkpoint import Checkpoint
    from optimizer.training.distillation import Distillation, Kind, Mixture
    from optimizer.training.loop import Loss, Settings
    from optimizer.training.masks import Masks

_RECALIBRATION_BATCH = 128
_RATES = {"sgd": 0.02, "adamw": 3e-4}
"""Peaks for weights that were trained before, at a batch of 128."""
_LEARNS = {"classification": "classes", "embedding": "embedding", "custom": "values"}
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_IMAGE_AXES = 3
# Parameters that are the spec's `training` as it is.
_GIVEN = ("epochs", "short_epochs", "batch_size", "weight_decay", "schedule", "augmentation",
          "precision", "embeddings", "patience")  # fmt: skip


def reason_against(model: TorchModel, context: Context) -> str | None:
    """Why it can't be trained as the spec wants it, or None."""
    training = context.training
    if context.train is None:
        return "there is no training data"
    if training.precision == "bf16" and not _BF16_FLAGS & set(this_machine().flags):
        return "training.precision is bf16, and this machine has no instructions for it"
    return _reason_against_views(training, read_signature(model.source).inputs, context)


def _reason_against_views(
    training: TrainingSpec, inputs: Sequence[InputSpec], context: Context
) -> str | None:
    """Why its inputs can't be augmented as the spec wants it, or None."""
    name = training.augmentation
    if name == "none":
        return None
    from optimizer.training.augmentation import SWAP_SPANS
    from optimizer.training.batches import MASK

    shapes = ", ".join(f"{one.name} {list(one.shape)}" for one in inputs)
    taken = f"training.augmentation is {name}, and the model takes {shapes}"
    if name != SWAP_SPANS:
        is_image = len(inputs) == 1 and len(inputs[0].shape) == _IMAGE_AXES
        return None if is_image else f"{taken}: want one input [channel, y, x]"
    are_tokens = all(len(one.shape) == 1 and one.datatype.startswith("INT") for one in inputs)
    if not are_tokens or MASK not in [one.name for one in inputs]:
        return f"{taken}: want integers [length], and one of them named {MASK}"
    alphas = training.alphas if _weighs_labels(context) else ()
    if any(alphas):
        return (
            f"training.augmentation is {name}, and training.alphas has {max(alphas):g}: a text "
            "made of two has no label, want alphas of 0"
        )
    return None


def space_of(model: TorchModel, context: Context) -> Space:
    """What is searched, and the spec's training as it is, so that ids cover it."""
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
        **_mixed(training, learns, _weighs_labels(context)),
        **{name: Categorical((value,)) for name, value in fixed.items()},
    }


def plain_space(
    model: TorchModel,
    context: Context,
    epochs: float,
    when: Mapping[str, tuple[Value, ...]] | None = None,
) -> Space:
    """How a step trains that does so for as many `epochs` on every rung: all at its default, and to
    the end. The parameters exist `when` earlier ones have those values."""
    chosen = {**defaults(space_of(model, context)), EPOCHS: epochs, "patience": 0}
    left = {name: value for name, value in chosen.items() if name not in (EFFORT, "short_epochs")}
    return {name: Categorical((value,), when=when or {}) for name, value in left.items()}


def described(parameters: Parameters) -> str:
    """What was trained in a few words; for no training, that it was recalibrated."""
    effort = str(parameters[EFFORT])
    epochs = epochs_of(parameters)
    if not epochs:
        return "recalibrated"
    alpha = float(parameters["alpha"])
    loss = str(parameters.get("loss", "answers"))
    how = "fine-tuned" if alpha == 1 and loss in ("answers", "dist") else "distilled"
    with_ = "" if loss == "answers" else f", {loss}"
    labels = f", {alpha:g} of labels" if 0 < alpha < 1 else ""
    return f"{how} {epochs:g} epochs ({effort}{with_}{labels})"


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a network is to learn, and from what: `module` is the model's, or was made of it, and is
    changed."""

    model: TorchModel
    module: "nn.Module"
    data: "Batches"
    parameters: Parameters
    context: Context

    def recalibrate(self) -> None:
        """Batch normalization's statistics anew."""
        from optimizer.training.recalibration import N_SAMPLES, recalibrate

        order = np.random.default_rng(self.context.seed).permutation(len(self.data))[:N_SAMPLES]
        parts = np.array_split(order, -(-len(order) // _RECALIBRATION_BATCH))
        recalibrate(self.module, map(self.data.read, parts))

    def reconstruct(self, n: int) -> dict[str, tuple[float, float]]:
        """Solve the layers that a change left with less to read, by `n` samples or all. Returns
        their errors before and after; none where the network isn't made of the base's layers, which
        tell nothing about others of their names."""
        from optimizer.training.reconstruction import reconstruct

        if not keeps_base(self.model):
            return {}
        order = np.random.default_rng(self.context.seed).permutation(len(self.data))
        batches = self.data.each(order[:n], _RECALIBRATION_BATCH, whole=False)
        whole = load_source(self.model.source).eval()
        return reconstruct(self.module.eval(), whole, list(batches), self.context.seed)

    def settings(self) -> "Settings":
        """Those of the parameters."""
        from optimizer.training.loop import Settings

        names = ("batch_size", "learning_rate", "optimizer", "weight_decay", "schedule",
                 "augmentation", "precision", "patience")  # fmt: skip
        given: Mapping[str, Any] = {name: self.parameters[name] for name in names}
        return Settings(epochs=epochs_of(self.parameters), seed=self.context.seed, **given)

    def checkpoint(self, traits: Traits, part: str = "") -> "Checkpoint | None":
        """Of this very training by that technique, so that a build that was killed goes on where
        it was; a technique that trains in parts names them."""
        from optimizer.training.checkpoint import Checkpoint

        context = self.context
        if context.checkpoints is None or context.train is None:
            return None
        packages = {name: metadata.version(name) for name in traits.packages}
        content = [traits.name, part, self.model.digest, traits.version, dict(self.parameters),
                   context.seed, context.train.digest, packages]  # fmt: skip
        identity = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        return Checkpoint(context.checkpoints / f"{identity}.safetensors", identity)

    def loss(self) -> "Distillation":
        """That of the parameters."""
        return _loss(self.model, self.module, self.data, self.parameters, self.context.seed)

    def train(
        self, settings: "Settings", checkpoint: "Checkpoint | None", loss: "Loss | None" = None
    ) -> None:
        """By the loop and a loss, without one that of the parameters. Raises TrainingDiverged and
        ValueError."""
        from optimizer.training.loop import train

        whole = load_source(self.model.source)
        masks = _masks(self.model, self.module, whole)
        tell = self.context.tell
        with self._kept(whole):
            train(self.module, self.data, loss or self.loss(), settings, masks, checkpoint, tell)

    def _kept(self, whole: "nn.Module") -> "AbstractContextManager[None]":
        """While in it, what isn't to learn stands still."""
        from optimizer.training.embeddings import standing_still, tables_of

        if self.parameters["embeddings"] == "trained":
            return nullcontext()
        return standing_still(tables_of(self.module, whole))


def lesson_of(
    model: TorchModel,
    parameters: Parameters,
    context: Context,
    module: "nn.Module | None" = None,
) -> Lesson:
    """The model's lesson, or that of a `module` that a step which isn't done has made of it; nobody
    else holds the module. Where none of its parameters or of the base's may learn, as in a network
    made for inference, all do. Where it isn't trained, zeros that were to come by and by are there
    at once. Raises ValueError where they would leave nothing of a layer.
    """
    from optimizer.training.batches import Batches

    assert context.train is not None
    data = Batches(context.train, read_signature(model.source).input_names)
    module = load_torch(model) if module is None else module
    if not epochs_of(parameters):
        _masks(model, module).apply()
    if not _learns(module) or not _learns(load_source(model.source)):
        _unfreeze(module)
    _make_dense(module)
    return Lesson(model, module, data, parameters, context)


def _mixed(training: TrainingSpec, learns: str, weighs_labels: bool) -> dict[str, Categorical]:
    """What is searched of the loss."""
    is_classes = learns == "classes"
    losses = tuple(one for one in training.losses if one != "dist" or is_classes) or ("answers",)
    alphas = training.alphas if weighs_labels else (0.0,)
    softened = tuple(alpha for alpha in alphas if alpha < 1)
    space = {"alpha": Categorical(alphas)}
    if not {"answers", "dist"} >= set(losses):
        space["loss"] = Categorical(losses)
    elif softened:  # at an alpha of 1 answers don't count, however they differ
        space["loss"] = Categorical(losses, when={"alpha": softened})
    if is_classes and softened:
        space["temperature"] = Categorical(training.temperatures, when={"alpha": softened})
    return space


def epochs_of(parameters: Parameters) -> float:
    """Passes over train at the effort of the parameters, or those of a step without one."""
    if EFFORT not in parameters:
        return float(parameters[EPOCHS])
    effort = parameters[EFFORT]
    key = {"recalibrate": None, "short": "short_epochs", "full": "epochs"}[str(effort)]
    return float(parameters[key]) if key is not None else 0.0


def kind_of(parameters: Parameters) -> "Kind":
    """What answers are, as losses have it."""
    kind: Kind = parameters["learns"]  # type: ignore[assignment]
    return kind


def _weighs_labels(context: Context) -> bool:
    """Whether there are any, and answers are classes: alphas are for those alone."""
    has_labels = context.train is not None and context.train.labels is not None
    return has_labels and _LEARNS[context.task.kind] == "classes"


def _optimizer_for(module: "nn.Module") -> str:
    """What such networks are usually trained by: SGD with batch normalization, else AdamW."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return "sgd" if any(isinstance(part, _BatchNorm) for part in module.modules()) else "adamw"


def _loss(
    model: TorchModel, module: "nn.Module", data: "Batches", parameters: Parameters, seed: int
) -> "Distillation":
    import torch

    from optimizer.training.distillation import NEED_FEATURES, Distillation
    from optimizer.training.features import hidden_places, places_of
    from optimizer.training.teacher import Teacher, answering

    mixture = _mixture(parameters)
    signature = read_signature(model.source)
    answer = answering(signature.output_names, str(parameters["output"]))
    if not mixture.needs_teacher:
        return Distillation(mixture, answer, None)
    network = load_source(model.source)
    places = None
    if mixture.loss in NEED_FEATURES:
        find = hidden_places if mixture.loss == "hidden" else places_of
        places = find(module, network, data.read(np.arange(min(2, len(data)))).inputs)
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


def _learns(module: "nn.Module") -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _unfreeze(module: "nn.Module") -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _make_dense(module: "nn.Module") -> None:
    """Gradients of tables of embeddings, as all are clipped together."""
    from torch.nn import Embedding, EmbeddingBag

    for part in module.modules():
        if isinstance(part, Embedding | EmbeddingBag):
            part.sparse = False


def _masks(model: TorchModel, module: "nn.Module", whole: "nn.Module | None" = None) -> "Masks":
    """Of the layers that the plan's `masks` name, whichever technique put them there; with the goal
    of the step that says `gradual`. With the `whole` network those of its own that are sparse."""
    from optimizer.pruning.masks import GRADUAL, MASKS
    from optimizer.training.masks import Goal, Masks, sparse_layers

    layers: list[str] = []
    if whole is not None and keeps_base(model):
        layers += sparse_layers(module) & sparse_layers(whole)
    goal = None
    for step in read_plan(model).steps:
        operations = step.operations if isinstance(step.operations, Mapping) else {}
        layers += operations.get(MASKS, ())
        if GRADUAL in operations:
            goal = Goal(tuple(operations[MASKS]), **operations[GRADUAL])
    return Masks(module, layers, goal)
