"""The record of a search for the highest rate as one HTML page that opens offline."""

from loadtest.capacity_report import CapacityReport
from loadtest.html import COLOURS, Figure, line, render

TEMPLATE = "capacity.html"


def render_capacity(report: CapacityReport) -> str:
    """The report as one page that opens offline."""
    figures = {"latency": latency_curve(report), "goodput": goodput_curve(report)}
    if any(one.batch_rows is not None for one in report.points):
        figures["batches"] = _curve(report, {"rows of a batch": "batch_rows"}, "rows", 1.0)
    return render(TEMPLATE, figures, report=report)


def latency_curve(report: CapacityReport) -> Figure:
    """p50, p95 and p99 against the rate, with the threshold and the capacity."""
    names = {"p50": "p50_s", "p95": "p95_s", "p99": "p99_s"}
    figure = _curve(report, names, "latency, ms", 1e3)
    threshold_ms = report.slo.latency.threshold_ms
    figure["layout"]["yaxis"]["type"] = "log"
    figure["layout"]["shapes"].append(
        line(xref="paper", x0=0, x1=1, y0=threshold_ms, y1=threshold_ms)
    )
    return figure


def goodput_curve(report: CapacityReport) -> Figure:
    figure = _curve(report, {"good": "goodput_per_s"}, "goodput, requests/s", 1.0)
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return figure


def _curve(report: CapacityReport, names: dict[str, str], title: str, factor: float) -> Figure:
    points = sorted(report.points, key=lambda one: one.rate_per_s)
    shapes = []
    if report.capacity_per_s is not None:
        at = report.capacity_per_s
        shapes.append(line(yref="paper", x0=at, x1=at, y0=0, y1=1, dash="dot"))
    traces = []
    for name, field in names.items():
        values = [getattr(one, field) for one in points]
        traces.append(
            {
                "x": [one.rate_per_s for one in points],
                "y": [None if value is None else value * factor for value in values],
                "name": name,
                "mode": "lines+markers",
                "line": {"color": COLOURS.get(name, COLOURS["p95"]), "width": 2},
                "hovertemplate": "%{y:.4g} at %{x:.4g}/s",
            }
        )
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "requests/s"}},
            "yaxis": {"title": {"text": title}},
            "shapes": shapes,
            "showlegend": len(names) > 1,
        },
    }
