"""Variants as the page shows them: what an event of a running study, or its result, says of each.

Both come as the summaries of `optimizer.service.reporting`, so a page looks the same before and
after a study's end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MOVABLE = frozenset({"latency", "rate", "outclassed"})
"""Constraints that depend on the latency allowed; a variant that breaks another one can't win,
wherever that limit is. Who was outclassed breaks nothing."""
_VALUES: Mapping[str, str] = {
    "cost": "cost_per_million",
    "latency": "latency_s",
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
    speedup: float | None = None

    @property
    def decisive_latency_s(self) -> float | None:
        """What a limit is compared with: the upper bound of what was measured under load, where
        that was, else the prediction."""
        for value in (
            self.measured_latency_bound_s, self.measured_latency_s, self.predicted_latency_s
        ):  # fmt: skip
            if value is not None:
                return value
        return self.latency_s

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
    """Those that can win, the best first, whatever latency is allowed."""
    able = [
        one
        for one in of
        if one.can_win and one.value(objective) is not None and one.decisive_latency_s is not None
    ]
    return sorted(able, key=lambda one: _rank(one, objective))


def winner(of_ranked: Sequence[Finding], limit_s: float) -> Finding | None:
    """The best of `ranked` that keeps the limit."""
    return next((one for one in of_ranked if (one.decisive_latency_s or 0.0) <= limit_s), None)


def _rank(one: Finding, objective: str) -> tuple[float, float]:
    value, latency_s = one.value(objective), one.decisive_latency_s
    return (
        float("inf") if value is None else value,
        float("inf") if latency_s is None else latency_s,
    )
