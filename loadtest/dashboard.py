"""Dashboard: an SLO's state as a Grafana dashboard, plain JSON to be imported or provisioned.

Every query reads the server's metrics or the rules of `loadtest.rules`.
"""

from collections.abc import Sequence
from itertools import count

from loadtest.burn import burn_windows, shown
from loadtest.rules import IN_FLIGHT, REQUESTS, Indicator, indicators
from loadtest.scaling import scaling_query
from loadtest.slo import Slo

_SCHEMA = 39
"""Of Grafana 10.3 and later, which migrate it."""
_HEIGHT, _HALF = 8, 12
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_PHASES = "trimserve_phase_duration_seconds"
_QUANTILES = (0.5, 0.95, 0.99)
Target = tuple[str, str]
"""Query and legend."""


def dashboard(slo: Slo, model: str, period_s: float) -> dict[str, object]:
    """With a variable for the data source, and nothing else to set up."""
    of_model = f'model="{model}"'
    panels = [
        *(_burn_panel(slo, one, model, period_s) for one in indicators(slo, model)),
        _panel(
            "Latency",
            [(_quantile(of_model, one), f"p{100 * one:g}") for one in _QUANTILES],
            "s",
            limit=slo.latency.threshold_s,
            note="Interpolated between the edges of the histogram: the promise is judged above, by "
            "counting.",
        ),
        _panel(
            "Requests by outcome",
            [(f"sum by (code) (rate({REQUESTS}_count{{{of_model}}}[1m]))", "{{code}}")],
            "reqps",
        ),
        _panel(
            "In flight",
            [
                (scaling_query(model), "mean over a minute"),
                (f"sum({IN_FLIGHT}{{{of_model}}})", "now"),
            ],
            "short",
        ),
        _panel(
            "Rows of a batch",
            [
                (
                    f"sum(rate(trimserve_batch_rows_sum{{{of_model}}}[1m])) / "
                    f"sum(rate(trimserve_batch_rows_count{{{of_model}}}[1m]))",
                    "mean",
                )
            ],
            "short",
        ),
        _panel(
            "Phases",
            [
                (
                    f"sum by (phase) (rate({_PHASES}_sum{{{of_model}}}[1m])) / "
                    f"sum by (phase) (rate({_PHASES}_count{{{of_model}}}[1m]))",
                    "{{phase}}",
                )
            ],
            "s",
        ),
        _panel(
            "Versions",
            [
                (
                    f"sum by (version, engine, precision) (trimserve_model_info{{{of_model}}})",
                    "{{version}} {{engine}} {{precision}}",
                )
            ],
            "short",
        ),
    ]
    return {
        "title": f"{model}: {slo.name}",
        "uid": f"trimserve-{slo.name}"[:40],
        "tags": ["trimserve", "slo"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": _placed(panels),
    }


def queries(document: dict[str, object]) -> list[str]:
    """Every PromQL expression of a dashboard."""
    panels: list[dict[str, object]] = document["panels"]  # type: ignore[assignment]
    targets: list[dict[str, str]] = [one for panel in panels for one in panel["targets"]]  # type: ignore[attr-defined]
    return [one["expr"] for one in targets]


def _burn_panel(slo: Slo, one: Indicator, model: str, period_s: float) -> dict[str, object]:
    """Burn rates, 1 is as fast as the budget allows."""
    windows, _ = burn_windows(one.budget, period_s)
    selector = f'slo="{slo.name}",objective="{one.name}",model="{model}"'
    lengths = sorted({length for window in windows for length in (window.long_s, window.short_s)})
    return _panel(
        f"Budget of {one.name}: how fast it burns",
        [
            (f"{one.recorded(length)}{{{selector}}} / {one.budget:.6g}", shown(length))
            for length in lengths
        ],
        "short",
        limit=1.0,
        note=f"1: the {one.budget:.4g} of requests that need not be {one.words} are just used up "
        f"in {shown(period_s)}.",
    )


def _quantile(of_model: str, share: float) -> str:
    rates = f"sum by (le) (rate({REQUESTS}_bucket{{{of_model}}}[1m]))"
    return f"histogram_quantile({share:g}, {rates})"


def _panel(
    title: str,
    targets: Sequence[Target],
    unit: str,
    limit: float | None = None,
    note: str = "",
) -> dict[str, object]:
    steps: list[dict[str, object]] = [{"color": "green", "value": None}]
    if limit is not None:
        steps.append({"color": "red", "value": limit})
    custom = {"thresholdsStyle": {"mode": "line" if limit is not None else "off"}}
    return {
        "type": "timeseries",
        "title": title,
        "description": note,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "min": 0,
                "custom": custom,
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(targets)
        ],
    }


def _placed(panels: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Two in a row."""
    return [
        {
            **panel,
            "id": number,
            "gridPos": {
                "x": _HALF * ((number - 1) % 2),
                "y": _HEIGHT * ((number - 1) // 2),
                "w": _HALF,
                "h": _HEIGHT,
            },
        }
        for number, panel in zip(count(1), panels)
    ]
