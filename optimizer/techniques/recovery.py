"""Recovery: a changed network's accuracy won back, by solving what can be solved, then by training.

Layers that read less than before are fitted to what they gave, batch normalization's statistics are
taken anew, then the network is trained with the study's base as teacher. How it learns is
`optimizer.training.lesson`'s.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from collections.abc import Mapping
from pathlib import Path

from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_variant import torch_model
from optimizer.training.lesson import described, epochs_of, lesson_of, reason_against, space_of
from optimizer.variant import Kind, Model, Stage, TorchModel, TorchVariant

_SAMPLES = "reconstruction_samples"


class Recovery:
    traits = Traits(
        name="recovery",
        version="7",
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
        return reason_against(model, context)

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, TorchModel)
        n = context.training.reconstruction_samples
        return {**space_of(model, context), _SAMPLES: Categorical((n,))}

    def describe(self, parameters: Parameters) -> str:
        return described(parameters)

    def epochs(self, parameters: Parameters, context: Context) -> float:
        """Of training; what comes before it takes parts of one, which aren't counted."""
        return epochs_of(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        lesson = lesson_of(model, parameters, context)
        lesson.recalibrate()
        notes: tuple[str, ...] = ()
        if n := int(parameters[_SAMPLES]):  # it fits what statistics as they now are give
            notes = _solved(lesson.reconstruct(n))
            lesson.recalibrate()
        if epochs_of(parameters):
            checkpoint = lesson.checkpoint(self.traits)
            lesson.train(lesson.settings(), checkpoint)
            if checkpoint is not None:
                checkpoint.remove()
            lesson.recalibrate()
        return torch_model(directory, model, lesson.module, notes=notes)


def _solved(errors: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """How much nearer layers came to what they gave in the whole network; nothing for no layers."""
    if not errors:
        return ()
    before, after = (sum(one) / len(errors) for one in zip(*errors.values(), strict=True))
    return (
        f"{len(errors)} layers that read less were solved: on average {before:.1%} of their "
        f"outputs' squares were missed before, {after:.1%} after",
    )
