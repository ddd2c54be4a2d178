"""Rules, alerts, OpenSLO, dashboard: that they agree with the SLO and with what servers export."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import serve.errors
from loadtest.burn import PERIOD_S, BurnWindow, burn_windows, shown
from loadtest.cli import main
from loadtest.dashboard import dashboard, queries
from loadtest.openslo import openslo_documents
from loadtest.rules import CANCELLED, CLIENTS_FAULTS, MIN_REQUESTS, OK, indicators, rules_of
from loadtest.scaling import scaling_query, scaling_target
from loadtest.slo import Slo
from serve.metrics import Metrics

MODEL = "resnet"
DAY = 86_400.0


def slo(quantile: float = 0.99, success_ratio: float = 0.999, threshold_ms: float = 50) -> Slo:
    return Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "checkout",
            "latency": {"quantile": quantile, "threshold_ms": threshold_ms},
            "workload": {"rate_per_s": 100},
            "success_ratio": success_ratio,
        }
    )


# --- burn rates


def test_windows_are_the_workbooks_for_thirty_days_and_a_small_budget() -> None:
    windows, left_out = burn_windows(0.001)
    assert [(one.severity, one.long_s, one.short_s, one.factor) for one in windows] == [
        ("page", 3600, 300, pytest.approx(14.4)),
        ("page", 21600, 1800, pytest.approx(6)),
        ("ticket", DAY, 7200, pytest.approx(3)),
        ("ticket", 3 * DAY, 21600, pytest.approx(1)),
    ]
    assert not left_out
    assert not any(one.is_rescaled for one in windows)


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.05, 0.1, 0.2, 0.5])
def test_every_window_can_fire_and_means_the_share_of_the_budget_that_it_says(
    budget: float,
) -> None:
    windows, left_out = burn_windows(budget)
    assert len(windows) + len(left_out) == 4
    for one in windows:
        assert one.factor * budget <= 0.5 + 1e-9, "half of all requests failing fires it"
        assert one.factor * one.long_s / PERIOD_S == pytest.approx(one.budget_share, rel=0.02)
        assert one.short_s == pytest.approx(one.long_s / 12, abs=60)
    ends = [one.long_s for one in windows]
    assert ends == sorted(ends)


def test_window_that_could_never_fire_is_made_longer_or_left_out() -> None:
    windows, _ = burn_windows(0.1)
    assert windows[0].is_rescaled
    assert windows[0].factor == pytest.approx(5.0)
    assert windows[0].long_s > 3600
    windows, left_out = burn_windows(0.5)
    assert [one.severity for one in left_out] == ["page", "page", "ticket"]
    assert "to fire at all" in left_out[0].reason
    assert [one.factor for one in windows] == [1.0]


@pytest.mark.parametrize(("budget", "period_s"), [(0, PERIOD_S), (1, PERIOD_S), (0.1, 60)])
def test_what_is_no_budget_or_no_period_is_refused(budget: float, period_s: float) -> None:
    with pytest.raises(ValueError, match="want"):
        burn_windows(budget, period_s)


def test_durations_are_written_as_prometheus_reads_them() -> None:
    assert [shown(one) for one in (60, 300, 3600, 5400, DAY, 3 * DAY + 60)] == [
        "1m", "5m", "1h", "1h30m", "1d", "3d1m",
    ]  # fmt: skip


# --- agreement with servers


def exported() -> str:
    """What a server exports that has answered a few requests to the model."""
    metrics = Metrics(slo().latency.threshold_s)
    for code in (OK, CANCELLED, "queue_full"):
        metrics.request_answered(MODEL, "1", "rest", code, 0.01)
    metrics.request_admitted(MODEL, "1")
    metrics.phase_ended(MODEL, "1", "queue", 0.001)
    metrics._batch_rows.labels(MODEL, "1").observe(4)
    metrics._model_info.labels(MODEL, "1", "", "onnxruntime", "int8").set(1)
    return metrics.exposition().decode()


def expressions() -> list[str]:
    """Of rules, dashboard, OpenSLO and autoscaler."""
    made = rules_of(slo(), MODEL, PERIOD_S).document()
    rules = [rule["expr"] for group in made["groups"] for rule in group["rules"]]  # type: ignore[attr-defined]
    ratios = [
        one["spec"]["indicator"]["spec"]["ratioMetric"][part]["metricSource"]["spec"]["query"]  # type: ignore[index]
        for one in openslo_documents(slo(), MODEL, PERIOD_S)
        if one["kind"] == "SLO"
        for part in ("bad", "total")
    ]
    return [*rules, *queries(dashboard(slo(), MODEL, PERIOD_S)), *ratios, scaling_query(MODEL)]


def test_every_metric_that_is_asked_for_is_exported() -> None:
    names = set(re.findall(r"^([a-z_]+)(?:\{| )", exported(), re.M))
    wanted = {name for one in expressions() for name in re.findall(r"trimserve_[a-z_]+", one)}
    assert wanted
    assert wanted <= names


def test_the_threshold_is_an_edge_in_the_servers_spelling() -> None:
    for threshold_ms in (50.0, 1000.0, 12.5):
        metrics = Metrics(threshold_ms / 1e3)
        metrics.request_answered(MODEL, "1", "rest", OK, 0.01)
        (latency, _) = indicators(slo(threshold_ms=threshold_ms), MODEL)
        (le,) = set(re.findall(r'le="([^"]+)"', latency.bad))
        assert f'le="{le}"' in metrics.exposition().decode()


def test_clients_faults_are_codes_of_the_server() -> None:
    codes = {
        one.code
        for one in vars(serve.errors).values()
        if isinstance(one, type) and issubclass(one, serve.errors.ServeError)
    }
    assert {*CLIENTS_FAULTS, CANCELLED} <= codes
    assert not {"queue_full", "engine_failed", "deadline_exceeded", "shutting_down"} & {
        *CLIENTS_FAULTS
    }


def test_recorded_names_are_those_that_alerts_and_dashboard_ask_for() -> None:
    made = rules_of(slo(), MODEL, PERIOD_S).document()
    groups: list[dict[str, Any]] = made["groups"]  # type: ignore[assignment]
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    asked = {name for one in expressions() for name in re.findall(r"slo:[a-z_:0-9]+", one)}
    assert asked == recorded


def test_objective_without_a_budget_has_no_rules() -> None:
    assert [one.name for one in indicators(slo(success_ratio=1), MODEL)] == ["latency"]


@pytest.mark.parametrize("model", ["", 'a"b', "a\\b", "a\nb"])
def test_name_that_no_query_can_hold_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match="model: got"):
        rules_of(slo(), model, PERIOD_S)


def test_openslo_has_the_objectives_with_their_targets() -> None:
    service, *objectives = openslo_documents(slo(), MODEL, PERIOD_S)
    assert service["kind"] == "Service"
    targets = [one["spec"]["objectives"][0]["target"] for one in objectives]  # type: ignore[index]
    assert targets == [0.99, 0.999]
    (window,) = objectives[0]["spec"]["timeWindow"]  # type: ignore[index]
    assert window == {"duration": "30d", "isRolling": True}


def test_scaling_follows_from_the_capacity_by_littles_law() -> None:
    target = scaling_target(MODEL, 400, 0.01, 0.5)
    assert target.in_flight_per_replica == pytest.approx(2.0)
    for given in ((0, 0.01, 0.5), (400, 0, 0.5), (400, 0.01, 1.5)):
        with pytest.raises(ValueError, match="want above 0"):
            scaling_target(MODEL, *given)


# --- promtool


def series(bad_share: float, step_s: float, n: int, rate_per_s: float) -> list[dict[str, str]]:
    """Counters over `n` steps, of whose requests a share is answered too late."""
    name, per_step = "trimserve_request_duration_seconds", step_s * rate_per_s
    labels = f'model="{MODEL}",version="1",transport="rest",code="{OK}"'
    good = per_step * (1 - bad_share)
    return [
        {"series": f"{name}_count{{{labels}}}", "values": f"0+{per_step:.6f}x{n}"},
        {"series": f'{name}_bucket{{{labels},le="0.05"}}', "values": f"0+{good:.6f}x{n}"},
        {"series": f'trimserve_model_info{{model="{MODEL}"}}', "values": f"1x{n}"},
    ]


def alert_test(
    given: Slo, window: BurnWindow, bad_share: float, fires: bool, rate_per_s: float, folder: Path
) -> None:
    """promtool's word on the window's alert, after the long window and a bit."""
    step_s = max(60.0, window.short_s // 600 * 60)
    made = rules_of(given, MODEL, PERIOD_S).document()
    groups: list[dict[str, Any]] = made["groups"]  # type: ignore[assignment]
    for group in groups:  # all else is as it is; finer steps would only take longer
        group["interval"] = shown(step_s)
    name = f"LatencyBudget{window.severity.capitalize()}{shown(window.long_s)}"
    (rule,) = [r for group in groups for r in group["rules"] if r.get("alert") == name]
    expected = {"exp_labels": rule["labels"], "exp_annotations": rule["annotations"]}
    end_s = step_s * round(1.2 * window.long_s / step_s)
    case = {"eval_time": shown(end_s), "alertname": name, "exp_alerts": [expected] * fires}
    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": shown(step_s),
        # In any order otherwise; an alert that goes first finds what it reads a step old: stale.
        "group_eval_order": [group["name"] for group in groups],
        "tests": [
            {
                "interval": shown(step_s),
                "input_series": series(bad_share, step_s, int(end_s / step_s) + 2, rate_per_s),
                "alert_rule_test": [case],
            }
        ],
    }
    for file, content in (("rules.yaml", made), ("test.yaml", test)):
        (folder / file).write_text(yaml.safe_dump(content, sort_keys=False, width=1000))
    promtool("test", "rules", str(folder / "test.yaml"))


@pytest.mark.full
@pytest.mark.parametrize("quantile", [0.99, 0.9])
@pytest.mark.parametrize("number", range(4))
def test_alert_fires_above_its_burn_rate_and_is_silent_below_it_and_at_1(
    number: int, quantile: float, tmp_path: Path
) -> None:
    budget = 1 - quantile
    window = burn_windows(budget)[0][number]
    given = slo(quantile=quantile)
    alert_test(given, window, 1.1 * window.factor * budget, True, 10.0, tmp_path)
    alert_test(given, window, 0.9 * window.factor * budget, False, 10.0, tmp_path)
    if window.factor > 1.2:
        alert_test(given, window, budget, False, 10.0, tmp_path)


@pytest.mark.full
def test_alert_is_silent_while_there_are_too_few_requests(tmp_path: Path) -> None:
    window = burn_windows(0.01)[0][0]
    for share, fires in ((0.5, False), (2.0, True)):
        rate = share * MIN_REQUESTS / window.long_s
        alert_test(slo(), window, 1.0, fires, rate, tmp_path)


@pytest.mark.full
def test_every_expression_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"checked:{index}:expression", "expr": one}
        for index, one in enumerate(dict.fromkeys(expressions()))
    ]
    content = {"groups": [{"name": "expressions", "rules": rules}]}
    (tmp_path / "expressions.yaml").write_text(yaml.safe_dump(content, width=1000))
    promtool("check", "rules", str(tmp_path / "expressions.yaml"))


def promtool(*arguments: str) -> None:
    found = shutil.which("promtool")
    assert found is not None, "want Debian's package prometheus (.ci/packages)"
    ended = subprocess.run(
        [found, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_dashboard_is_json_with_panels_side_by_side() -> None:
    document = dashboard(slo(), MODEL, PERIOD_S)
    again = json.loads(json.dumps(document))
    places = [(one["gridPos"]["x"], one["gridPos"]["y"]) for one in again["panels"]]
    assert len(places) == len(set(places)) >= 7
    assert {one["id"] for one in again["panels"]} == set(range(1, len(places) + 1))


# --- the command


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param("none/rules.yaml", "want a file in a folder that exists", id="no folder"),
        pytest.param(".", "want a file in a folder that exists", id="a folder"),
        pytest.param("slo.yaml/x", "want a file in a folder that exists", id="below a file"),
        pytest.param("/proc/x", "(No such file or directory), want a file that can be written",
                     id="a folder that takes no files"),
    ],
)  # fmt: skip
def test_rules_exits_2_and_writes_nothing_when_the_output_is(
    output: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slo.yaml").write_text(slo().model_dump_json(by_alias=True))
    assert main(["rules", "slo.yaml", "--model", MODEL, "--output", output]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"error: --output: got {output}")
    assert message in err
    assert [one.name for one in tmp_path.iterdir()] == ["slo.yaml"]


def test_rules_replaces_the_file_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slo.yaml").write_text(slo().model_dump_json(by_alias=True))
    (tmp_path / "rules.yaml").write_text("old")
    assert main(["rules", "slo.yaml", "--model", MODEL, "--output", "rules.yaml"]) == 0
    assert yaml.safe_load((tmp_path / "rules.yaml").read_text())["groups"]
