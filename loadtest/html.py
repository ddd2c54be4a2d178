"""A load test's report as one HTML page that opens offline: text by Jinja2, charts by Plotly.

Everything on the page comes from the JSON report. Charts are written as Plotly's own JSON, so
that of its Python package only the script itself is used.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loadtest.chaos.facts import bands, summary_of
from loadtest.drift_facts import memory_chart
from loadtest.report import LatencyQuantile, Report
from loadtest.verdict import Outcome

TEMPLATE = "report.html"
TITLES: dict[Outcome, str] = {
    "met": "The promise was kept",
    "violated": "The promise was broken",
    "inconclusive": "Nothing can be concluded",
}
TAIL_TICKS = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
COLOURS = {
    "good": "#2f9e6e",
    "bad": "#d6453d",
    "threshold": "#e08a00",
    "p50": "#8fb4e8",
    "p95": "#4a7fd0",
    "p99": "#23468c",
}
Figure = dict[str, Any]


def render_html(report: Report) -> str:
    figures = {
        "distribution": distribution(report),
        "latency": latency_timeline(report),
        "rate": rate_timeline(report),
    }
    if report.drift is not None and report.drift.memory:
        figures["memory"] = memory_chart(report.drift)
    return render(TEMPLATE, figures, report=report, title=TITLES[report.verdict])


def render(template: str, figures: dict[str, Figure], **content: object) -> str:
    """One of the pages of `templates/`, with its charts by the names of their elements."""
    environment = Environment(
        loader=PackageLoader("loadtest"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = percent
    environment.filters["milliseconds"] = milliseconds
    environment.filters["summary_of"] = summary_of
    return environment.get_template(template).render(
        figures=script_json(figures),
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - Plotly's own script, nothing of a report
        **content,
    )


def distribution(report: Report) -> Figure:
    """Share of requests (logarithmic towards 100 %) against the latency they didn't exceed.

    A tail is read off such an axis, where a plain cumulative curve hides it in one pixel.
    """
    points = [one for one in report.curve if one.latency_s is not None]
    n = report.requests.n
    # The last request's share is 1, which has no logarithm: it is drawn half a request below.
    remaining = [max(1 - one.quantile, 0.5 / n) for one in points]
    threshold_ms = report.slo.latency.threshold_ms
    wanted = report.slo.latency.quantile
    ticks = [tick for tick in TAIL_TICKS if 1 - tick >= 0.4 / n]
    return {
        "data": [
            {
                "x": [one.latency_s * 1e3 for one in points if one.latency_s is not None],
                "y": remaining,
                "customdata": [one.quantile * 100 for one in points],
                "mode": "lines",
                "name": "latency",
                "line": {"color": COLOURS["p95"], "width": 2.5},
                "hovertemplate": "%{customdata:.4g} % within %{x:.3g} ms<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "latency, ms"}, **log_axis(points)},
            "yaxis": {
                "type": "log",
                "autorange": "reversed",
                "title": {"text": "share of requests"},
                "tickvals": [1 - tick for tick in ticks],
                "ticktext": [f"{tick * 100:.6g} %" for tick in ticks],
            },
            "shapes": [
                line(x0=threshold_ms, x1=threshold_ms, yref="paper", y0=0, y1=1),
                line(xref="paper", x0=0, x1=1, y0=1 - wanted, y1=1 - wanted, dash="dot"),
            ],
            "showlegend": False,
        },
    }


def latency_timeline(report: Report) -> Figure:
    times = [one.start_s for one in report.timeline]
    threshold_ms = report.slo.latency.threshold_ms
    traces = [
        {
            "x": times,
            "y": [None if value is None else value * 1e3 for value in values],
            "name": name,
            "mode": "lines+markers",
            "marker": {"size": 4},
            "line": {"color": COLOURS[name], "width": 2},
            "hovertemplate": "%{y:.3g} ms",
        }
        for name, values in (
            ("p50", [one.p50_s for one in report.timeline]),
            ("p95", [one.p95_s for one in report.timeline]),
            ("p99", [one.p99_s for one in report.timeline]),
        )
    ]
    disturbed = bands(report.chaos, report.run.duration_s)
    limit = line(xref="paper", x0=0, x1=1, y0=threshold_ms, y1=threshold_ms)
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "intended send, s"}},
            "yaxis": {"title": {"text": "latency, ms"}, **log_axis(report.curve)},
            "shapes": [limit, *disturbed["shapes"]],
            "annotations": disturbed["annotations"],
            "hovermode": "x unified",
        },
    }


def rate_timeline(report: Report) -> Figure:
    times = [one.start_s + report.bin_s / 2 for one in report.timeline]
    bars = [
        {
            "type": "bar",
            "x": times,
            "y": values,
            "width": report.bin_s,
            "name": name,
            "marker": {"color": COLOURS[name]},
            "hovertemplate": "%{y:.4g}/s",
        }
        for name, values in (
            ("good", [one.good_per_s for one in report.timeline]),
            ("bad", [one.bad_per_s for one in report.timeline]),
        )
    ]
    return {
        "data": bars,
        "layout": {
            "barmode": "stack",
            "bargap": 0,
            "xaxis": {"title": {"text": "intended send, s"}},
            "yaxis": {"title": {"text": "requests/s"}, "rangemode": "tozero"},
            **bands(report.chaos, report.run.duration_s),
            "hovermode": "x unified",
        },
    }


def log_axis(points: Sequence[LatencyQuantile]) -> Figure:
    """A logarithmic axis in milliseconds with every label written out: 1, 2, 5, 10 and so on."""
    seen_ms = [one.latency_s * 1e3 for one in points if one.latency_s]
    low, high = (min(seen_ms), max(seen_ms)) if seen_ms else (1.0, 1000.0)
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def line(dash: str = "dash", **where: object) -> Figure:
    """A straight line in the colour of the objective."""
    return {
        "type": "line",
        "line": {"color": COLOURS["threshold"], "width": 1.5, "dash": dash},
        **where,
    }


def script_json(value: object) -> Markup:
    """JSON that is safe inside a <script> element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped just above


def percent(share: float | None) -> str:
    return "none" if share is None else f"{share * 100:.5g} %"


def milliseconds(seconds: float | None) -> str:
    """Three significant digits."""
    return "no answer" if seconds is None else f"{float(f'{seconds * 1e3:.3g}'):g} ms"
