"""Metrics as Prometheus scrapes them."""

from collections.abc import Iterator

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import Metrics
from tests.serve.conftest import THRESHOLD_MS
from tests.serve.running_server import RunningServer, fetch
from tests.serve.versions import rows

COUNT = "trimserve_request_duration_seconds_count"
LINEAR = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": rows(2).tolist()}]}


def scraped(server: RunningServer) -> Iterator[Metric]:
    return text_string_to_metric_families(
        fetch(server.metrics_port, "GET", "/metrics").body.decode()
    )


@pytest.mark.parametrize("phase", ["request", "queue", "execute"])
def test_histogram_has_an_edge_on_the_threshold_when_an_slo_is_given(
    server: RunningServer, phase: str
) -> None:
    fetch(server.http_port, "POST", "/v2/models/linear/infer", LINEAR)
    (family,) = (m for m in scraped(server) if m.name == f"trimserve_{phase}_duration_seconds")
    edges = {s.labels["le"] for s in family.samples if s.name.endswith("_bucket")}
    assert f"{THRESHOLD_MS / 1e3}" in edges
    assert len(edges) < 64


def test_metrics_count_each_request_once_when_it_is_answered(server: RunningServer) -> None:
    def counts() -> tuple[float, float, float]:
        labels = {"model": "linear", "version": "1"}
        return (
            server.metric(COUNT, **labels, transport="rest", code="ok"),
            server.metric("trimserve_batch_rows_sum", **labels),
            server.metric("trimserve_queue_duration_seconds_count", **labels),
        )

    before = counts()
    for _ in range(3):
        assert fetch(server.http_port, "POST", "/v2/models/linear/infer", LINEAR).status == 200
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [3, 6, 3]
    assert server.metric("trimserve_requests_in_flight", model="linear") == 0


@pytest.mark.parametrize(
    ("path", "labels"),
    [
        pytest.param(
            "/v2/models/linear/infer",
            {"model": "linear", "version": "1", "code": "invalid_request"},
            id="the request is bad",
        ),
        pytest.param(
            "/v2/models/who-knows/infer",
            {"model": "", "version": "", "code": "model_not_found"},
            id="the model is unknown",
        ),
        pytest.param(
            "/v2/models/linear/versions/77/infer",
            {"model": "", "version": "", "code": "model_not_found"},
            id="the version is unknown",
        ),
    ],
)
def test_metrics_keep_closed_labels_when(
    server: RunningServer, path: str, labels: dict[str, str]
) -> None:
    before = server.metric(COUNT, **labels)
    fetch(server.http_port, "POST", path, {"inputs": []})
    assert server.metric(COUNT, **labels) == before + 1
    text = fetch(server.metrics_port, "GET", "/metrics").body
    assert b"who-knows" not in text
    assert b"77" not in [s.labels.get("version") for m in scraped(server) for s in m.samples]


def test_metrics_describe_the_loaded_versions_when_scraped(server: RunningServer) -> None:
    labels = {"model": "linear", "version": "1", "engine": "onnxruntime", "precision": "fp32"}
    assert server.metric("trimserve_model_info", **labels) == 1


def test_metrics_stand_alone_when_two_are_made_in_one_process() -> None:
    first, second = Metrics(0.05), Metrics(0.05)
    first.request_answered("m", "1", "rest", "ok", 0.01)
    labels = {"model": "m", "version": "1", "transport": "rest", "code": "ok"}
    assert first.registry.get_sample_value(COUNT, labels) == 1
    assert second.registry.get_sample_value(COUNT, labels) is None
