"""The Pareto front of a study: which variants nothing beats, and the chart that shows it.

All variants are compared by predictions, the chosen too: the few that had a load test would look
worse only for being known better. What was measured is drawn beside.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from optimizer.chart import Figure, axes, axis_range, escaped, limit_line, note
from optimizer.result import StudyResult, Variant

FAR_BELOW = 10.0
"""Times the drop that the SLO allows: less accurate variants would squeeze the chart flat."""
MIN_COST_SPAN = 0.1
"""Relative: costs that are nearer to each other get nearly one colour."""


@dataclass(frozen=True)
class Point:
    """A variant with the three figures that it is compared by; `cost` may be infinite."""

    variant: Variant
    latency_s: float
    accuracy: float
    cost: float

    def beats(self, other: "Point") -> bool:
        """At least as good in all three, and better in one."""
        mine, theirs = self._minimized(), other._minimized()
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    def _minimized(self) -> tuple[float, float, float]:
        return self.latency_s, -self.accuracy, self.cost


def points(variants: Iterable[Variant]) -> list[Point]:
    """Those of the variants that have an accuracy and a finite latency at the SLO's rate."""
    found = []
    for variant in variants:
        quality, serving = variant.quality, variant.serving
        if quality is not None and serving is not None:
            latency_s, cost = serving.prediction.slo_latency_s, serving.cost_per_million
            if math.isfinite(latency_s):
                found.append(Point(variant, latency_s, quality.value, cost))
    return found


def pareto_front(variants: Iterable[Variant]) -> frozenset[str]:
    """Ids of the variants that no other beats in latency, accuracy and cost."""
    known = points(variants)
    return frozenset(
        one.variant.id for one in known if not any(other.beats(one) for other in known)
    )


def drawn_points(result: StudyResult) -> list[Point]:
    """Those that the chart has room for: not far below the accuracy that the SLO allows."""
    objective = result.slo.accuracy
    limit = FAR_BELOW * max(objective.max_drop, 0.005) if objective else math.inf
    return [
        point
        for point in points(result.variants)
        if point.variant.quality is not None and point.variant.quality.drop <= limit
    ]


def pareto_chart(result: StudyResult) -> Figure:
    """Accuracy against latency at the SLO's rate, the cost as colour, the SLO's limits drawn."""
    drawn = drawn_points(result)
    front = pareto_front(result.variants)
    colours = _colours(drawn)
    groups = {
        "breaks the SLO": ("x-thin", ("infeasible", "dropped")),
        "candidate": ("circle", ("verified", "unverified")),
        "chosen": ("star", ("chosen",)),
    }
    data = [_front_line(drawn, front)]
    for name, (symbol, statuses) in groups.items():
        if group := [point for point in drawn if point.variant.status in statuses]:
            data.append(_markers(group, front) | {"name": name})
            data[-1]["marker"] |= colours | _shape(symbol)
    data += _measurements(drawn)
    return {"data": data, "layout": _layout(result, drawn)}


def _markers(group: Sequence[Point], front: frozenset[str]) -> Figure:
    on_front = [point.variant.id in front for point in group]
    return {
        "mode": "markers",
        "x": [point.latency_s * 1e3 for point in group],
        "y": [point.accuracy * 100 for point in group],
        "error_y": _drop_intervals(group),
        "customdata": [
            [escaped(point.variant.label), _shown_cost(point.cost), "on" if shown else "behind"]
            for point, shown in zip(group, on_front, strict=True)
        ],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{x:.2f} ms, %{y:.2f}%<br>"
        "%{customdata[1]}<br>%{customdata[2]} the front<extra></extra>",
        "marker": {
            "color": [point.cost if math.isfinite(point.cost) else None for point in group],
            "line": {"width": [2.5 if shown else 0 for shown in on_front], "color": "var(--ink)"},
        },
    }


def _shape(symbol: str) -> Figure:
    shape: Figure = {"symbol": symbol, "size": 22 if symbol == "star" else 13}
    if symbol == "x-thin":  # it has no area: only its line is seen
        shape["line"] = {"width": 2.5, "color": "var(--violated)"}
    return shape


def _drop_intervals(group: Sequence[Point]) -> Figure:
    """The interval of the drop against the base, around the accuracy."""
    qualities = [point.variant.quality for point in group]
    return {
        "type": "data",
        "symmetric": False,
        "array": [(q.drop - q.drop_lower) * 100 for q in qualities if q is not None],
        "arrayminus": [(q.drop_upper - q.drop) * 100 for q in qualities if q is not None],
        "color": "var(--faint)",
        "thickness": 1.2,
        "width": 0,
    }


def _front_line(drawn: Sequence[Point], front: frozenset[str]) -> Figure:
    """The front as seen in this plane: the best accuracy up to each latency, of all on it."""
    best, steps = -math.inf, []
    for point in sorted(drawn, key=lambda point: (point.latency_s, -point.accuracy)):
        if point.variant.id in front and point.accuracy > best:
            best = point.accuracy
            steps.append((point.latency_s * 1e3, best * 100))
    return {
        "name": "front",
        "mode": "lines",
        "x": [x for x, _ in steps],
        "y": [y for _, y in steps],
        "line": {"color": "var(--soft)", "width": 1.5, "shape": "hv", "dash": "dot"},
        "hoverinfo": "skip",
    }


def _measurements(drawn: Sequence[Point]) -> list[Figure]:
    """From each prediction that was put to the test, a line to what was measured."""
    x: list[float | None] = []
    y: list[float | None] = []
    for point in drawn:
        verification = point.variant.verification
        if verification is not None and verification.slo_latency_s is not None:
            x += [point.latency_s * 1e3, verification.slo_latency_s * 1e3, None]
            y += [point.accuracy * 100, point.accuracy * 100, None]
    trace = {
        "name": "measured under load",
        "mode": "lines+markers",
        "x": x,
        "y": y,
        "line": {"color": "var(--soft)", "width": 1.2},
        "marker": {"symbol": "line-ns", "size": [0, 14, 0] * (len(x) // 3),
                   "line": {"width": 2, "color": "var(--ink)"}},
        "hovertemplate": "%{x:.2f} ms measured<extra></extra>",
    }  # fmt: skip
    return [trace] if x else []


def _layout(result: StudyResult, drawn: Sequence[Point]) -> Figure:
    quantile = f"p{result.slo.latency.quantile * 100:g}"
    layout = axes(f"{quantile} at the SLO's rate, ms (predicted)", "accuracy, %")
    limit_ms, floor = result.slo.latency.threshold_ms, _accuracy_floor(result)
    layout["xaxis"] |= axis_range([*_latencies_ms(drawn), limit_ms])
    low, high = _accuracy_range(drawn, floor)
    layout["yaxis"] |= {"range": [low, high]}

    # Annotations, unlike shapes, want the logarithm of x on a logarithmic axis.
    def place(x: float) -> float:
        return math.log10(x) if layout["xaxis"].get("type") == "log" else x

    layout["shapes"] = [limit_line(x=limit_ms)]
    layout["annotations"] = [
        note("latency limit", x=place(limit_ms), xanchor="right", y=0, yref="paper",
             yanchor="bottom")
    ]  # fmt: skip
    if floor is not None:
        layout["shapes"] += [limit_line(y=floor), _allowed(limit_ms, floor, high)]
        layout["annotations"] += [
            note("accuracy floor", x=0, xref="paper", xanchor="left", y=floor, yanchor="bottom")
        ]
    for point in drawn:
        if point.variant.status == "chosen" or point.variant.id == result.baseline_id:
            layout["annotations"].append(_label(point, place(point.latency_s * 1e3)))
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}}
    return layout


def _latencies_ms(drawn: Sequence[Point]) -> list[float]:
    verifications = [point.variant.verification for point in drawn]
    measured = [one.slo_latency_s for one in verifications if one is not None]
    predicted = [point.latency_s for point in drawn]
    return [seconds * 1e3 for seconds in (*predicted, *measured) if seconds is not None]


def _accuracy_range(drawn: Sequence[Point], floor: float | None) -> tuple[float, float]:
    """In percent, with room for the intervals of those that keep the SLO."""
    values = [point.accuracy * 100 for point in drawn]
    for point in drawn:
        quality = point.variant.quality
        if quality is not None and not point.variant.reasons:
            base = quality.value + quality.drop
            values += [(base - quality.drop_lower) * 100, (base - quality.drop_upper) * 100]
    if floor is not None:
        values.append(floor)
    low, high = min(values, default=0.0), max(values, default=100.0)
    pad = max((high - low) * 0.12, 0.1)
    return low - pad, high + pad


def _accuracy_floor(result: StudyResult) -> float | None:
    """In percent: what the SLO leaves of the base's accuracy."""
    baseline, objective = result.baseline, result.slo.accuracy
    if objective is None or baseline is None or baseline.quality is None:
        return None
    return (baseline.quality.value + baseline.quality.drop) * 100 - objective.max_drop_points


def _allowed(limit_ms: float, floor: float, top: float) -> Figure:
    """The corner that the SLO allows. Its left end is 0, but for logarithms."""
    corner = {"x0": 1e-6, "x1": limit_ms, "y0": floor, "y1": top}
    style = {"line": {"width": 0}, "fillcolor": "var(--allowed)", "layer": "below"}
    return {"type": "rect", **corner, **style}


def _label(point: Point, x: float) -> Figure:
    name = escaped(point.variant.label)
    return {
        "text": f"<b>{name}</b>" if point.variant.status == "chosen" else name,
        "x": x,
        "y": point.accuracy * 100,
        "showarrow": True,
        "arrowhead": 0,
        "arrowcolor": "var(--soft)",
        "ax": 30,
        "ay": -34 if point.variant.status == "chosen" else 34,
        "xanchor": "left",
        "font": {"color": "var(--ink)", "size": 12.5},
    }


def _shown_cost(cost: float) -> str:
    return f"{cost:.3g} per million" if math.isfinite(cost) else "no rate within the SLO"


def _colours(drawn: Sequence[Point]) -> Figure:
    costs = [point.cost for point in drawn if math.isfinite(point.cost)] or [1.0]
    low, high = min(costs), max(costs)
    spread = max(0.0, MIN_COST_SPAN * high - (high - low)) / 2
    return {
        "cmin": low - spread,
        "cmax": high + spread,
        "colorscale": [[0, "var(--cheap)"], [0.5, "var(--middling)"], [1, "var(--dear)"]],
        "showscale": True,
        "colorbar": {
            "title": {"text": "cost per million", "side": "top", "font": {"size": 11}},
            "orientation": "h",
            "thickness": 8,
            "len": 0.5,
            "x": 1,
            "xanchor": "right",
            "y": -0.2,
            "yanchor": "top",
            "outlinewidth": 0,
            "nticks": 4,
            "tickformat": ".3~g",
            "tickfont": {"size": 11},
        },
    }
