"""Fleets against a slow count of their own, zone by zone and node by node."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import trimserve
from loadtest.kubernetes.replica import Replica, load_at, peak_in_flight
from loadtest.kubernetes.sizing import (
    LOSSES,
    MAX_ADDRESSES,
    Loss,
    Node,
    NoRoom,
    Plan,
    Pod,
    Size,
    size,
)
from tests.k8s.test_rendered import SLO, capacity_report, point

REPLICA = Replica("here", 400.0, "met", (point(200), point(320), point(420)), 1, None)
POD = Pod(cores=4, max_connections=8192, request_bytes=None, response_bytes=None, max_per_node=None)
NODE = Node(cores=16, reserved_cores=1, pods=100, network_bits_per_s=7e9, price_per_hour=2.0)


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "utilization": 0.8, "degraded_utilization": 0.95, "imbalance": 1.0, "loss": "zone",
        "zones": 3, "clients": 100,
    }  # fmt: skip
    return Plan(**(values | changes))


def sized(rate_per_s: float, pod: Pod = POD, node: Node = NODE, **changes: Any) -> Size:
    return size(rate_per_s, REPLICA, pod, node, plan(**changes))


def nodes_by_hand(n: int, per_node: int, zones: int, loss: str) -> list[list[int]]:
    """Replicas of each node of each zone, dealt out evenly."""
    of_zones = [n // zones + (zone < n % zones) for zone in range(zones)]
    dealt = []
    for held in of_zones:
        count = math.ceil(held / per_node)
        if zones == 1 and loss == "node":
            count = max(count, min(held, 2))
        dealt.append([held // count + (one < held % count) for one in range(count)])
    return dealt


def left_by_hand(dealt: list[list[int]], loss: str) -> int:
    n = sum(map(sum, dealt))
    worst = {
        "nothing": 0,
        "replica": 1,
        "node": max(max(one, default=0) for one in dealt),
        "zone": max(map(sum, dealt)),
    }[loss]
    return n - worst


@given(
    rate_per_s=st.floats(1, 30_000),
    loss=st.sampled_from(LOSSES),
    zones=st.integers(2, 5),
    cores=st.integers(4, 64),
)
@settings(max_examples=200, deadline=None)
def test_fleet_is_the_smallest_that_keeps_both_utilizations(
    rate_per_s: float, loss: Loss, zones: int, cores: int
) -> None:
    node = Node(cores, 0, 100, 7e9, 2.0)
    found = sized(rate_per_s, node=node, loss=loss, zones=zones)
    per_node = cores // 4
    n = 1
    while True:
        dealt = nodes_by_hand(n, per_node, zones, loss)
        left = left_by_hand(dealt, loss)
        if n * 320 >= rate_per_s * (1 - 1e-9) and left * 380 >= rate_per_s * (1 - 1e-9) and left:
            break
        n += 1
    assert found.replicas == n
    assert found.nodes == sum(len(one) for one in dealt)
    assert found.price_per_hour == 2.0 * found.nodes


def test_fleet_without_zones_survives_a_node_on_two() -> None:
    found = sized(100, zones=1, loss="node")
    assert (found.replicas, found.nodes, found.lost) == (2, 2, 1)


def test_one_replica_does_when_nothing_may_be_lost() -> None:
    found = sized(320, loss="nothing", zones=1)
    assert (found.replicas, found.nodes, found.lost) == (1, 1, 0)
    assert found.degraded_share == pytest.approx(0.8)
    assert found.price_per_million == pytest.approx(2.0 / (320 * 3600) * 1e6)


def test_uneven_spread_takes_more_replicas() -> None:
    assert sized(100_000, imbalance=1.25).replicas == pytest.approx(
        1.25 * sized(100_000).replicas, rel=0.01
    )


# --- what is full first


def test_network_limits_what_fits_on_a_node_when_bodies_are_large() -> None:
    """400/s of 1 MB are 3.2 Gbit/s: two a node of 7, though its cores would hold three."""
    found = sized(10_000, pod=Pod(4, 8192, 1e6, 1e3, None))
    assert (found.replicas_per_node, found.packed_by) == (2, "network")
    assert found.uses[0].name == "capacity of a replica"


def test_network_is_full_first_when_one_replica_could_use_more_than_a_nodes() -> None:
    found = sized(1_000, pod=Pod(4, 8192, 1e3, 5e6, None), loss="nothing")
    assert found.replicas == math.ceil(1_000 / (7e9 / (8 * 5e6)) / 0.8)
    assert found.uses[0].name == "network out of a node"
    assert found.uses[0].share <= 0.8


def test_connections_are_full_first_when_there_are_many_clients() -> None:
    found = sized(10_000, clients=9_000)
    assert found.uses[0].name == "connections of a replica"
    assert found.uses[0].share == pytest.approx(9_000 / 8192)
    assert any("9000 clients" in one for one in found.warnings)


def test_pods_of_a_node_are_as_many_as_it_has_gpus() -> None:
    found = sized(10_000, pod=Pod(4, 8192, None, None, max_per_node=1))
    assert (found.replicas_per_node, found.packed_by) == (1, "given")


def test_fleets_beyond_what_a_cluster_and_a_name_can_hold_say_so() -> None:
    found = sized(10_000_000)
    assert found.nodes > 5_000
    said = " ".join(found.warnings)
    assert "Kubernetes is made for 5000" in said
    assert f"a DNS answer holds {MAX_ADDRESSES}" in said
    assert not sized(100_000).warnings


def test_capacity_that_was_not_confirmed_is_said() -> None:
    doubtful = Replica("here", 400.0, "inconclusive", REPLICA.points, 1)
    (said,) = size(1_000, doubtful, POD, NODE, plan()).warnings
    assert "inconclusive" in said


def test_replica_that_fits_on_no_node_is_refused() -> None:
    with pytest.raises(NoRoom, match="cores"):
        sized(100, pod=Pod(32, 8192, None, None, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utilization": 0.0}, "utilization: got 0"),
        ({"degraded_utilization": 1.5}, "degraded_utilization: got 1.5"),
        ({"zones": 1}, "zones: got 1, want at least 2"),
    ],
)
def test_plan_is_refused_when(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


# --- a replica's load


def test_load_is_of_the_rate_asked_for_and_its_time_of_the_point_below() -> None:
    slower = point(420, in_flight=42.0)
    replica = Replica("here", 400.0, "met", (point(200), slower), 1)
    load = load_at(replica, 300)
    assert load.in_flight == pytest.approx(3.0)
    assert (load.measured_at_per_s, load.seen_by) == (200, "server")


@pytest.mark.parametrize("doubt", [{"usable": False}, {"verdict": "violated"}], ids=str)
def test_load_passes_over_points_in_doubt(doubt: dict[str, Any]) -> None:
    doubtful = point(320, in_flight=99.0, **doubt)
    assert load_at(Replica("here", 400.0, "met", (point(200), doubtful), 1), 320).in_flight < 4


def test_peak_in_flight_is_of_one_replica_up_to_the_capacity() -> None:
    points = (point(200), point(800, in_flight=16.0), point(1_000, in_flight=500.0))
    assert peak_in_flight(Replica("here", 400.0, "met", points, 2)) == 8.0
    unknown = point(200, in_flight=None, mean_s=None)
    assert peak_in_flight(Replica("here", 400.0, "met", (unknown,), 1)) is None


# --- the command


def run(folder: Path, *arguments: str, **changes: Any) -> int:
    (folder / "slo.yaml").write_text(yaml.safe_dump(SLO))
    report = capacity_report(**changes)
    (folder / "capacity.json").write_text(report.model_dump_json(by_alias=True))
    command = ["k8s", "size", str(folder / "slo.yaml")]
    return trimserve.main([*command, "--capacity", str(folder / "capacity.json"), *arguments])


def test_command_sizes_a_hundred_to_a_million_a_second_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--json", request_bytes=1_000.0) == 0
    written = json.loads(capsys.readouterr().out)
    (fleet,) = written["fleets"]
    rates = [one["rate_per_s"] for one in fleet["sizes"]]
    assert rates == [100, 1_000, 10_000, 100_000, 1_000_000]
    for one in fleet["sizes"]:
        assert one["replicas"] * 400 * 0.8 >= one["rate_per_s"]
        assert one["price_per_hour"] is None  # no price was given, and none is made up


def test_command_says_where_every_assumption_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--zones", "2", "--price-per-hour", "1.5", "--json"]
    assert run(tmp_path, *given, request_bytes=1_000.0) == 0
    written = json.loads(capsys.readouterr().out)
    sources = {one["option"]: one["source"] for one in written["assumptions"]}
    assert sources["--capacity"] == sources["--request-bytes"] == "measured"
    assert sources["--zones"] == sources["--price-per-hour"] == "given"
    assert sources["--node-cores"] == sources["--utilization"] == "default"
    assert sources["--response-bytes"] == "unknown"
    import typer

    options = {
        name
        for one in typer.main.get_command(trimserve.app).commands["k8s"].commands["size"].params  # type: ignore[attr-defined]
        for name in one.opts
    }
    assert set(sources) | {"--rate", "--json", "slo"} == options


def test_table_shows_the_cheaper_fleet_and_what_is_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text(capacity_report(capacity_per_s=2_000.0).model_dump_json(by_alias=True))
    prices = ["--price-per-hour", "1", "--price-per-hour", "20", "--rate", "1000"]
    assert run(tmp_path, "--capacity", str(other), *prices) == 0
    shown = capsys.readouterr().out
    tables = shown.split("capacity.json:")[1].split("other.json:")
    assert ["1,000*" in one for one in tables] == [True, False]
    assert "Assumptions" in shown
    assert "--degraded-utilization" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--survive", "region"], "--survive: got 'region'"),
        (["--price-per-hour", "1", "--price-per-hour", "2"], "--price-per-hour: got 2, want one"),
        (["--utilization", "0"], "utilization: got 0"),
        (["--network-share", "2"], "network_share: got 2"),
        (["--replica-cores", "64"], "no replica fits on a node"),
        (["--imbalance", "inf"], "'--imbalance': got 'inf': Input should be less"),
        (["--rate", "1", "--rate", "much"], "'--rate': got 'much': Input should be"),
        (["--reserved-cores", "inf"], "'--reserved-cores'"),
        (["--node-cores", "inf"], "'--node-cores'"),
        (["--request-bytes", "inf"], "'--request-bytes'"),
        (["--response-bytes", "inf"], "'--response-bytes'"),
        (["--price-per-hour", "inf"], "'--price-per-hour'"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_command_refuses_a_capacity_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, capacity_per_s=0.0) == 2
    assert "capacity_per_s: got 0, want above 0" in capsys.readouterr().err
