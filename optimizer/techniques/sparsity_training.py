"""Sparsity training: the whole network trained with a penalty on batch normalization's scales,
before it is pruned by them (network slimming).

It changes weights alone; what shrank is pruning's to take. How it learns is
`optimizer.training.lesson`'s, as in recovery, for epochs of its own.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.model_source import read_signature
from optimizer.recipe import EPOCHS, Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_variant import load_torch, torch_model
from optimizer.training.lesson import epochs_of, lesson_of, plain_space, reason_against
from optimizer.variant import Kind, Model, Stage, TorchModel, TorchVariant

if TYPE_CHECKING:
    from torch import nn

    from optimizer.pruning.groups import Network
    from optimizer.pruning.scales import Scales

_SMALL = 0.1
"""Of the mean scale: units below it count as shrunk, in the variant's note."""


class SparsityTraining:
    traits = Traits(
        name="sparsity_training",
        version="2",
        stage=Stage.SPARSIFY,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        needs=Needs.UNLABELLED,
        packages=("torch", "numpy"),
        preserves=False,
        prepares=Stage.PRUNE,
        wants=(("what", ("channels", "both")), ("criterion", ("bn_scale",))),
        shares=("residual",),
    )

    def __init__(self) -> None:
        self._known: tuple[str, Network] | None = None
        """The digest of the last model, and what it is made of: tracing takes seconds."""

    def check(self, model: Model, context: Context) -> str | None:
        from optimizer.pruning.graph import Untraceable

        assert isinstance(model, TorchModel)
        try:
            network = self._network(model)
        except Untraceable as error:
            return str(error)
        if not scopes_of(load_torch(model), network):
            return "the model has no batch normalization of channels that can go"
        return reason_against(model, context)

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, TorchModel)
        training = context.training
        scopes = scopes_of(load_torch(model), self._network(model))
        return {
            "form": Categorical(training.sparsity_forms),
            "strength": Categorical(training.sparsity_strengths),
            "residual": Categorical(scopes),
            **plain_space(model, context, training.sparsity_epochs),
        }

    def describe(self, parameters: Parameters) -> str:
        form, strength = parameters["form"], float(parameters["strength"])
        return f"{float(parameters[EPOCHS]):g} epochs for sparse scales ({form} {strength:g})"

    def epochs(self, parameters: Parameters, context: Context) -> float:
        return epochs_of(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        from optimizer.pruning.scales import scales_of
        from optimizer.training.sparsity import Penalized

        assert isinstance(model, TorchModel)
        lesson = lesson_of(model, parameters, context)
        groups = self._network(model).in_scope(bool(parameters["residual"]))
        scales = scales_of(lesson.module, groups)
        loss = Penalized(
            lesson.loss(), scales, str(parameters["form"]), float(parameters["strength"])
        )
        checkpoint = lesson.checkpoint(self.traits)
        lesson.train(lesson.settings(), checkpoint, loss)
        if checkpoint is not None:
            checkpoint.remove()
        lesson.recalibrate()
        return torch_model(directory, model, lesson.module, notes=(_note(scales),))

    def _network(self, model: TorchModel) -> "Network":
        from optimizer.pruning.graph import InputShape, trace
        from optimizer.pruning.groups import network_of

        if self._known is None or self._known[0] != model.digest:
            inputs = read_signature(model.source).inputs
            shapes = [InputShape(one.datatype, one.shape) for one in inputs]
            self._known = model.digest, network_of(trace(load_torch(model), shapes))
        return self._known[1]


def scopes_of(module: "nn.Module", network: "Network") -> tuple[bool, ...]:
    """Whether the scales of residual streams are penalized too: each choice that there is, and
    none where nothing that can go has scales."""
    from optimizer.pruning.scales import scales_of

    found: dict[int, bool] = {}
    for residual in (False, True):
        n_units = scales_of(module, network.in_scope(residual)).n_units
        if n_units:
            found.setdefault(n_units, residual)
    return tuple(found.values())


def _note(scales: "Scales") -> str:
    from optimizer.training.sparsity import mean_scales

    means = mean_scales(scales)
    n_small = int((means < _SMALL * means.mean()).sum())
    return f"{n_small} of {scales.n_units} units have scales below {_SMALL:.0%} of the mean"
