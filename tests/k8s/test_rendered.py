"""What `trimserve k8s render` writes: fits the manifests, and agrees with the SLO in every part."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import trimserve
from loadtest.capacity_report import CapacityReport, RatePoint
from loadtest.slo import Slo
from tests.k8s.kustomizations import K8S, ROOT, written
from tests.k8s.resolved import Document, found, resolved
from tests.k8s.test_kustomize import assert_same, kustomize
from tests.k8s.test_manifests import quantity
from tests.k8s.test_schemas import NEWEST, OLDEST, validated

MODEL = "resnet"
SLO = {
    "apiVersion": "trimserve/v1",
    "kind": "SLO",
    "name": "checkout",
    "latency": {"quantile": 0.95, "threshold_ms": 80},
    "workload": {"rate_per_s": 300},
    "success_ratio": 0.995,
}
SERVERS = ("keda", "prometheus-adapter", "canary", "monitoring", "gpu")


def point(rate_per_s: float, **changes: Any) -> RatePoint:
    values: dict[str, Any] = {
        "rate_per_s": rate_per_s, "p50_s": 0.01, "p95_s": 0.02, "p99_s": 0.03, "mean_s": 0.012,
        "in_flight": rate_per_s * 0.01, "goodput_per_s": rate_per_s, "good_share": 0.99,
        "success_ratio": 1.0, "batch_rows": 2.0, "verdict": "met", "reasons": (), "usable": True,
    }  # fmt: skip
    return RatePoint(**(values | changes))


def capacity_report(**changes: Any) -> CapacityReport:
    values: dict[str, Any] = {
        "apiVersion": "trimserve/v1", "kind": "CapacityReport", "created_at": "2026-01-02",
        "verdict": "met", "exit_code": 0, "message": "found", "slo": Slo.model_validate(SLO),
        "model": MODEL, "targets": ("http://10.0.0.1:8000",), "window_s": 30.0, "ending": "found",
        "capacity_per_s": 400.0, "points": (point(200), point(420)), "confirmation": point(380),
        "operation": point(320),
    }  # fmt: skip
    return CapacityReport(**(values | changes))


@dataclass(frozen=True)
class Rendered:
    slo: Path
    capacity: Path
    folder: Path

    def render(self, *arguments: str) -> int:
        command = ["k8s", "render", str(self.slo), "--model", MODEL, "-o", str(self.folder)]
        return trimserve.main([*command, *arguments])

    def with_component(self, name: str) -> Path:
        """The folder of a kustomization that holds the component `name` and what was rendered."""
        folder = self.folder.with_name(f"with-{name}")
        folder.mkdir()
        if name in ("monitoring", "gpu"):
            paths = [K8S / "base", K8S / "components" / name, self.folder]
            base, *components = (_relative(one, folder) for one in paths)
            _write_kustomization(folder, base, components)
            return folder
        return written(name, folder, self.folder)

    def load_test(self) -> Path:
        folder = self.folder.with_name("load-test")
        folder.mkdir()
        base = _relative(K8S / "jobs/loadtest", folder)
        _write_kustomization(folder, base, [_relative(self.folder / "config", folder)])
        return folder


def _relative(path: Path, folder: Path) -> str:
    up = len(folder.resolve().parts) - 1
    return "/".join([*[".."] * up, *path.resolve().parts[1:]])


def _write_kustomization(folder: Path, base: str, components: list[str]) -> None:
    text = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "trimserve",
        "resources": [base],
        "components": components,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))


@pytest.fixture
def rendered(tmp_path: Path) -> Rendered:
    slo, capacity = tmp_path / "slo.yaml", tmp_path / "capacity.json"
    slo.write_text(f"# The checkout's promise.\n{yaml.safe_dump(SLO)}")
    capacity.write_text(capacity_report().model_dump_json(by_alias=True))
    one = Rendered(slo, capacity, tmp_path / "rendered")
    assert one.render("--capacity", str(capacity)) == 0
    return one


def targets(documents: list[Document]) -> dict[str, Any]:
    """What the autoscaler that is there watches."""
    for one in documents:
        if one["kind"] == "ScaledObject":
            (trigger,) = one["spec"]["triggers"]
            return {"target": trigger["metadata"]["threshold"], **trigger["metadata"]}
        if one["kind"] == "HorizontalPodAutoscaler":
            (metric,) = one["spec"]["metrics"]
            return {"target": metric["pods"]["target"]["averageValue"], **metric["pods"]["metric"]}
    raise AssertionError("want an autoscaler")


def test_rules_dashboard_server_and_load_test_agree_on_the_slos_numbers(
    rendered: Rendered,
) -> None:
    documents = resolved(rendered.with_component("keda"))
    job = resolved(rendered.load_test())
    assert found(documents, "ConfigMap", "slo")["data"]["slo.yaml"] == rendered.slo.read_text()
    assert found(job, "ConfigMap", "slo")["data"] == found(documents, "ConfigMap", "slo")["data"]
    for one in (documents, job):
        assert found(one, "ConfigMap", "model")["data"]["MODEL_NAME"] == MODEL
    rules = json.dumps(found(documents, "PrometheusRule", "slo-checkout"))
    (board,) = found(documents, "ConfigMap", "dashboard-checkout")["data"].values()
    for text in (rules, board):
        assert set(re.findall(r'model=\\"(\w+)', text)) == {MODEL}
        assert set(re.findall(r'slo=\\"(\w+)', text)) == {"checkout"}
    assert set(re.findall(r'le=\\"([0-9.]+)', rules)) == {"0.08"}
    limits = [
        step["value"]
        for panel in json.loads(board)["panels"]
        if panel["title"] == "Latency"
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    ]
    assert limits == [None, 0.08]
    assert set(re.findall(r"; (0\.\d+) have to be", rules)) == {"0.95", "0.995"}


def test_no_rule_of_another_slo_is_beside_those_that_were_rendered(rendered: Rendered) -> None:
    documents = resolved(rendered.with_component("keda"))
    assert [d["metadata"]["name"] for d in documents if d["kind"] == "PrometheusRule"] == [
        "slo-checkout"
    ]


@pytest.mark.parametrize("name", ["keda", "prometheus-adapter"])
def test_autoscalers_target_is_what_was_in_flight_at_the_utilization(
    name: str, rendered: Rendered
) -> None:
    """0.8 of 400 requests/s, 10 ms each in the server."""
    watched = targets(resolved(rendered.with_component(name)))
    assert quantity(watched["target"]) == quantity("3.2")
    if name == "keda":
        assert f'{{model="{MODEL}"}}' in watched["query"]
    else:
        assert watched["selector"] == {"matchLabels": {"model": MODEL}}


def test_target_is_of_one_replica_when_several_were_measured(rendered: Rendered) -> None:
    assert rendered.render("--capacity", str(rendered.capacity), "--replicas", "4") == 0
    watched = targets(resolved(rendered.with_component("keda")))
    assert quantity(watched["target"]) == quantity("0.8")


def test_target_follows_the_utilization_by_the_point_below_it(rendered: Rendered) -> None:
    assert rendered.render("--capacity", str(rendered.capacity), "--utilization", "0.6") == 0
    watched = targets(resolved(rendered.with_component("keda")))
    assert quantity(watched["target"]) == quantity("2.4")
    assert "at 200 requests/s" in (rendered.folder / "scaled-object.yaml").read_text()


def test_target_is_the_clients_time_when_the_server_did_not_say(rendered: Rendered) -> None:
    unseen = point(320, in_flight=None)
    report = capacity_report(points=(unseen,), operation=unseen, confirmation=None)
    rendered.capacity.write_text(report.model_dump_json(by_alias=True))
    assert rendered.render("--capacity", str(rendered.capacity)) == 0
    assert quantity(targets(resolved(rendered.with_component("keda")))["target"]) == quantity(
        "3.84"
    )
    assert "client's mean time" in (rendered.folder / "scaled-object.yaml").read_text()


def test_canary_is_judged_by_the_rendered_slo(rendered: Rendered) -> None:
    spec = found(resolved(rendered.with_component("canary")), "AnalysisTemplate", "slo")["spec"]
    latency, success = spec["metrics"]
    assert latency["successCondition"].endswith("<= 0.05")
    assert success["successCondition"].endswith("<= 0.005")
    assert 'le="0.08"' in latency["provider"]["prometheus"]["query"]
    assert 'model="digits"' not in json.dumps(spec)


def test_canary_is_not_judged_by_success_when_it_has_no_budget(rendered: Rendered) -> None:
    rendered.slo.write_text(yaml.safe_dump(SLO | {"success_ratio": 1.0}))
    assert rendered.render() == 0
    spec = found(resolved(rendered.with_component("canary")), "AnalysisTemplate", "slo")["spec"]
    assert [one["name"] for one in spec["metrics"]] == ["latency"]


# --- kustomize and the schemas


@pytest.mark.parametrize("name", [*SERVERS, "load test"])
def test_kustomize_builds_what_was_rendered_and_it_is_valid(name: str, rendered: Rendered) -> None:
    folder = rendered.load_test() if name == "load test" else rendered.with_component(name)
    built = kustomize(folder)
    assert_same(built, resolved(folder))
    for one in built:
        for version in (OLDEST, NEWEST):
            validated(json.dumps(one, sort_keys=True), version)


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"capacity_per_s": None}, "inconclusive (found)", id="none was found"),
        pytest.param({"verdict": "inconclusive"}, "inconclusive (found)", id="it wasn't confirmed"),
        pytest.param(
            {"slo": Slo.model_validate(SLO | {"latency": {"threshold_ms": 10}})},
            "slo.latency: measured for",
            id="it is of another promise",
        ),
        pytest.param(
            {"points": (point(420),), "confirmation": None, "operation": None},
            "no mean time of requests at or below 320",
            id="no point is low enough",
        ),
    ],
)
def test_capacity_is_refused_when(
    changes: dict[str, Any],
    message: str,
    rendered: Rendered,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rendered.capacity.write_text(capacity_report(**changes).model_dump_json(by_alias=True))
    assert rendered.render("--capacity", str(rendered.capacity)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--utilization", "1.2"], "utilization: got 1.2"),
        (["--namespace", "Trim_Serve"], "--namespace: got 'Trim_Serve'"),
        (["--model", "zoo/resnet"], "model: got 'zoo/resnet', want a value of a label"),
        (["--capacity", "/nowhere.json"], "/nowhere.json: No such file"),
        (["--output", str(K8S / "components/keda")], "isn't one that was rendered"),
        (["--output", str(ROOT / "README.md")], "a file, want a folder"),
        (["--output", str(ROOT / "README.md/x")], "README.md/x (Not a directory), want a folder"),
        (["--output", "/proc/x"], "/proc/x (No such file or directory), want a folder that can be"),
    ],
)
def test_render_says_what_is_wrong(
    arguments: list[str],
    message: str,
    rendered: Rendered,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rendered.render("--capacity", str(rendered.capacity), *arguments) == 2
    assert message in capsys.readouterr().err


def test_replicas_are_refused_without_a_capacity(
    rendered: Rendered, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rendered.render("--replicas", "2") == 2
    assert "--replicas: got it without --capacity" in capsys.readouterr().err


def test_utilization_is_checked_without_a_capacity_too(
    rendered: Rendered, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rendered.render("--utilization", "2") == 2
    assert "utilization: got 2, want above 0 and at most 1" in capsys.readouterr().err


def test_folder_with_something_else_in_it_is_left_alone(
    rendered: Rendered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").touch()
    assert rendered.render("--output", str(folder)) == 2
    assert "which holds notes.txt" in capsys.readouterr().err
    assert [one.name for one in folder.iterdir()] == ["notes.txt"]
