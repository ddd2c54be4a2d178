"""The Pareto front as marks at shares of a plane, for an SVG that is as wide as the page is.

x is the latency at the SLO's rate, logarithmic where values are far apart; y the quality, or the
cost where a study judges none. The report's chart has the same axes, and who is on the front
comes from there.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loadtest.slo import Slo
from optimizer.chart import Figure, axis_range, round_ticks
from optimizer.pareto import FAR_BELOW
from optimizer.quantities import milliseconds, number, percent
from optimizer.service.page.findings import Finding, ranked

N_TONES = 5
"""Steps of colour between the cheapest and the dearest."""
STEPS = 1000
"""Places of the SLO line."""


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` as shares, 0 to 1."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[tuple[float, str], ...]
    """(share, text)"""

    def share(self, value: float) -> float:
        if self.is_log:
            return math.log(max(value, 1e-9) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Mark:
    """A variant in the plane. `y` counts from the top. `rank` is its place among those that can
    win, None where it can't; `tone` its cost, 0 to N_TONES - 1."""

    finding: Finding
    order: int
    """From left to right, from 0."""
    x: float
    y: float
    y_low: float | None
    y_high: float | None
    measured_x: float | None
    shape: str
    """chosen, candidate or broken"""
    on_front: bool
    is_baseline: bool
    rank: int | None
    tone: int
    said: str
    """All that the mark shows, in words."""

    @property
    def is_named(self) -> bool:
        return self.shape == "chosen" or self.is_baseline

    @property
    def rank_from_top(self) -> float:
        """Whoever is preferred lies above."""
        return -math.inf if self.rank is None else -self.rank


@dataclass(frozen=True)
class Plot:
    x: Axis
    y: Axis
    x_title: str
    y_title: str
    marks: tuple[Mark, ...]
    """From left to right."""
    steps: tuple[tuple[float, float, float, float], ...]
    """Lines of the front: x1, y1, x2, y2."""
    limit_ms: float
    limit_x: float
    floor_y: float | None
    """Of the accuracy that the SLO allows."""
    costs: tuple[float, float] | None
    """The cheapest and the dearest."""
    n_undrawn: int


def plot(
    found: Sequence[Finding],
    slo: Slo,
    objective: str,
    front: Collection[str],
    baseline_id: str | None,
) -> Plot | None:
    """None where no variant has been timed."""
    drawn = _drawn(found, slo)
    if not drawn:
        return None
    judged = any(one.quality is not None for one in drawn)
    x = _x_axis(drawn, slo)
    floor = _floor(found, slo) if judged else None
    y = _quality_axis(drawn, floor) if judged else _cost_axis(drawn)
    plane = _Plane(
        x=x,
        y=y,
        judged=judged,
        quantile=f"p{slo.latency.quantile * 100:g}",
        order={one.id: place for place, one in enumerate(ranked(drawn, objective))},
        costs=sorted(one.cost_per_million for one in drawn if one.cost_per_million is not None),
        front=front,
        baseline_id=baseline_id,
    )
    from_left = sorted(drawn, key=lambda one: (one.predicted_latency_s or 0.0, one.id))
    marks = [_mark(one, place, plane) for place, one in enumerate(from_left)]
    costs = plane.costs
    return Plot(
        x=x,
        y=y,
        x_title=f"{plane.quantile} at the SLO's rate, ms (predicted)",
        y_title=f"{_metric(drawn)}, %" if judged else "cost per million",
        marks=tuple(marks),
        steps=_steps([mark for mark in marks if mark.on_front]),
        limit_ms=slo.latency.threshold_ms,
        limit_x=x.share(slo.latency.threshold_ms),
        floor_y=None if floor is None else 1 - y.share(floor),
        costs=(costs[0], costs[-1]) if costs else None,
        n_undrawn=len(found) - len(marks),
    )


@dataclass(frozen=True)
class _Plane:
    """What all marks of a plot have in common."""

    x: Axis
    y: Axis
    judged: bool
    quantile: str
    order: Mapping[str, int]
    costs: Sequence[float]
    front: Collection[str]
    baseline_id: str | None


def _mark(one: Finding, order: int, plane: _Plane) -> Mark:
    """Of one of `_drawn`, which have both values."""
    value, measured_s = _y(one, plane.judged), one.measured_latency_s
    assert value is not None
    assert one.predicted_latency_s is not None
    low, high = _interval(one) if plane.judged else (None, None)
    return Mark(
        finding=one,
        order=order,
        x=plane.x.share(one.predicted_latency_s * 1e3),
        y=1 - plane.y.share(value),
        y_low=None if low is None else 1 - plane.y.share(low),
        y_high=None if high is None else 1 - plane.y.share(high),
        measured_x=None if measured_s is None else plane.x.share(measured_s * 1e3),
        shape=_shape(one),
        on_front=one.id in plane.front,
        is_baseline=one.id == plane.baseline_id,
        rank=plane.order.get(one.id),
        tone=_tone(one.cost_per_million, plane.costs),
        said=_said(one, plane.quantile, one.id in plane.front),
    )


def _drawn(found: Sequence[Finding], slo: Slo) -> list[Finding]:
    """Those with a latency, and not so far below the accuracy allowed as to squeeze the rest."""
    judged = any(one.quality is not None for one in found)
    allowed = slo.accuracy.max_drop if slo.accuracy is not None else None
    lowest = math.inf if allowed is None else FAR_BELOW * max(allowed, 0.005)
    return [
        one
        for one in found
        if one.predicted_latency_s is not None
        and _y(one, judged) is not None
        and (one.drop is None or one.drop <= lowest)
    ]


def _y(one: Finding, judged: bool) -> float | None:
    if not judged:
        return one.cost_per_million
    return None if one.quality is None else one.quality * 100


def _interval(one: Finding) -> tuple[float | None, float | None]:
    """Of the quality in percent, by the interval of its drop against the base."""
    if one.quality is None or one.drop is None or one.drop_lower is None or one.drop_upper is None:
        return None, None
    base = one.quality + one.drop
    return (base - one.drop_upper) * 100, (base - one.drop_lower) * 100


def _floor(found: Sequence[Finding], slo: Slo) -> float | None:
    if slo.accuracy is None:
        return None
    bases = [
        one.quality + one.drop for one in found if one.quality is not None and one.drop is not None
    ]
    return (bases[0] - slo.accuracy.max_drop) * 100 if bases else None


def _x_axis(drawn: Sequence[Finding], slo: Slo) -> Axis:
    values = [slo.latency.threshold_ms]
    for one in drawn:
        values += [s * 1e3 for s in (one.predicted_latency_s, one.measured_latency_s) if s]
    return _axis(axis_range(values))


def _cost_axis(drawn: Sequence[Finding]) -> Axis:
    return _axis(axis_range([one.cost_per_million or 0.0 for one in drawn]))


def _quality_axis(drawn: Sequence[Finding], floor: float | None) -> Axis:
    values = [] if floor is None else [floor]
    for one in drawn:
        values += [] if one.quality is None else [one.quality * 100]
        if one.can_win:
            values += [value for value in _interval(one) if value is not None]
    low, high = min(values), max(values)
    pad = max((high - low) * 0.12, 0.1)
    return _linear(low - pad, high + pad)


def _axis(figure: Figure) -> Axis:
    """Of what the report's axes are made by."""
    low, high = figure["range"]
    if figure.get("type") != "log":
        return _linear(low, high)
    axis = Axis(10**low, 10**high, True, ())
    ticks = tuple(
        (axis.share(value), text)
        for value, text in zip(figure["tickvals"], figure["ticktext"], strict=True)
    )
    return Axis(axis.low, axis.high, True, ticks)


def _linear(low: float, high: float) -> Axis:
    axis = Axis(low, high, False, ())
    ticks = tuple((axis.share(value), f"{value:g}") for value in round_ticks(low, high))
    return Axis(low, high, False, ticks)


def _steps(front: Sequence[Mark]) -> tuple[tuple[float, float, float, float], ...]:
    """As seen in this plane: the best y up to each x, in right angles."""
    best: list[Mark] = []
    for mark in sorted(front, key=lambda mark: (mark.x, mark.y)):
        if not best or mark.y < best[-1].y:
            best.append(mark)
    lines = []
    for one, other in pairwise(best):
        lines += [(one.x, one.y, other.x, one.y), (other.x, one.y, other.x, other.y)]
    return tuple(lines)


def _shape(one: Finding) -> str:
    if one.status == "chosen":
        return "chosen"
    return "candidate" if one.status in ("verified", "unverified") else "broken"


def _tone(cost: float | None, costs: Sequence[float]) -> int:
    if cost is None or not costs or costs[-1] <= costs[0]:
        return 0 if cost is not None else N_TONES - 1
    return min(N_TONES - 1, int(N_TONES * (cost - costs[0]) / (costs[-1] - costs[0])))


def _metric(drawn: Sequence[Finding]) -> str:
    return next((one.metric for one in drawn if one.metric), "accuracy")


def _said(one: Finding, quantile: str, on_front: bool) -> str:
    told = [f"{one.label}: {quantile} {milliseconds(one.predicted_latency_s)} ms predicted"]
    if one.measured_latency_s is not None:
        told.append(f"{milliseconds(one.measured_latency_s)} ms measured")
    if one.quality is not None:
        told.append(f"{one.metric or 'accuracy'} {percent(one.quality)}")
    if one.cost_per_million is not None:
        told.append(f"{number(one.cost_per_million)} per million")
    return ", ".join([*told, one.status, "on the front" if on_front else "behind the front"])
