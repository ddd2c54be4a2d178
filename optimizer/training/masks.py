"""Masks: weights that are zero and stay so while the others are trained.

It keeps what pruning left, or lets zeros come by and by where pruning left that to the training.
By which pattern, and which weights those are, is decided elsewhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from optimizer.pruning.masks import largest
from optimizer.training.schedule import rising

MIN_ZEROS = 0.3
"""Share of a trained layer's weights: with fewer exact zeros none was pruned on purpose."""
RISING = 0.5
"""Share of the steps in which sparsity rises. The rest is for the weights that stay; in one cycle
it is that in which the learning rate falls."""
_MAX_RISES = 100
"""In a training: magnitudes of all layers are sorted each time."""


@dataclass(frozen=True)
class Goal:
    """What sparsity `layers` come to, by a pattern of `optimizer.pruning.masks`."""

    layers: tuple[str, ...]
    pattern: str
    sparsity: float


class Masks:
    """Of the weights of some layers, as they are when it is made, and as its goal wants them."""

    def __init__(
        self, module: nn.Module, layers: Iterable[str] = (), goal: Goal | None = None
    ) -> None:
        """Of the `layers` that are named, those of the goal among them. Raises ValueError for a
        name without a weight."""
        named = {*layers, *(goal.layers if goal else ())}
        self._weights: dict[str, torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] = {}
        for name, part in module.named_modules():
            weight = getattr(part, "weight", None)
            if name in named and isinstance(weight, nn.Parameter):
                self._weights[name] = weight
                self._kept[name] = weight.detach() != 0
                named.discard(name)
        if named:
            raise ValueError(f"masks: got the layers {', '.join(sorted(named))}, none has a weight")
        self._goal = goal
        self._initial = min(self._sparsity(goal.layers), goal.sparsity) if goal else 0.0

    def apply(self, step: int = 1, n_steps: int = 1) -> None:
        """Set them to zero again, after `step` of `n_steps`, counted from 1; by default, as they
        are at the end. With a goal there may be more of them than at the step before, and never
        others. Raises ValueError where the goal would leave nothing of a layer."""
        if self._goal and _is_due(step, n_steps):
            at = rising(step, _n_rising(n_steps), self._initial, self._goal.sparsity)
            self._rise(self._goal, at)
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.mul_(self._kept[name])

    def is_settled(self, step: int, n_steps: int) -> bool:
        """Whether no more zeros come after that step."""
        return self._goal is None or step >= _n_rising(n_steps)

    def state(self) -> dict[str, torch.Tensor]:
        """By layer, which weights [out, ...] aren't masked: of a training that is to go on."""
        return dict(self._kept)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take the masks of a training that got further."""
        self._kept.update(state)

    def _rise(self, goal: Goal, sparsity: float) -> None:
        """The masked ones count as less than any other, so that they stay."""
        magnitudes = {
            name: self._weights[name].detach().abs().masked_fill(~self._kept[name], -1.0)
            for name in goal.layers
        }
        for name, kept in largest(magnitudes, goal.pattern, sparsity).items():
            self._kept[name] = kept & self._kept[name]

    def _sparsity(self, layers: Iterable[str]) -> float:
        kept = torch.cat([self._kept[name].flatten() for name in layers])
        return 1 - float(kept.double().mean())


def sparse_layers(module: nn.Module) -> set[str]:
    """Those whose weight [out, ...] has at least `MIN_ZEROS` exact zeros, and others. In a network
    that was trained somebody has put them there; one that wasn't may begin with them."""
    weights = {name: getattr(part, "weight", None) for name, part in module.named_modules()}
    return {
        name
        for name, weight in weights.items()
        if isinstance(weight, nn.Parameter)
        and weight.ndim > 1
        and MIN_ZEROS <= float((weight.detach() == 0).float().mean()) < 1
    }


def _n_rising(n_steps: int) -> int:
    return max(1, round(RISING * n_steps))


def _is_due(step: int, n_steps: int) -> bool:
    last = _n_rising(n_steps)
    return step == last or (step < last and step % max(1, last // _MAX_RISES) == 0)
