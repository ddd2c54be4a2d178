"""Charts of a study's times: by batch size, and predicted against measured."""

import math

from optimizer.chart import Figure, axes, axis_range, escaped, limit_line
from optimizer.result import InstanceTimes, StudyResult, Variant

MAX_LINES = 5
"""Variants drawn in the chart of latency by batch size."""
PREDICTION_TOLERANCE = 0.15
_LINE_COLOURS = ("accent", "series-1", "series-2", "series-3", "series-4")


def latency_by_batch_size(result: StudyResult) -> Figure | None:
    """Median seconds of a batch, and up to the 99th percentile as a band, of the best variants
    in their serving configuration; None if nothing was timed."""
    measured = [variant for variant in result.variants if variant.service_times]
    if not measured:
        return None
    shown = sorted(measured, key=lambda variant: _rank(result, variant))[:MAX_LINES]
    data: list[Figure] = []
    for variant, colour in zip(shown, _LINE_COLOURS, strict=False):
        data += _line_with_band(variant.label, _served_times(variant), colour)
    layout = axes("rows in a batch", "ms per batch")
    sizes = {time.batch_size for variant in shown for time in _served_times(variant).times}
    layout["xaxis"] |= {"type": "log", "tickvals": sorted(sizes), "tickformat": "d"}
    layout["yaxis"] |= axis_range([y for trace in data for y in trace["y"]])
    layout["legend"] = {"orientation": "h", "y": -0.28, "yanchor": "top", "font": {"size": 12}}
    return {"data": data, "layout": layout}


def predicted_against_measured(result: StudyResult) -> Figure | None:
    """Latency at the SLO's quantile, simulated and in the load test; None if nothing was
    loaded."""
    pairs = [(variant, pair) for variant in result.variants if (pair := _latencies_ms(variant))]
    if not pairs:
        return None
    limit_ms = result.slo.latency.threshold_ms
    top = 1.15 * max(limit_ms, *(value for _, pair in pairs for value in pair))
    layout = axes("predicted, ms", "measured, ms")
    layout["xaxis"] |= {"range": [0, top]}
    layout["yaxis"] |= {"range": [0, top]}
    layout["shapes"] = [limit_line(x=limit_ms), limit_line(y=limit_ms), _tolerance(top)]
    layout["showlegend"] = False
    points = {
        "mode": "markers",
        "x": [predicted for _, (predicted, _) in pairs],
        "y": [measured for _, (_, measured) in pairs],
        "customdata": [escaped(variant.label) for variant, _ in pairs],
        "hovertemplate": "%{customdata}<br>predicted %{x:.2f} ms<br>measured %{y:.2f} ms"
        "<extra></extra>",
        "marker": {"size": 12, "color": "var(--accent)"},
    }
    return {"data": [points], "layout": layout}


def _latencies_ms(variant: Variant) -> tuple[float, float] | None:
    """(predicted, measured), None where one is missing."""
    if variant.serving is None or variant.verification is None:
        return None
    predicted_s = variant.serving.prediction.slo_latency_s
    measured_s = variant.verification.slo_latency_s
    if measured_s is None or not math.isfinite(predicted_s):
        return None
    return predicted_s * 1e3, measured_s * 1e3


def _line_with_band(label: str, times: InstanceTimes, colour: str) -> list[Figure]:
    name = f"{label} · {times.instances}×{times.threads}"
    sizes = [time.batch_size for time in times.times]
    medians = [time.p50_s * 1e3 for time in times.times]
    tails = [time.p99_s * 1e3 for time in times.times]
    edge = {
        "x": sizes,
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": name,
    }
    line = {
        "x": sizes,
        "y": medians,
        "mode": "lines+markers",
        "name": name,
        "legendgroup": name,
        "line": {"color": f"var(--{colour})", "width": 2.5},
        "marker": {"size": 6},
        "hovertemplate": "%{x} rows: %{y:.3g} ms<extra>" + escaped(name) + "</extra>",
    }
    fill = {"fill": "tonexty", "fillcolor": f"var(--{colour}-band)"}
    return [{**edge, "y": tails}, {**edge, "y": medians, **fill}, line]


def _rank(result: StudyResult, variant: Variant) -> tuple[int, float]:
    """The chosen first, then the baseline, then the cheapest."""
    if variant.status == "chosen":
        return 0, 0.0
    cost = variant.serving.cost_per_million if variant.serving else math.inf
    return 1 if variant.id == result.baseline_id else 2, cost


def _served_times(variant: Variant) -> InstanceTimes:
    """Those of the serving configuration that was chosen for it."""
    serving = variant.serving
    for times in variant.service_times:
        if serving and (times.instances, times.threads) == (serving.instances, serving.threads):
            return times
    return variant.service_times[0]


def _tolerance(top: float) -> Figure:
    """The wedge in which a prediction is within `PREDICTION_TOLERANCE` of the measurement."""
    low, high = (1 - PREDICTION_TOLERANCE) * top, top / (1 + PREDICTION_TOLERANCE)
    path = f"M 0 0 L {low} {top} L {top} {top} L {top} {high} Z"
    style = {"fillcolor": "var(--allowed)", "line": {"width": 0}, "layer": "below"}
    return {"type": "path", "path": path, **style}
