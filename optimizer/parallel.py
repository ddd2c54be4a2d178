"""Parallel coordinates of a study: each variant a line across its parameters and its figures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optimizer.chart import Figure, round_ticks
from optimizer.result import Status, StudyResult, Variant

MAX_PARAMETERS = 8
"""Axes of parameters; those that vary most between the variants come first where there are more."""
MAX_CATEGORIES = 12
"""Values that an axis of words names."""
ABSENT = "–"
_THICKER = (-0.005, -0.0025, 0.0025, 0.005)
"""Shares of an axis. Plotly draws all lines equally thin, so the chosen is drawn beside itself."""
_COLOURS: dict[Status, float] = {
    "dropped": 0.0,
    "infeasible": 0.0,
    "unverified": 1.0,
    "verified": 1.0,
    "chosen": 2.0,
}

Value = str | int | float | bool


@dataclass(frozen=True)
class _Axis:
    label: str
    values: tuple[Value | None, ...]
    """By variant; None where a recipe hasn't the parameter."""


def parallel_coordinates(result: StudyResult) -> Figure | None:
    """Parameters, accuracy drop, latency at the SLO's quantile, cost and size of all variants that
    have these; None where fewer than two do. The chosen comes last, over the others."""
    variants = sorted(
        (variant for variant in result.variants if _is_complete(variant)),
        key=lambda variant: _COLOURS[variant.status],
    )
    if len(variants) < 2:
        return None
    numbers = [axis for axis in _figures(result, variants) if _n_values(axis) > 1]
    dimensions = [_dimension(axis) for axis in (*_parameters(variants), *numbers)]
    colours = [_COLOURS[variant.status] for variant in variants]
    for offset in _THICKER if result.chosen is variants[-1] else ():
        colours.append(colours[-1])
        for dimension in dimensions:
            low, high = dimension["range"]
            chosen = dimension["values"][len(variants) - 1]
            dimension["values"].append(chosen + offset * (high - low))
    for dimension in dimensions:
        low, high = dimension["range"]
        margin = 2 * max(_THICKER) * (high - low)
        dimension["range"] = [low - margin, high + margin]
    trace = {
        "type": "parcoords",
        "line": {
            "color": colours,
            "cmin": 0,
            "cmax": 2,
            "colorscale": [[0, "var(--faint)"], [0.5, "var(--middling)"], [1, "var(--accent)"]],
        },
        "unselected": {"line": {"color": "var(--rule)", "opacity": 0.4}},
        "dimensions": dimensions,
        "labelfont": {"size": 12, "color": "var(--ink)"},
        "tickfont": {"size": 11, "color": "var(--soft)"},
        "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"},  # the ticks say it already
        "labelangle": -18,
        "labelside": "top",
    }
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "color": "var(--soft)"},
        "margin": {"l": 72, "r": 56, "t": 96, "b": 24},
    }
    return {"data": [trace], "layout": layout}


def _is_complete(variant: Variant) -> bool:
    serving = variant.serving
    return (
        serving is not None
        and math.isfinite(serving.prediction.slo_latency_s)
        and math.isfinite(serving.cost_per_million)
    )


def _parameters(variants: Sequence[Variant]) -> list[_Axis]:
    """Engine, precision, and the parameters of the recipes in which the variants differ."""
    rows = [_flattened(variant) for variant in variants]
    names = list(dict.fromkeys(name for row in rows for name in row))
    axes = [_Axis(_label(name, names), tuple(row.get(name) for row in rows)) for name in names]
    varied = [axis for axis in axes if _n_values(axis) > 1]
    most = sorted(varied, key=_n_values, reverse=True)[:MAX_PARAMETERS]
    engine = _Axis("engine", tuple(variant.engine for variant in variants))
    precision = _Axis("precision", tuple(variant.precision for variant in variants))
    first = [axis for axis in (engine, precision) if _n_values(axis) > 1]
    return [*first, *(axis for axis in varied if axis in most)]


def _flattened(variant: Variant) -> dict[tuple[str, str], Value]:
    """Parameters by (technique, name); what the engine and precision say already is left out."""
    return {
        (step.technique, name): value
        for step in variant.recipe
        for name, value in step.parameters.items()
        if name not in ("engine", "precision")
    }


def _label(name: tuple[str, str], names: Sequence[tuple[str, str]]) -> str:
    technique, parameter = name
    is_ambiguous = sum(other == parameter for _, other in names) > 1
    words = parameter.replace("_", " ")
    return f"{technique}: {words}" if is_ambiguous else words


def _figures(result: StudyResult, variants: Sequence[Variant]) -> list[_Axis]:
    def axis(label: str, value: Callable[[Variant], float | None]) -> _Axis:
        return _Axis(label, tuple(value(variant) for variant in variants))

    quantile = f"p{result.slo.latency.quantile * 100:g}"
    return [
        axis("drop, points", lambda v: v.quality.drop * 100 if v.quality else None),
        axis(
            f"{quantile} ms",
            lambda v: v.serving.prediction.slo_latency_s * 1e3 if v.serving else None,
        ),
        axis("size, MB", lambda v: v.size_bytes / 1e6 if v.size_bytes is not None else None),
        axis("cost per million", lambda v: v.serving.cost_per_million if v.serving else None),
    ]


def _n_values(axis: _Axis) -> int:
    return len(set(axis.values))


def _dimension(axis: _Axis) -> Figure:
    known = [value for value in axis.values if value is not None]
    numbers = [float(value) for value in known if isinstance(value, int | float)]
    is_numeric = len(numbers) == len(known) and not any(isinstance(v, bool) for v in known)
    if is_numeric and len(set(numbers)) > 4:
        return _of_numbers(axis, numbers)
    return _of_words(axis, numbers if is_numeric else None)


def _of_numbers(axis: _Axis, numbers: Sequence[float]) -> Figure:
    """What has no value lies below the others."""
    low, high = min(numbers), max(numbers)
    if len(numbers) == len(axis.values):
        return {"label": axis.label, "values": list(axis.values), "range": [low, high],
                "tickformat": ".3~g"}  # fmt: skip
    below = low - 0.12 * (high - low)
    ticks = round_ticks(low, high)
    return {
        "label": axis.label,
        "values": [below if value is None else value for value in axis.values],
        "range": [below, high],
        "tickvals": [below, *ticks],
        "ticktext": [ABSENT, *(f"{tick:g}" for tick in ticks)],
    }


def _of_words(axis: _Axis, numbers: Sequence[float] | None) -> Figure:
    found = {value for value in axis.values if value is not None}
    ordered: list[Value] = sorted(found) if numbers is not None else sorted(found, key=str)
    names: list[Value | None] = [*([None] if None in axis.values else []), *ordered]
    places = {name: place for place, name in enumerate(names)}
    shown = (
        names if len(names) <= MAX_CATEGORIES else names[:: math.ceil(len(names) / MAX_CATEGORIES)]
    )
    return {
        "label": axis.label,
        "values": [places[value] for value in axis.values],
        "range": [0, max(1, len(names) - 1)],
        "tickvals": [places[name] for name in shown],
        "ticktext": [_word(name) for name in shown],
    }


def _word(value: Value | None) -> str:
    """Plotly draws these as plain text."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:24]
