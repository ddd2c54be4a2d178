"""Sparsity: a penalty on batch normalization's scales, which shrinks those that matter little.

It is added to another loss, whichever that is. Which scales belong together is found by
`optimizer.pruning`; what shrank is taken out there.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from optimizer.pruning.scales import Scales
from optimizer.training.batches import Batch
from optimizer.training.loop import Loss

_TINY = 1e-12
"""Of a unit's squared norm. Below it the norm has no slope, as at 0, where it has no derivative."""


def l1(scales: Scales) -> torch.Tensor:
    """Σ |γ| (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network
    Slimming", equation 1), over the scales of units that can go; the others have no need to
    shrink."""
    return scales.values().abs().sum()


def group_lasso(scales: Scales) -> torch.Tensor:
    """Σ √n · ‖γ of a unit‖₂ over units with n scales each (Yuan and Lin 2006, "Model Selection
    and Estimation in Regression with Grouped Variables", section 2): what has to go together
    shrinks together. By the √n a scale is pulled as hard as by `l1` where a unit's are equal, so
    that a strength means the same in both."""
    zeros = scales.values().new_zeros(scales.n_units)
    squares = zeros.index_add(0, scales.units, scales.values().square())
    sizes = torch.bincount(scales.units, minlength=scales.n_units)
    return (sizes.sqrt() * squares.clamp(min=_TINY).sqrt()).sum()


def mean_scales(scales: Scales) -> torch.Tensor:
    """[unit]: the mean |γ| of each."""
    sizes = torch.bincount(scales.units, minlength=scales.n_units)
    values = scales.values().detach().abs()
    return values.new_zeros(scales.n_units).index_add(0, scales.units, values) / sizes


PENALTIES: Mapping[str, Callable[[Scales], torch.Tensor]] = {"group": group_lasso, "l1": l1}


class Penalized:
    """A loss of a batch and `strength` times a penalty of `scales`, which are the module's."""

    def __init__(self, loss: Loss, scales: Scales, form: str, strength: float) -> None:
        """Raises ValueError for an unknown form, or a strength below 0."""
        if form not in PENALTIES:
            raise ValueError(f"form: got {form!r}, want one of {', '.join(PENALTIES)}")
        if not strength >= 0:
            raise ValueError(f"strength: got {strength}, want at least 0")
        self._loss = loss
        self._scales = scales
        self._penalty = PENALTIES[form]
        self._strength = strength

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._loss.parameters()

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        return self._loss(module, batch) + self._strength * self._penalty(self._scales)
