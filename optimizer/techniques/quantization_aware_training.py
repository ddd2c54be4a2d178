"""Quantization-aware training: a network trained with the rounding of 8 bits, before it is in them.

It gives an ordinary fp32 network, of which static quantization then loses less. How it learns is
`optimizer.training.lesson`'s, as in recovery; a network whose structure was changed is recovered
first, without rounding, for half of the epochs.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optimizer.quantization.processor import kernel_layout
from optimizer.quantization.qdq import Arithmetic
from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_variant import load_torch, read_plan, torch_model
from optimizer.training.lesson import (
    Lesson,
    described,
    epochs_of,
    lesson_of,
    reason_against,
    space_of,
)
from optimizer.variant import Kind, Model, Stage, TorchModel, TorchVariant

if TYPE_CHECKING:
    from optimizer.training.checkpoint import Checkpoint
    from optimizer.training.loop import Settings

_N_OBSERVED = 256
"""Samples that ranges of activations are taken from."""
_OBSERVED_BATCH = 64
_RECOVERING = 0.5
"""Share of the epochs without rounding, where there is something to recover."""
_RATE = 0.1
"""Of recovery's learning rate: the weights are near where they should be."""


class QuantizationAwareTraining:
    traits = Traits(
        name="quantization_aware_training",
        version="5",
        stage=Stage.RECOVER,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        needs=Needs.UNLABELLED,
        packages=("torch", "numpy"),
        prepares=Stage.PRECISION,
        preserves=False,
    )

    def check(self, model: Model, context: Context) -> str | None:
        from optimizer.training.fake_quantization import layers_of

        assert isinstance(model, TorchModel)
        if not layers_of(load_torch(model)):
            return "the model has no convolution or linear layer of torch's own"
        return reason_against(model, context)

    def space(self, model: Model, context: Context) -> Space:
        """How the target wants activations and weights is as for static quantization. Unless the
        spec says otherwise, the base's answers alone come first: labels may move what the base does
        by more than rounding did."""
        assert isinstance(model, TorchModel)
        training = context.training
        if "alphas" not in training.model_fields_set:
            training = training.model_copy(update={"alphas": (0.0, *training.alphas)})
        activations, reduce_range = kernel_layout(context.machine)
        return {
            **space_of(model, replace(context, training=training)),
            "activations": Categorical((activations,)),
            "reduce_range": Categorical((reduce_range,)),
        }

    def describe(self, parameters: Parameters) -> str:
        if not epochs_of(parameters):
            return "before training for int8"
        return f"{described(parameters)} for int8"

    def epochs(self, parameters: Parameters, context: Context) -> float:
        return epochs_of(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        lesson = lesson_of(model, parameters, context)
        settings = lesson.settings()
        notes: list[str] = []
        parts = [lesson.checkpoint(self.traits, part) for part in ("recovering", "rounding")]
        if read_plan(model).steps:
            settings = _recovered(lesson, settings, parts[0])
        if settings.epochs:
            notes = _trained(lesson, settings, parts[1])
        for checkpoint in parts:
            if checkpoint is not None:
                checkpoint.remove()
        return torch_model(directory, model, lesson.module, notes=tuple(notes))


def _recovered(lesson: Lesson, settings: "Settings", checkpoint: "Checkpoint | None") -> "Settings":
    """Recover the network; the settings of what is left to train."""
    lesson.recalibrate()
    if not settings.epochs:
        return settings
    first = replace(settings, epochs=settings.epochs * _RECOVERING)
    lesson.train(first, checkpoint)
    lesson.recalibrate()
    return replace(settings, epochs=settings.epochs - first.epochs)


def _trained(lesson: Lesson, settings: "Settings", checkpoint: "Checkpoint | None") -> list[str]:
    """Train with rounding; notes on what it left alone."""
    from optimizer.training.fake_quantization import fake_quantized, layers_of, settle

    module, data, arithmetic = lesson.module, lesson.data, _arithmetic(lesson.parameters)
    rows = np.random.default_rng(settings.seed).permutation(len(data))[:_N_OBSERVED]
    with fake_quantized(module, data.each(rows, _OBSERVED_BATCH), arithmetic) as rounded:
        lesson.train(replace(settings, learning_rate=settings.learning_rate * _RATE), checkpoint)
    settle(module, rounded, arithmetic)
    n_layers = len(layers_of(module))
    if len(rounded) == n_layers:
        return []
    return [f"{len(rounded)} of {n_layers} layers were trained for int8"]


def _arithmetic(parameters: Parameters) -> Arithmetic:
    return Arithmetic(
        signed=parameters["activations"] == "int8",
        pairs_saturate=bool(parameters["reduce_range"]),
        least_error=True,
    )
