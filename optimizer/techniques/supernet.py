"""Supernet: one network that has all networks of a space in it, trained once for all of them.

Its step makes a variant that only the search for an architecture is made for, which takes the
networks out of it. Spaces, networks and the sandwich rule are `optimizer.architecture`'s.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.architecture.options import ArchitectureSpec
from optimizer.recipe import EPOCHS, Needs, Traits
from optimizer.space import Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_variant import torch_model
from optimizer.training.lesson import epochs_of, kind_of, reason_against
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant

if TYPE_CHECKING:
    from torch import nn

    from optimizer.architecture.setting import Setting


class SupernetTraining:
    traits = Traits(
        name="supernet",
        version="2",
        stage=Stage.SUPERNET,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        needs=Needs.UNLABELLED,
        packages=("torch", "numpy"),
        preserves=False,
        prepares=Stage.ARCHITECTURE,
        wants=(("weights", ("shared",)),),
    )

    def __init__(self, spec: ArchitectureSpec) -> None:
        self._spec = spec
        self._known: Setting | None = None

    def check(self, model: Model, context: Context) -> str | None:
        from optimizer.architecture.reach import why_not

        assert isinstance(model, TorchModel)
        return reason_against(model, context) or why_not(self._setting(model, context))

    def space(self, model: Model, context: Context) -> Space:
        from optimizer.architecture.setting import single

        assert isinstance(model, TorchModel)
        return single(self._setting(model, context).training(self._spec.epochs))

    def describe(self, parameters: Parameters) -> str:
        return f"supernet {float(parameters[EPOCHS]):g} epochs"

    def epochs(self, parameters: Parameters, context: Context) -> float:
        return epochs_of(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        import torch

        from optimizer.architecture.supernet import Sandwich
        from optimizer.training.loop import train
        from optimizer.training.teacher import answering

        assert isinstance(model, TorchModel)
        setting = self._setting(model, context)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            supernet, begun = setting.supernet()
        lesson = setting.lesson(model, supernet, parameters)
        answer = answering(setting.signature.output_names, str(parameters["output"]))
        loss = Sandwich(lesson.loss(), answer, kind_of(parameters))
        learned, _ = setting.parts()
        checkpoint = lesson.checkpoint(self.traits)
        train(supernet, learned, loss, lesson.settings(), None, checkpoint, context.tell)
        if checkpoint is not None:
            checkpoint.remove()
        operations = {"space": parameters["space"], "place": setting.place.to_json()}
        note = f"{setting.space.structures.n_networks:,} networks share these weights"
        return torch_model(directory, model, supernet, self, operations, (note, *begun))

    def restructure(self, module: "nn.Module", operations: Json) -> "nn.Module":
        """The supernet, whatever the module was. Raises ValueError where it is of another space."""
        from optimizer.architecture.making import Place, factories_of, space_digest, space_of
        from optimizer.architecture.supernet import Supernet

        own = space_digest(self._spec)
        if operations["space"] != own:
            raise ValueError(f"the plan has the space {operations['space']}, this is {own}")
        space = space_of(self._spec, Place.of_json(operations["place"]))
        return Supernet(space.structures, factories_of(self._spec)).eval()

    def _setting(self, model: TorchModel, context: Context) -> "Setting":
        """Kept as long as source and context are the same: tracing a space takes seconds."""
        from optimizer.architecture.setting import Setting

        known = self._known
        if known is None or known.context is not context or known.source is not model.source:
            self._known = known = Setting(self._spec, model.source, context)
        return known
