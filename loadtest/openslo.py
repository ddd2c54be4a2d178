"""OpenSLO: the SLO in the vendor-neutral format (https://openslo.com, v1)."""

from collections.abc import Iterator

from loadtest.burn import shown
from loadtest.rules import Indicator, indicators
from loadtest.slo import Slo

_RATE_WINDOW_S = 300.0


def openslo_documents(slo: Slo, model: str, period_s: float) -> Iterator[dict[str, object]]:
    """A service, and an SLO of it for each objective that has an error budget."""
    yield {
        "apiVersion": "openslo/v1",
        "kind": "Service",
        "metadata": {"name": slo.name, "displayName": model},
        "spec": {"description": f"The model {model}, served by trimserve"},
    }
    for one in indicators(slo, model):
        yield {
            "apiVersion": "openslo/v1",
            "kind": "SLO",
            "metadata": {"name": f"{slo.name}-{one.name}", "displayName": f"{model}: {one.name}"},
            "spec": {
                "description": f"{1 - one.budget:.6g} of the requests are {one.words}",
                "service": slo.name,
                "indicator": _indicator(slo, one),
                "timeWindow": [{"duration": shown(period_s), "isRolling": True}],
                "budgetingMethod": "Occurrences",
                "objectives": [{"displayName": one.words, "target": round(1 - one.budget, 9)}],
            },
        }


def _indicator(slo: Slo, one: Indicator) -> dict[str, object]:
    window = shown(_RATE_WINDOW_S)

    def metric(query: str) -> dict[str, object]:
        spec = {"query": query.replace("{window}", window)}
        return {"metricSource": {"type": "Prometheus", "spec": spec}}

    return {
        "metadata": {"name": f"{slo.name}-{one.name}-ratio"},
        "spec": {
            "ratioMetric": {"counter": False, "bad": metric(one.bad), "total": metric(one.total)}
        },
    }
