"""Round training: what a network learns between two rounds of pruning, and the parameters of it.

It learns as in sparsity training: from the study's base, all of the spec's training at its default
and to the end. How is `optimizer.training.lesson`'s; what goes in a round isn't known here.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from optimizer.recipe import EPOCHS, Traits
from optimizer.space import Categorical, Parameters, Space, Value
from optimizer.techniques import Context
from optimizer.training.lesson import lesson_of, plain_space, reason_against
from optimizer.variant import Json, TorchModel, canonical_json

if TYPE_CHECKING:
    from torch import nn

    from optimizer.training.checkpoint import Checkpoint

ROUNDS = "rounds"
"""The parameter that says how many there are; without it all goes at once."""
_PREFIX = "round_"
"""Of the parameters of the training, of which pruning has some names itself."""


def why_not(model: TorchModel, context: Context) -> str | None:
    """Why the network can't be trained between rounds that the spec asks for, or None."""
    n_rounds = context.training.pruning_rounds
    reason = reason_against(model, context) if n_rounds > 1 else None
    return reason and f"training.pruning_rounds is {n_rounds}, and {reason}"


def space_of_rounds(
    model: TorchModel, context: Context, when: Mapping[str, tuple[Value, ...]]
) -> Space:
    """The spec's rounds and the training between them, so that ids cover it; empty where all goes
    at once. They exist `when` earlier parameters have those values."""
    n_rounds, epochs = context.training.pruning_rounds, context.training.pruning_round_epochs
    if n_rounds == 1:
        return {}
    training = plain_space(model, context, epochs, when={ROUNDS: (n_rounds,)})
    return {
        ROUNDS: Categorical((n_rounds,), when=when),
        **{name if name == EPOCHS else _PREFIX + name: one for name, one in training.items()},
    }


def rounds_of(parameters: Parameters) -> int:
    """How many there are; 1 where all goes at once."""
    return int(parameters.get(ROUNDS, 1))


def total_epochs(parameters: Parameters) -> float:
    """Passes over train of all trainings: one less than there are rounds."""
    return (rounds_of(parameters) - 1) * float(parameters.get(EPOCHS, 0))


@dataclass(frozen=True, eq=False)
class RoundTraining:
    """Trains after each round; called as `optimizer.pruning.rounds.Train`.

    A build that was killed goes on in the round where it was: checkpoints stay until `finish`. What
    pruning has taken by then is found anew, and is part of what the checkpoint goes by.
    """

    model: TorchModel
    parameters: Parameters
    context: Context
    traits: Traits
    _kept: "list[Checkpoint]" = field(default_factory=list)

    def __call__(self, module: "nn.Module", index: int, operations: Sequence[Json]) -> None:
        """Recalibrate and train the module in place. Raises TrainingDiverged and ValueError."""
        lesson = lesson_of(self.model, _of_training(self.parameters), self.context, module)
        lesson.recalibrate()
        checkpoint = lesson.checkpoint(self.traits, self._part(index, operations))
        seed = _seed_of(self.context.seed, index)
        lesson.train(replace(lesson.settings(), seed=seed), checkpoint)
        if checkpoint is not None:
            self._kept.append(checkpoint)
        lesson.recalibrate()

    def finish(self) -> None:
        """Leave no checkpoint behind."""
        for checkpoint in self._kept:
            checkpoint.remove()

    def _part(self, index: int, operations: Sequence[Json]) -> str:
        """Names all that decides the round's training beside the lesson's own."""
        content = [index, dict(self.parameters), self.context.calibration.digest, list(operations)]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _of_training(parameters: Parameters) -> dict[str, Value]:
    """The lesson's parameters by its own names."""
    given = {
        name.removeprefix(_PREFIX): value
        for name, value in parameters.items()
        if name.startswith(_PREFIX)
    }
    return {**given, EPOCHS: parameters[EPOCHS]}


def _seed_of(seed: int, index: int) -> int:
    """Of a round: with one seed for all, trainings of a part of an epoch would see the same part
    of train."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
