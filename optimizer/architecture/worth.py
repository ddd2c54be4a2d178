"""Worth: how accurate a space's networks are, with the weights of a supernet or with their own.

What was found is kept in a file beside the study's checkpoints, so that a search that was killed
looks at nothing twice.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from optimizer.architecture.halving import first_epochs, halved
from optimizer.architecture.networks import build
from optimizer.architecture.setting import Setting
from optimizer.architecture.space import Choices
from optimizer.architecture.supernet import Supernet
from optimizer.recipe import EPOCHS
from optimizer.space import Parameters
from optimizer.training.loop import train
from optimizer.training.recalibration import N_SAMPLES, recalibrate
from optimizer.variant import TorchModel

_BATCH = 128


class Worth(Protocol):
    def accuracy(self, choices: Choices) -> float:
        """As `judging.Judge` has it; the same for the same network."""
        ...

    def chosen(self, ranked: Sequence[Choices]) -> tuple[Choices, nn.Module]:
        """The best of the networks ranked, best first, with its weights; eval mode."""
        ...


class Shared:
    """Networks with a trained supernet's weights."""

    def __init__(self, setting: Setting, parameters: Parameters, supernet: nn.Module) -> None:
        """Raises ValueError for what is no supernet."""
        if not isinstance(supernet, Supernet):
            raise ValueError(f"got a {type(supernet).__name__}, want the supernet's step before")
        self._supernet = supernet
        self._learned, _ = setting.parts()
        self._setting = setting
        self._parameters = parameters
        self._judge = setting.judge(parameters)

    def accuracy(self, choices: Choices) -> float:
        rounding = self._setting.rounding(choices, self._parameters)
        return self._judge(self._supernet.extract(choices), rounding)

    def chosen(self, ranked: Sequence[Choices]) -> tuple[Choices, nn.Module]:
        network = self._supernet.extract(ranked[0])
        rows = torch.arange(min(N_SAMPLES, len(self._learned))).numpy()
        recalibrate(network, self._learned.each(rows, _BATCH, whole=True))
        return ranked[0], network


class Trained:
    """Networks that are trained from scratch, by successive halving."""

    def __init__(self, setting: Setting, model: TorchModel, parameters: Parameters) -> None:
        self._setting = setting
        self._model = model
        self._parameters = parameters
        self._epochs = float(parameters[EPOCHS])
        self._judge = setting.judge(parameters)
        self._last: tuple[Choices, nn.Module] | None = None

    def accuracy(self, choices: Choices) -> float:
        return self._after(choices, first_epochs(self._epochs))

    def chosen(self, ranked: Sequence[Choices]) -> tuple[Choices, nn.Module]:
        best = halved(ranked, self._epochs, self._after)
        if self._last is None or self._last[0] != best:
            self._after(best, self._epochs)
        assert self._last is not None
        return self._last

    def _after(self, choices: Choices, epochs: float) -> float:
        """A training of that many epochs, from weights drawn by the seed."""
        setting = self._setting
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.context.seed)
            network = build(setting.space.plan(choices), setting.factories)
        parameters = {**self._parameters, EPOCHS: epochs}
        lesson = setting.lesson(self._model, network, parameters)
        learned, _ = setting.parts()
        train(network, learned, lesson.loss(), lesson.settings())
        self._last = (choices, network)
        return self._judge(network, setting.rounding(choices, self._parameters))


@dataclass
class Remembered:
    """Accuracies by network, each asked for once; kept at `path` where that is given."""

    worth: Worth
    path: Path | None
    _known: dict[Choices, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            stored = json.loads(self.path.read_text())
            self._known = {tuple(choices): accuracy for choices, accuracy in stored}

    def __call__(self, choices: Choices) -> float:
        if choices not in self._known:
            self._known[choices] = self.worth.accuracy(choices)
            self._keep()
        return self._known[choices]

    def forget(self) -> None:
        """The file, once the search has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _keep(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        content = [[list(choices), accuracy] for choices, accuracy in self._known.items()]
        partial.write_text(json.dumps(content))
        partial.replace(self.path)
