"""The Pareto front of a study: which variants nothing beats, and the charts that show it.

All variants are compared by predictions, the chosen too: the few that had a load test would look
worse only for being known better. What was measured is drawn beside.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from optimizer.chart import (
    Figure,
    axes,
    axis_range,
    colour_bar,
    escaped,
    limit_line,
    note,
    place_on,
)
from optimizer.quantities import bytes_
from optimizer.result import StudyResult, Variant

FAR_BELOW = 10.0
"""Times the drop that the SLO allows: less accurate variants would squeeze the chart flat."""
CROWDED = 60
"""Variants from which marks are smaller and only the chosen and the baseline show intervals."""

Quantity = Literal["latency", "accuracy", "cost", "size", "drop"]


@dataclass(frozen=True)
class Point:
    """A variant with the three figures that it is compared by; `cost` may be infinite, and
    `accuracy` is None where none was measured of any."""

    variant: Variant
    latency_s: float
    accuracy: float | None
    cost: float

    def beats(self, other: "Point") -> bool:
        """At least as good in all three, and better in one."""
        mine, theirs = self._minimized(), other._minimized()
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    def _minimized(self) -> tuple[float, float, float]:
        return self.latency_s, -(self.accuracy or 0.0), self.cost


@dataclass(frozen=True)
class View:
    """A plane to see the variants in, and what colours them."""

    name: str
    x: Quantity
    y: Quantity
    colour: Quantity


VIEWS = (
    View("accuracy and latency", "latency", "accuracy", "cost"),
    View("accuracy and cost", "cost", "accuracy", "latency"),
    View("accuracy and size", "size", "accuracy", "cost"),
    View("cost and latency", "latency", "cost", "drop"),
)
_TITLES: dict[Quantity, str] = {
    "latency": "{quantile} at the SLO's rate, ms (predicted)",
    "accuracy": "{metric}, %",
    "cost": "cost per million",
    "size": "size, MB",
    "drop": "drop, points",
}
_VALUES: dict[Quantity, Callable[[Point], float | None]] = {
    "latency": lambda point: point.latency_s * 1e3,
    "accuracy": lambda point: None if point.accuracy is None else point.accuracy * 100,
    "cost": lambda point: point.cost if math.isfinite(point.cost) else None,
    "size": lambda point: (
        None if point.variant.size_bytes is None else point.variant.size_bytes / 1e6
    ),
    "drop": lambda point: point.variant.quality.drop * 100 if point.variant.quality else None,
}


def points(variants: Iterable[Variant]) -> list[Point]:
    """Those of the variants that have a finite latency at the SLO's rate, and an accuracy where
    any has one."""
    variants = list(variants)
    judged = any(variant.quality is not None for variant in variants)
    found = []
    for variant in variants:
        quality, serving = variant.quality, variant.serving
        if serving is not None and (quality is not None or not judged):
            latency_s, cost = serving.prediction.slo_latency_s, serving.cost_per_million
            if math.isfinite(latency_s):
                value = quality.value if quality is not None else None
                found.append(Point(variant, latency_s, value, cost))
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
        if point.variant.quality is None or point.variant.quality.drop <= limit
    ]


def pareto_views(result: StudyResult) -> dict[str, Figure]:
    """The chart in each plane that the variants have figures for, by the plane's name."""
    drawn = drawn_points(result)
    return {
        view.name: pareto_chart(result, view)
        for view in VIEWS
        if all(
            any(_VALUES[axis](point) is not None for point in drawn) for axis in (view.x, view.y)
        )
    }


def pareto_chart(result: StudyResult, view: View = VIEWS[0]) -> Figure:
    """Every variant in the plane of the view, the front and the SLO's limits drawn."""
    drawn = drawn_points(result)
    front = pareto_front(result.variants)
    colours = colour_bar(
        [_VALUES[view.colour](point) for point in drawn], _title(result, view.colour)
    )
    groups = {
        "breaks the SLO": ("x-thin", ("infeasible", "dropped")),
        "candidate": ("circle", ("verified", "unverified")),
        "chosen": ("star", ("chosen",)),
    }
    data = [_front_line(view, drawn, front)]
    for name, (symbol, statuses) in groups.items():
        if group := [point for point in drawn if point.variant.status in statuses]:
            trace = _markers(result, view, group, front) | {"name": name}
            trace["marker"] |= colours | _shape(symbol, len(drawn) > CROWDED)
            if view.y == "accuracy":
                trace["error_y"] = _drop_intervals(result, group, len(drawn) > CROWDED)
            data.append(trace)
    data += _measurements(view, drawn)
    return {"data": data, "layout": _layout(result, view, drawn)}


def _markers(
    result: StudyResult, view: View, group: Sequence[Point], front: frozenset[str]
) -> Figure:
    on_front = [point.variant.id in front for point in group]
    quantile = f"p{result.slo.latency.quantile * 100:g}"
    return {
        "mode": "markers",
        "x": [_VALUES[view.x](point) for point in group],
        "y": [_VALUES[view.y](point) for point in group],
        "customdata": [
            [escaped(point.variant.label), *_hovered(point), "on" if shown else "behind"]
            for point, shown in zip(group, on_front, strict=True)
        ],
        "hovertemplate": f"<b>%{{customdata[0]}}</b><br>%{{customdata[1]}} ms {quantile}, "
        "%{customdata[2]}<br>%{customdata[3]}, %{customdata[4]}<br>%{customdata[5]} the front"
        "<extra></extra>",
        "marker": {
            "color": [_VALUES[view.colour](point) for point in group],
            "line": {"width": [2.5 if shown else 0 for shown in on_front], "color": "var(--ink)"},
        },
    }


def _hovered(point: Point) -> list[str]:
    accuracy = "no accuracy" if point.accuracy is None else f"{point.accuracy * 100:.2f}%"
    return [
        f"{point.latency_s * 1e3:.2f}",
        accuracy,
        f"{point.cost:.3g} per million" if math.isfinite(point.cost) else "no rate within the SLO",
        bytes_(point.variant.size_bytes),
    ]


def _shape(symbol: str, is_crowded: bool) -> Figure:
    shape: Figure = {"symbol": symbol, "size": 22 if symbol == "star" else 8 if is_crowded else 13}
    if symbol == "x-thin":  # it has no area: only its line is seen
        shape["size"] = 6 if is_crowded else 13
        shape["line"] = {"width": 1.2 if is_crowded else 2.5, "color": "var(--violated)"}
    return shape


def _drop_intervals(result: StudyResult, group: Sequence[Point], is_crowded: bool) -> Figure:
    """The interval of the drop against the base, around the accuracy."""
    above, below = [], []
    for point in group:
        variant, quality = point.variant, point.variant.quality
        shown = not is_crowded or variant.status == "chosen" or variant.id == result.baseline_id
        above.append((quality.drop - quality.drop_lower) * 100 if quality and shown else 0.0)
        below.append((quality.drop_upper - quality.drop) * 100 if quality and shown else 0.0)
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": "var(--faint)",
        "thickness": 1.2,
        "width": 0,
    }


def _front_line(view: View, drawn: Sequence[Point], front: frozenset[str]) -> Figure:
    """The front as seen in this plane: the best y up to each x, of all on it. Size isn't what
    it is of, so there is none in that plane."""
    sign = -1.0 if view.y == "accuracy" else 1.0
    best, steps = math.inf, []
    of_front = [
        (x, y)
        for point in drawn
        if point.variant.id in front
        and (x := _VALUES[view.x](point)) is not None
        and (y := _VALUES[view.y](point)) is not None
    ]
    for x, y in sorted(of_front, key=lambda pair: (pair[0], sign * pair[1])):
        if sign * y < best and view.x != "size":
            best = sign * y
            steps.append((x, y))
    return {
        "name": "front",
        "mode": "lines",
        "x": [x for x, _ in steps],
        "y": [y for _, y in steps],
        "line": {"color": "var(--soft)", "width": 1.5, "shape": "hv", "dash": "dot"},
        "hoverinfo": "skip",
        "showlegend": bool(steps),
    }


def _measurements(view: View, drawn: Sequence[Point]) -> list[Figure]:
    """From each prediction that was put to the test, a line to what was measured."""
    if view.x != "latency":
        return []
    x: list[float | None] = []
    y: list[float | None] = []
    for point in drawn:
        verification, other = point.variant.verification, _VALUES[view.y](point)
        if verification is not None and verification.slo_latency_s is not None:
            x += [point.latency_s * 1e3, verification.slo_latency_s * 1e3, None]
            y += [other, other, None]
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


def _layout(result: StudyResult, view: View, drawn: Sequence[Point]) -> Figure:
    layout = axes(_title(result, view.x), _title(result, view.y))
    limits = _limits(result)
    for name, quantity in (("xaxis", view.x), ("yaxis", view.y)):
        layout[name] |= _range(result, quantity, drawn)
    layout["shapes"], layout["annotations"] = _limit_marks(layout, view, limits)
    for point in drawn:
        if point.variant.status == "chosen" or point.variant.id == result.baseline_id:
            x, y = _VALUES[view.x](point), _VALUES[view.y](point)
            if x is not None and y is not None:
                place = place_on(layout["xaxis"], x), place_on(layout["yaxis"], y)
                layout["annotations"].append(_label(point, *place, layout["xaxis"]["range"]))
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}}
    return layout


def _title(result: StudyResult, quantity: Quantity) -> str:
    metrics = [v.quality.metric for v in result.variants if v.quality is not None]
    return _TITLES[quantity].format(
        quantile=f"p{result.slo.latency.quantile * 100:g}",
        metric=escaped(metrics[0] if metrics else "accuracy"),
    )


def _limits(result: StudyResult) -> dict[Quantity, float]:
    """What the SLO says, in the units of the axes."""
    limits: dict[Quantity, float] = {"latency": result.slo.latency.threshold_ms}
    baseline, objective = result.baseline, result.slo.accuracy
    if objective is not None and baseline is not None and baseline.quality is not None:
        base = (baseline.quality.value + baseline.quality.drop) * 100
        limits["accuracy"] = base - objective.max_drop_points
    return limits


def _range(result: StudyResult, quantity: Quantity, drawn: Sequence[Point]) -> Figure:
    limits = [limit] if (limit := _limits(result).get(quantity)) is not None else []
    if quantity == "accuracy":
        return {"range": _accuracy_range(drawn, limits)}
    values = [value for point in drawn if (value := _VALUES[quantity](point)) is not None]
    if quantity == "latency":
        loaded = [point.variant.verification for point in drawn]
        values += [one.slo_latency_s * 1e3 for one in loaded if one and one.slo_latency_s]
    return axis_range([*values, *limits])


def _accuracy_range(drawn: Sequence[Point], limits: Sequence[float]) -> list[float]:
    """In percent, with room for the intervals of those that keep the SLO."""
    values = [point.accuracy * 100 for point in drawn if point.accuracy is not None]
    for point in drawn:
        quality = point.variant.quality
        if quality is not None and not point.variant.reasons:
            base = quality.value + quality.drop
            values += [(base - quality.drop_lower) * 100, (base - quality.drop_upper) * 100]
    values += limits
    low, high = min(values, default=0.0), max(values, default=100.0)
    pad = max((high - low) * 0.12, 0.1)
    return [low - pad, high + pad]


def _limit_marks(
    layout: Figure, view: View, limits: dict[Quantity, float]
) -> tuple[list[Figure], list[Figure]]:
    """Lines and words at the SLO's limits, and the part of the plane that they leave."""
    shapes: list[Figure] = []
    words: list[Figure] = []
    corner: Figure = {"x0": 0, "x1": 1, "y0": 0, "y1": 1, "xref": "paper", "yref": "paper"}
    for axis, quantity in (("x", view.x), ("y", view.y)):
        if quantity not in limits:
            continue
        limit = limits[quantity]
        # Annotations, unlike shapes, want the logarithm on a logarithmic axis.
        place = place_on(layout[f"{axis}axis"], limit)
        text = "accuracy floor" if quantity == "accuracy" else "latency limit"
        corner[f"{axis}ref"] = axis
        if axis == "x":
            shapes.append(limit_line(x=limit))
            words.append(note(text, x=place, xanchor="right", y=0, yref="paper", yanchor="bottom"))
            corner |= {"x0": 1e-6, "x1": limit}  # not 0, for logarithms
        else:
            shapes.append(limit_line(y=limit))
            words.append(note(text, x=0, xref="paper", xanchor="left", y=place, yanchor="bottom"))
            top = 100.0 + limit
            corner |= {"y0": limit, "y1": top}
    style = {"line": {"width": 0}, "fillcolor": "var(--allowed)", "layer": "below"}
    return [*shapes, {"type": "rect", **corner, **style}], words


def _label(point: Point, x: float, y: float, x_range: Sequence[float]) -> Figure:
    """Beside the mark, on the side that has room."""
    name = escaped(point.variant.label)
    is_right = x > x_range[0] + 0.65 * (x_range[1] - x_range[0])
    return {
        "text": f"<b>{name}</b>" if point.variant.status == "chosen" else name,
        "x": x,
        "y": y,
        "showarrow": True,
        "arrowhead": 0,
        "arrowcolor": "var(--soft)",
        "ax": -30 if is_right else 30,
        "ay": -34 if point.variant.status == "chosen" else 34,
        "xanchor": "right" if is_right else "left",
        "font": {"color": "var(--ink)", "size": 12.5},
    }
