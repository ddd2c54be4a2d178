"""Schedules: the learning rate at each step, as a share of its peak; and how sparsity rises.

Pure functions of the step; what is trained is elsewhere.
"""

import math
from collections.abc import Callable, Mapping

Schedule = Callable[[int, int], float]
"""(step from 0, steps in all) → share of the peak, above 0 and at most 1."""

_WARM_UP = 0.3
"""Share of the steps in which one cycle rises; it begins at 1/25 and ends at 1/10,000 of that
(the defaults of torch.optim.lr_scheduler.OneCycleLR)."""
_FROM = 1 / 25
_TO = 1e-4 / 25


def cosine(step: int, n_steps: int) -> float:
    """From 1 down to nearly 0 (Loshchilov and Hutter 2017, "SGDR", without restarts)."""
    return (1 + math.cos(math.pi * step / n_steps)) / 2


def one_cycle(step: int, n_steps: int) -> float:
    """Up and down again, each by half a cosine (Smith and Topin 2018, "Super-Convergence")."""
    n_rising = _WARM_UP * n_steps
    if step < n_rising:
        return _FROM + (1 - _FROM) * (1 - math.cos(math.pi * step / n_rising)) / 2
    share = (step - n_rising) / (n_steps - n_rising)
    return _TO + (1 - _TO) * (1 + math.cos(math.pi * share)) / 2


def rising(step: int, n_steps: int, initial: float, final: float) -> float:
    """The sparsity after `step` of `n_steps` (Zhu and Gupta 2017, "To prune, or not to prune",
    equation 1, begun at step 0): fast at first, where there are many weights to do without."""
    left = 1 - min(step / n_steps, 1.0)
    return float(final + (initial - final) * left**3)


SCHEDULES: Mapping[str, Schedule] = {"one_cycle": one_cycle, "cosine": cosine}
