"""Masks: weights that are zero and stay so while the others are trained.

It keeps what pruning left; which weights those are is decided elsewhere.
"""

from collections.abc import Iterable

import torch
from torch import nn

MIN_ZEROS = 0.3
"""Share of a layer's weights: with fewer exact zeros none was pruned on purpose."""


class Masks:
    """Of the weights of some layers, as they are when it is made."""

    def __init__(self, module: nn.Module, layers: Iterable[str] = ()) -> None:
        """Of the `layers` that are named, and of all whose weight [out, ...] has at least
        `MIN_ZEROS` exact zeros. Raises ValueError for a name without a weight."""
        named = set(layers)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, part in module.named_modules():
            weight = getattr(part, "weight", None)
            if not isinstance(weight, nn.Parameter) or (weight.ndim < 2 and name not in named):
                continue
            is_zero = weight.detach() == 0
            if name in named or float(is_zero.float().mean()) >= MIN_ZEROS:
                self._kept.append((weight, ~is_zero))
            named.discard(name)
        if named:
            raise ValueError(f"masks: got the layers {', '.join(sorted(named))}, none has a weight")

    def apply(self) -> None:
        """Set them to zero again, after a step."""
        with torch.no_grad():
            for weight, kept in self._kept:
                weight.mul_(kept)
