"""Burn rates: how fast an error budget is spent, and over which windows that is worth an alert.

A budget burns at rate 1 when it lasts just as long as the period that it is for. An alert fires
while both of its windows burn faster than its factor: the long one says that it matters, the short
one, a twelfth of it, that it goes on. Beyer et al. 2018, "The Site Reliability Workbook", chapter
5, section 6, for a period of 30 days; other periods have the same shares of the budget.
"""

import math
from dataclasses import dataclass

PERIOD_S = 30 * 86_400.0
_SHORT = 12
"""The long window by the short one."""
# (severity, long window in seconds, share of the budget that is gone then) for the 30 days.
_STANDARD = (
    ("page", 3_600.0, 0.02),
    ("page", 21_600.0, 0.05),
    ("ticket", 86_400.0, 0.10),
    ("ticket", 259_200.0, 0.10),
)
_REACHABLE = 0.5
"""Share of all requests that fail, at which an alert has to fire at the latest."""


@dataclass(frozen=True)
class BurnWindow:
    """Fires while more than `factor` times the budget's rate is spent over both windows, by which
    `budget_share` of it is gone after the long one."""

    severity: str
    long_s: float
    short_s: float
    factor: float
    budget_share: float
    is_rescaled: bool = False
    """Whether the window is longer than the standard's, which could never fire."""


@dataclass(frozen=True)
class Unreachable:
    """A standard window that was left out, since no share of failures fires it in time."""

    severity: str
    long_s: float
    reason: str


def burn_windows(
    budget: float, period_s: float = PERIOD_S
) -> tuple[tuple[BurnWindow, ...], tuple[Unreachable, ...]]:
    """The windows for an error budget, a share of requests above 0 and below 1, and those left out.

    With a budget b nothing burns faster than 1 / b: a factor near or above it never fires. Such a
    window is made longer, with the same share of the budget, until failing half of all requests
    fires it; where that takes it beyond the next standard window it is left out, since that one
    says the same sooner. Raises ValueError for a budget that is none, or a period below an hour.
    """
    if not 0 < budget < 1:
        raise ValueError(f"budget: got {budget:g}, want above 0 and below 1")
    if not (math.isfinite(period_s) and period_s >= 3600):
        raise ValueError(f"period_s: got {period_s:g}, want at least 3600")
    scale = period_s / PERIOD_S
    most = _REACHABLE / budget
    kept: list[BurnWindow] = []
    left_out: list[Unreachable] = []
    ends = [long_s * scale for _, long_s, _ in _STANDARD[1:]] + [period_s]
    for (severity, standard_s, share), end_s in zip(_STANDARD, ends, strict=True):
        long_s = standard_s * scale
        factor = share * period_s / long_s
        is_rescaled = factor > most
        if is_rescaled:
            factor, long_s = most, share * period_s / most
        if long_s >= end_s:
            reason = (
                f"it would have to be {shown(long_s)} long to fire at all, and the next one is "
                f"{shown(end_s)}"
            )
            left_out.append(Unreachable(severity, standard_s * scale, reason))
            continue
        short_s = _whole(long_s / _SHORT)
        kept.append(BurnWindow(severity, _whole(long_s), short_s, factor, share, is_rescaled))
    return tuple(kept), tuple(left_out)


def shown(seconds: float) -> str:
    """As Prometheus writes durations, in whole seconds: 1h, 1h30m, 3d."""
    left = max(1, round(seconds))
    parts = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def _whole(seconds: float) -> float:
    """In whole minutes, since rules are evaluated by the minute or so; at least one."""
    return max(60.0, 60.0 * round(seconds / 60.0))
