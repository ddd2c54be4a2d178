"""Component: what Kubernetes needs to know of an SLO, as a kustomize component, all from one file.

The rules and alerts of the Prometheus operator, Grafana's dashboard, the SLO that server and load
test read, and patches for the autoscalers and the canary's analysis of `k8s/components`, which
change nothing where those aren't there. Writes no file.
"""

import json
import math
import re
from dataclasses import dataclass

from loadtest.burn import shown
from loadtest.dashboard import dashboard
from loadtest.kubernetes.replica import Load
from loadtest.plain_yaml import plain_yaml
from loadtest.rules import MIN_REQUESTS, Indicator, SloRules, indicators, prometheus_rule
from loadtest.scaling import ScalingTarget, scaling_query
from loadtest.slo import Slo

RENDERED = "Rendered by `trimserve k8s render`"
"""In the first lines of a kustomization that may be overwritten."""
KUSTOMIZATION = "kustomization.yaml"
IN_FLIGHT_MEAN = "trimserve_requests_in_flight_mean"
"""As prometheus-adapter's rule in k8s/components/prometheus-adapter names it."""
_ANALYSIS_WINDOW_S = 300.0
_LABEL = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_STEP = 0.001
"""Autoscalers count in thousandths."""


@dataclass(frozen=True)
class Promise:
    """An SLO, with the text of its file, and the model and namespace that it is kept for."""

    slo: Slo
    text: str
    model: str
    namespace: str
    period_s: float


@dataclass(frozen=True)
class Autoscaling:
    """The target, and the measurement that it follows from."""

    target: ScalingTarget
    load: Load

    @property
    def threshold(self) -> str:
        """Requests in flight per replica, in thousandths, rounded down."""
        return f"{math.floor(self.target.in_flight_per_replica / _STEP) * _STEP:.3f}"


def component(promise: Promise, rules: SloRules, scaling: Autoscaling | None) -> dict[str, str]:
    """Path -> text of the component's files; without `scaling` the autoscalers' target stays
    unset, which they refuse.

    Raises ValueError for a target below a thousandth, and for a model's name that Kubernetes takes
    for no label, by which prometheus-adapter selects.
    """
    if not _LABEL.fullmatch(promise.model):
        raise ValueError(
            f"model: got {promise.model!r}, want a value of a label of Kubernetes: up to 63 of "
            "A-Z, a-z, 0-9, -, _ and ., with a letter or digit first and last"
        )
    if scaling is not None and float(scaling.threshold) <= 0:
        raise ValueError(
            f"in flight per replica: got {scaling.target.in_flight_per_replica:g}, want at least "
            f"{_STEP:g}, in which autoscalers count"
        )
    slo, model = promise.slo, promise.model
    shape = json.dumps(dashboard(slo, model, promise.period_s), indent=2) + "\n"
    return {
        KUSTOMIZATION: _kustomization(promise),
        "prometheus-rule.yaml": plain_yaml(prometheus_rule(slo, rules)),
        "dashboard.json": shape,
        "scaled-object.yaml": _provenance(scaling) + plain_yaml(_scaled_object(model, scaling)),
        "autoscaler.yaml": _provenance(scaling) + plain_yaml(_autoscaler(model, scaling)),
        "analysis.yaml": plain_yaml(_analysis(slo, model)),
        f"config/{KUSTOMIZATION}": _config(promise),
        "config/slo.yaml": promise.text,
    }


def _kustomization(promise: Promise) -> str:
    purpose = f"What watches and scales by the SLO {promise.slo.name} of {promise.model}"
    return f"""\
# {purpose}. Needs the Prometheus operator's resources, and to be the last component.
# {RENDERED}; edit the SLO and render it again.
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
components: [config]
resources: [prometheus-rule.yaml]
configMapGenerator:
  # For Grafana's sidecar, which looks for the label.
  - name: dashboard-{promise.slo.name}
    files: [dashboard.json]
    options:
      disableNameSuffixHash: true
      labels: {{grafana_dashboard: "1", app.kubernetes.io/part-of: trimserve}}
patches:
  - path: scaled-object.yaml
    target: {{kind: ScaledObject, name: serve}}
  - path: autoscaler.yaml
    target: {{kind: HorizontalPodAutoscaler, name: serve}}
  - path: analysis.yaml
    target: {{kind: AnalysisTemplate, name: slo}}
"""


def _config(promise: Promise) -> str:
    model = json.dumps(f"MODEL_NAME={promise.model}")
    return f"""\
# The SLO and the model's name alone, in place of those of the folder config. Needs that folder.
# {RENDERED}.
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
configMapGenerator:
  - name: slo
    namespace: {promise.namespace}
    behavior: replace
    files: [slo.yaml]
  - name: model
    namespace: {promise.namespace}
    behavior: merge
    literals: [{model}]
"""


def _provenance(scaling: Autoscaling | None) -> str:
    """Where the target comes from, as a comment."""
    if scaling is None:
        return (
            "# No target: rendered without --capacity. The autoscaler refuses what stands in its "
            "place.\n"
        )
    target, load = scaling.target, scaling.load
    return (
        f"# A replica keeps the SLO up to {target.capacity_per_s:.4g} requests/s; at "
        f"{target.utilization:g} of that it has so many in flight, by the\n"
        f"# {load.seen_by}'s mean time of a request at {load.measured_at_per_s:.4g} requests/s.\n"
    )


def _scaled_object(model: str, scaling: Autoscaling | None) -> list[dict[str, object]]:
    place = "/spec/triggers/0/metadata"
    steps = [_replace(f"{place}/query", scaling_query(model))]
    if scaling is not None:
        steps.append(_replace(f"{place}/threshold", scaling.threshold))
    return steps


def _autoscaler(model: str, scaling: Autoscaling | None) -> list[dict[str, object]]:
    metric = {"name": IN_FLIGHT_MEAN, "selector": {"matchLabels": {"model": model}}}
    steps = [_replace("/spec/metrics/0/pods/metric", metric)]
    if scaling is not None:
        steps.append(_replace("/spec/metrics/0/pods/target/averageValue", scaling.threshold))
    return steps


def _analysis(slo: Slo, model: str) -> list[dict[str, object]]:
    """The template judges latency and success, in this order; without a budget for the latter it
    judges none."""
    steps: list[dict[str, object]] = []
    judged = indicators(slo, model)
    for index, one in enumerate(judged):
        place, limit = f"/spec/metrics/{index}", f"{one.budget:.6g}"
        steps += [
            _replace(f"{place}/successCondition", f"len(result) > 0 && result[0] <= {limit}"),
            _replace(f"{place}/failureCondition", f"len(result) > 0 && result[0] > {limit}"),
            _replace(f"{place}/provider/prometheus/query", analysis_query(one, model)),
        ]
    if len(judged) == 1:
        steps.append({"op": "remove", "path": "/spec/metrics/1"})
    return steps


def analysis_query(one: Indicator, model: str) -> str:
    """The share of bad requests of the canary's own pods, while there are enough to tell."""
    counted = one.total.replace("rate(", "increase(").replace("{window}", shown(_ANALYSIS_WINDOW_S))
    whole = f"{one.over(_ANALYSIS_WINDOW_S)} and on() {counted} > {MIN_REQUESTS}"
    own = f'model="{model}"'
    return whole.replace(own, f'{own},pod=~"serve-{{{{args.pods}}}}-.*"')


def _replace(path: str, value: object) -> dict[str, object]:
    return {"op": "replace", "path": path, "value": value}
