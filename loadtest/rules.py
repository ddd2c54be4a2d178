"""Rules: an SLO as Prometheus' recording rules and alerts, from the server's own histogram.

The histogram of each model has an edge exactly on the threshold, so the share of slow requests is
counted, not interpolated. Bad for the latency objective is what was answered too late or not
answered; bad for the success objective what was not answered. Requests that the client spoilt count
for neither, nor those that it gave up before the threshold; those that it gave up later are bad.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtest.burn import BurnWindow, Unreachable, burn_windows, shown
from loadtest.slo import Slo

REQUESTS = "trimserve_request_duration_seconds"
IN_FLIGHT = "trimserve_requests_in_flight"
CLIENTS_FAULTS = ("invalid_request", "model_not_found", "payload_too_large", "unsupported_encoding",
                  "forbidden", "not_supported")  # fmt: skip
"""Values of the label `code` that say nothing of the server."""
OK, CANCELLED = "ok", "cancelled"
MIN_REQUESTS = 100
"""In an alert's long window, below which shares are noise and it stays silent."""
_RUNBOOKS = "docs/runbooks.md"
Rule = dict[str, object]


@dataclass(frozen=True)
class Indicator:
    """What an objective counts: `bad` and `total` are PromQL of counters' rates over `{window}`."""

    name: str
    budget: float
    bad: str
    total: str
    words: str

    def over(self, window_s: float) -> str:
        """The share of bad requests."""
        window = shown(window_s)
        return f"({self.bad}) / ({self.total})".replace("{window}", window)

    def recorded(self, window_s: float) -> str:
        """The name of the rule that records that share."""
        return f"slo:{self.name}_bad:ratio_rate{shown(window_s)}"


@dataclass(frozen=True)
class SloRules:
    """`groups` as a rule file has them, and the windows that an objective can't reach."""

    groups: tuple[Mapping[str, object], ...]
    left_out: Mapping[str, Sequence[Unreachable]]

    def document(self) -> dict[str, object]:
        return {"groups": [dict(group) for group in self.groups]}


def prometheus_rule(slo: Slo, rules: SloRules) -> dict[str, object]:
    """The rules as the resource of the Prometheus operator, named after the SLO."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": f"slo-{slo.name}",
            "labels": {"app.kubernetes.io/part-of": "trimserve"},
        },
        "spec": rules.document(),
    }


def edge(seconds: float) -> str:
    """The threshold as the label `le` has it."""
    return repr(float(seconds))


def indicators(slo: Slo, model: str) -> tuple[Indicator, ...]:
    """Those of the SLO's objectives that have an error budget, for one model of the server."""
    faults = "|".join(CLIENTS_FAULTS)
    counted = f'model="{model}",code!~"{faults}"'
    le = edge(slo.latency.threshold_s)

    def in_time_as(code: str) -> str:
        selector = f'model="{model}",code="{code}",le="{le}"'
        return f"sum(rate({REQUESTS}_bucket{{{selector}}}[{{window}}]))"

    given_up, in_time = in_time_as(CANCELLED), in_time_as(OK)
    total = f"(sum(rate({REQUESTS}_count{{{counted}}}[{{window}}])) - ({given_up} or vector(0)))"
    answered = f'sum(rate({REQUESTS}_count{{model="{model}",code="{OK}"}}[{{window}}]))'

    def missing(part: str) -> str:
        # A counter that has no series yet is 0, not nothing.
        return f"{total} - ({part} or vector(0))"

    found = [
        Indicator(
            "latency",
            1 - slo.latency.quantile,
            missing(in_time),
            total,
            f"answered within {slo.latency.threshold_ms:g} ms",
        )
    ]
    if slo.success_ratio < 1:
        found.append(
            Indicator("success", 1 - slo.success_ratio, missing(answered), total, "answered")
        )
    return tuple(found)


def rules_of(slo: Slo, model: str, period_s: float) -> SloRules:
    """Recording rules of every window, and an alert for each window of each objective.

    Raises ValueError for a model's name that can't stand in a selector.
    """
    if not model or any(one in model for one in '"\\\n'):
        raise ValueError(f"model: got {model!r}, want a name without quotes and backslashes")
    groups: list[Mapping[str, object]] = []
    left_out: dict[str, Sequence[Unreachable]] = {}
    for one in indicators(slo, model):
        windows, unreachable = burn_windows(one.budget, period_s)
        left_out[one.name] = unreachable
        lengths = sorted(
            {length for window in windows for length in (window.long_s, window.short_s)}
        )
        labels = {"slo": slo.name, "objective": one.name, "model": model}
        records: list[Rule] = [
            {"record": one.recorded(length), "expr": one.over(length), "labels": labels}
            for length in lengths
        ]
        groups.append(
            {"name": f"{slo.name}-{one.name}-records", "interval": "30s", "rules": records}
        )
        groups.append(_group(f"{slo.name}-{one.name}-alerts", _alerts(slo, one, windows, labels)))
    groups.append(_group(f"{slo.name}-target", _absent(slo, model)))
    return SloRules(tuple(groups), left_out)


def _group(name: str, rules: Iterable[Rule]) -> Mapping[str, object]:
    return {"name": name, "interval": "30s", "rules": list(rules)}


def _alerts(
    slo: Slo, one: Indicator, windows: Sequence[BurnWindow], labels: Mapping[str, str]
) -> Iterator[Rule]:
    wanted = ",".join(f'{name}="{value}"' for name, value in labels.items())
    for window in windows:
        limit = f"{window.factor * one.budget:.6g}"
        recorded = " and ".join(
            f"{one.recorded(length)}{{{wanted}}} > {limit}"
            for length in (window.long_s, window.short_s)
        )
        counted = one.total.replace("rate(", "increase(").replace("{window}", shown(window.long_s))
        after = shown(window.long_s)
        name = f"{one.name.capitalize()}Budget{window.severity.capitalize()}{after}"
        yield {
            "alert": name,
            "expr": f"{recorded} and on() ({counted}) > {MIN_REQUESTS}",
            "for": "1m",
            "labels": {**labels, "severity": window.severity, "window": after},
            "annotations": {
                "summary": (
                    f"{labels['model']}: the {one.name} budget of {slo.name} burns "
                    f"{window.factor:.3g} times too fast"
                ),
                "description": (
                    f"Over {after} and over {shown(window.short_s)} more than {limit} of the "
                    f"requests were not {one.words}; {1 - one.budget:.6g} have to be. At this rate "
                    f"{window.budget_share:.0%} of the budget is gone in {after}."
                ),
                "runbook": f"{_RUNBOOKS}#{one.name}-budget",
            },
        }


def _absent(slo: Slo, model: str) -> Iterator[Rule]:
    """No metrics are no good news."""
    yield {
        "alert": "ModelAbsent",
        "expr": f'absent(trimserve_model_info{{model="{model}"}})',
        "for": "5m",
        "labels": {"slo": slo.name, "model": model, "severity": "page"},
        "annotations": {
            "summary": f"{model}: no server that Prometheus scrapes has it",
            "description": "For 5 minutes no target exported trimserve_model_info for the model: "
            "servers are down, not scraped, or the model isn't loaded.",
            "runbook": f"{_RUNBOOKS}#model-absent",
        },
    }
