"""Variants as the page shows them: what an event of a running study, or its result, says of each.

Both come as the summaries of `optimizer.service.reporting`, so a page looks the same before and
after a study's end.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from optimizer.choice import EQUAL, EQUALLY_BUSY, LATENCY_MARGIN

MOVABLE = frozenset({"latency", "rate", "outclassed"})
"""Constraints that depend on the latency allowed; a variant that breaks another one can't win,
wherever that limit is. Who was outclassed breaks nothing."""
_VALUES: Mapping[str, str] = {
    "cost": "cost_per_million",
    "latency": "predicted_latency_s",
    "size": "size_bytes",
    "energy": "joules",
}
_ORDER = {"chosen": 0, "verified": 1, "unverified": 2, "infeasible": 3, "dropped": 4}


@dataclass(frozen=True)
class Finding:
    """A variant. Figures are None where they aren't known or aren't finite."""

    id: str
    label: str
    status: str
    engine: str = ""
    precision: str = ""
    recipe: tuple[Mapping[str, Any], ...] = ()
    reasons: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    metric: str | None = None
    cost_per_million: float | None = None
    max_rate_per_s: float | None = None
    latency_s: float | None = None
    predicted_latency_s: float | None = None
    measured_latency_s: float | None = None
    measured_latency_bound_s: float | None = None
    quality: float | None = None
    drop: float | None = None
    drop_lower: float | None = None
    drop_upper: float | None = None
    size_bytes: float | None = None
    memory_bytes: float | None = None
    joules: float | None = None
    busy_cores: float | None = None
    speedup: float | None = None

    @property
    def decisive_latency_s(self) -> float | None:
        """What a limit is compared with, as the study does: the upper bound of what was measured
        under load, where that was, else the prediction with the study's margin."""
        for value in (self.measured_latency_bound_s, self.measured_latency_s):
            if value is not None:
                return value
        predicted_s = self.predicted_latency_s
        return None if predicted_s is None else predicted_s / (1 - LATENCY_MARGIN)

    @property
    def can_win(self) -> bool:
        """With enough latency allowed."""
        return self.status != "dropped" and set(self.constraints) <= MOVABLE

    def value(self, objective: str) -> float | None:
        """What the study minimizes."""
        found: float | None = getattr(self, _VALUES[objective])
        return found


def finding(summary: Mapping[str, Any]) -> Finding:
    """From an event's variant; fields of another release of trimserve are left out."""
    known = {one.name for one in fields(Finding)}
    lists = ("recipe", "reasons", "constraints")
    values: dict[str, Any] = {name: value for name, value in summary.items() if name in known}
    return Finding(**values | {name: tuple(values.get(name, ())) for name in lists})


def findings(summaries: Iterable[Mapping[str, Any]], objective: str) -> list[Finding]:
    """By variant the last word, the best first."""
    last = {str(one["id"]): finding(one) for one in summaries}
    return sorted(
        last.values(), key=lambda one: (_ORDER.get(one.status, 4), *_rank(one, objective))
    )


def ranked(of: Iterable[Finding], objective: str) -> list[Finding]:
    """Those that can win, the best first, whatever latency is allowed; in the order in which the
    study prefers them (`optimizer.choice.ranked`)."""
    able = [one for one in of if one.can_win and one.decisive_latency_s is not None]
    left = [one for one in able if one.value(objective) is not None]
    left.sort(key=lambda one: _rank(one, objective))
    order = []
    while left:
        best = _rank(left[0], objective)[0]
        n_equal = bisect_right(left, best * (1 + EQUAL), key=lambda one: _rank(one, objective)[0])
        order.append(left.pop(_best_of_equals(left[:n_equal])))
    return order


def _best_of_equals(equal: Sequence[Finding]) -> int:
    """The place of the one that keeps fewer cores busy, then of the smaller drop."""
    busy = [math.inf if one.busy_cores is None else one.busy_cores for one in equal]
    least = min(busy) * (1 + EQUALLY_BUSY)
    places = [place for place, cores in enumerate(busy) if cores <= least]
    return min(places, key=lambda place: (equal[place].drop or 0.0, equal[place].id))


def winner(of_ranked: Sequence[Finding], limit_s: float) -> Finding | None:
    """The first of `ranked` that keeps the limit."""
    return next((one for one in of_ranked if (one.decisive_latency_s or 0.0) <= limit_s), None)


def _rank(one: Finding, objective: str) -> tuple[float, float]:
    value, latency_s = one.value(objective), one.decisive_latency_s
    return (
        math.inf if value is None else value,
        math.inf if latency_s is None else latency_s,
    )
