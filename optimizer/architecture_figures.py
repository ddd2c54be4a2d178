"""Charts of a search for another network: all that was looked at, and how fast proposers learned.

They show what the record has and compute nothing of it.
"""

from collections.abc import Sequence

from optimizer.architectures import ArchitectureRecord, Network, ProposerRecord
from optimizer.chart import Figure, axes, axis_range, escaped, limit_line, note, place_on

MAX_DOTS = 2000
"""Of a proposer: beyond, every so many is drawn. The front is drawn whole."""
_COLOURS = ("accent", "series-2", "series-3", "series-4")
_SYMBOLS = {"fp32": "circle", "int8": "diamond-open"}
_LEGEND = {"orientation": "h", "y": -0.28, "yanchor": "top", "font": {"size": 12}}


def accuracy_by_latency(record: ArchitectureRecord) -> Figure:
    """Every network by proposer, with the front as stairs and the target as a line; int8 ones are
    hollow."""
    layout = axes("ms per batch, by the table of layers", "accuracy on a part of train")
    latencies = [1e3 * one.latency_s for trail in record.proposers for one in trail.networks]
    target = 1e3 * record.target_s
    layout["xaxis"] |= axis_range([*latencies, target])
    layout["yaxis"] |= {"tickformat": ".0%"}
    layout["legend"] = _LEGEND
    layout["shapes"] = [limit_line(x=target)]
    layout["annotations"] = [
        note("target", x=place_on(layout["xaxis"], target), y=1, yref="paper", xanchor="left",
             yanchor="bottom")
    ]  # fmt: skip
    dots = [_dots(trail, colour) for trail, colour in _coloured(record)]
    return {"data": [*dots, _front(record.front)], "layout": layout}


def regret_by_evaluation(record: ArchitectureRecord) -> Figure:
    """Each proposer's regret after each network that it looked at."""
    layout = axes("networks looked at", "regret, in reward")
    layout["legend"] = _LEGEND
    layout["yaxis"] |= {"rangemode": "tozero"}
    return {
        "data": [_regret(trail, colour) for trail, colour in _coloured(record)],
        "layout": layout,
    }


def _coloured(record: ArchitectureRecord) -> list[tuple[ProposerRecord, str]]:
    return list(zip(record.proposers, _COLOURS, strict=False))


def _dots(trail: ProposerRecord, colour: str) -> Figure:
    every = -(-len(trail.networks) // MAX_DOTS)
    shown = trail.networks[:: max(1, every)]
    return {
        "mode": "markers",
        "name": escaped(trail.name),
        "x": [1e3 * one.latency_s for one in shown],
        "y": [one.accuracy for one in shown],
        "customdata": [one.precision for one in shown],
        "hovertemplate": "%{y:.2%} in %{x:.3g} ms, %{customdata}<extra>"
        + escaped(trail.name)
        + "</extra>",
        "marker": {
            "size": 8,
            "opacity": 0.7,
            "color": f"var(--{colour})",
            "symbol": [_SYMBOLS.get(one.precision, "square") for one in shown],
        },
    }


def _front(front: Sequence[Network]) -> Figure:
    return {
        "mode": "lines",
        "name": "front",
        "x": [1e3 * one.latency_s for one in front],
        "y": [one.accuracy for one in front],
        "line": {"color": "var(--ink)", "width": 1.5, "shape": "hv"},
        "hoverinfo": "skip",
    }


def _regret(trail: ProposerRecord, colour: str) -> Figure:
    """The first, the last, and those at which it changes: between them it stays."""
    last = len(trail.regret) - 1
    steps = [
        (index + 1, value)
        for index, value in enumerate(trail.regret)
        if index in (0, last) or value != trail.regret[index - 1]
    ]
    return {
        "mode": "lines",
        "name": escaped(trail.name),
        "x": [n for n, _ in steps],
        "y": [value for _, value in steps],
        "line": {"color": f"var(--{colour})", "width": 2.5, "shape": "hv"},
        "hovertemplate": "%{y:.4f} after %{x}<extra>" + escaped(trail.name) + "</extra>",
    }
