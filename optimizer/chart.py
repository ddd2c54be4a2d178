"""What the charts of a report share, as Plotly's own JSON.

Colours are names of CSS variables, which the page resolves, so that a chart follows the page
into the dark. Nothing here knows the page or a study.
"""

import math
from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]

LOGARITHMIC_FROM = 8.0
"""The ratio of the largest to the smallest value from which an axis is logarithmic."""
MIN_SPAN = 0.1
"""Relative: values that are nearer to each other get nearly one colour."""
SATURATED = 8.0
"""Times the lowest value: what is beyond has the last colour, so that the rest is told apart."""
_FONT = {"family": "inherit", "size": 12.5, "color": "var(--soft)"}


def axes(x: str, y: str) -> Figure:
    """A layout with titled axes, transparent, so that the page's card shows through."""
    axis = {
        "gridcolor": "var(--rule)",
        "zeroline": False,
        "linecolor": "var(--rule)",
        "automargin": True,
    }
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": _FONT,
        "margin": {"l": 8, "r": 8, "t": 24, "b": 8},
        "xaxis": {**axis, "title": {"text": x, "standoff": 12}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 12}},
        "hoverlabel": {
            "bgcolor": "var(--card)", "bordercolor": "var(--rule)",
            "font": {"color": "var(--ink)", "family": "inherit"}, "align": "left",
        },
        "showlegend": True,
    }  # fmt: skip


def axis_range(values: Sequence[float]) -> Figure:
    """An axis for the values, which are above 0: logarithmic where they are far apart."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    if high < LOGARITHMIC_FROM * low:
        return {"range": [0, high * 1.15]}
    margin = 0.08 * math.log10(high / low) + 0.02
    ticks = [d * 10.0**e for e in range(-4, 7) for d in (1, 2, 5)]
    shown = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    return {
        "type": "log",
        "range": [math.log10(low) - margin, math.log10(high) + margin],
        "tickvals": shown,
        "ticktext": [f"{tick:g}" for tick in shown],
        "minor": {"showgrid": False},
    }


def round_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About `n` round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def place_on(axis: Figure, value: float) -> float:
    """Where an annotation goes: it wants the logarithm on a logarithmic axis, shapes don't."""
    return math.log10(value) if axis.get("type") == "log" and value > 0 else value


def colour_bar(values: Sequence[float | None], title: str) -> Figure:
    """Colours of marks by their values, and the bar that explains them."""
    known = [value for value in values if value is not None] or [1.0]
    low, high = min(known), max(known)
    if low > 0:
        high = min(high, SATURATED * low)
    spread = max(0.0, MIN_SPAN * abs(high) - (high - low)) / 2
    return {
        "cmin": low - spread,
        "cmax": high + spread,
        "colorscale": [[0, "var(--cheap)"], [0.5, "var(--middling)"], [1, "var(--dear)"]],
        "showscale": True,
        "colorbar": {
            "title": {"text": title, "side": "top", "font": {"size": 11}},
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


def limit_line(x: float | None = None, y: float | None = None) -> Figure:
    """Across the whole plot at x or y."""
    shape: Figure = {
        "type": "line",
        "line": {"color": "var(--limit)", "width": 1.5, "dash": "dash"},
    }
    if x is not None:
        shape |= {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    if y is not None:
        shape |= {"y0": y, "y1": y, "x0": 0, "x1": 1, "xref": "paper"}
    return shape


def note(text: str, **place: Any) -> Figure:
    """A word beside a limit."""
    return {"text": text, "showarrow": False, "font": {"color": "var(--limit)", "size": 11.5},
            **place}  # fmt: skip


def escaped(text: str) -> str:
    """Plotly reads a little HTML in its texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
