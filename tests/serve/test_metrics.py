"""Metrics as Prometheus scrapes them."""

from collections.abc import Iterator

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import DEFAULT_THRESHOLD_S, Metrics
from tests.serve.conftest import THRESHOLD_MS
from tests.serve.running_server import RunningServer, fetch
from tests.serve.versions import rows

COUNT = "trimserve_request_duration_seconds_count"
LINEAR = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": rows(2).tolist()}]}


def scraped(server: RunningServer) -> Iterator[Metric]:
    return text_string_to_metric_families(
        fetch(server.metrics_port, "GET", "/metrics").body.decode()
    )


@pytest.mark.parametrize("kind", ["request", "phase"])
def test_histogram_has_an_edge_on_each_models_own_threshold_when_slos_differ(
    server: RunningServer, kind: str
) -> None:
    pair = {"a": ("FP32", [[1.0, 2.0]]), "b": ("INT64", [[1, 2]])}
    inputs = [{"name": n, "datatype": t, "shape": [1, 2], "data": d} for n, (t, d) in pair.items()]
    assert fetch(server.http_port, "POST", "/v2/models/linear/infer", LINEAR).status == 200
    assert (
        fetch(server.http_port, "POST", "/v2/models/pair/infer", {"inputs": inputs}).status == 200
    )
    (family,) = (m for m in scraped(server) if m.name == f"trimserve_{kind}_duration_seconds")
    edges: dict[str, set[float]] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            edges.setdefault(sample.labels["model"], set()).add(float(sample.labels["le"]))
    assert THRESHOLD_MS / 1e3 in edges["linear"]
    assert THRESHOLD_MS / 1e3 not in edges["pair"]
    assert DEFAULT_THRESHOLD_S in edges["pair"]
    assert len(edges["linear"]) < 64


def test_metrics_count_each_request_once_when_it_is_answered(server: RunningServer) -> None:
    def counts() -> tuple[float, float, float]:
        labels = {"model": "linear", "version": "1"}
        return (
            server.metric(COUNT, **labels, transport="rest", code="ok"),
            server.metric("trimserve_batch_rows_sum", **labels),
            server.metric("trimserve_phase_duration_seconds_count", **labels, phase="queue"),
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


# --- Triton's names

TRITON = {"model": "linear", "version": "1"}


def test_triton_metrics_have_their_exact_names_and_types_when_scraped(
    server: RunningServer,
) -> None:
    fetch(server.http_port, "POST", "/v2/models/linear/infer", LINEAR)
    text = fetch(server.metrics_port, "GET", "/metrics").body.decode()
    for name in (
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_request_duration_us",
        "nv_inference_queue_duration_us",
        "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_compute_output_duration_us",
        "nv_cache_num_hits_per_model",
    ):
        assert f"# TYPE {name} counter\n" in text
        assert f'\n{name}{{model="linear",' in text
    assert "# TYPE nv_inference_pending_request_count gauge\n" in text
    assert "nv_inference_count_total" not in text


def test_triton_metrics_count_rows_batches_and_failures_when_requests_are_answered(
    server: RunningServer,
) -> None:
    def counts() -> list[float]:
        return [
            # The client library's parser gives counters their suffix.
            server.metric("nv_inference_request_success_total", **TRITON),
            server.metric("nv_inference_count_total", **TRITON),
            server.metric("nv_inference_exec_count_total", **TRITON),
            server.metric("nv_inference_request_failure_total", **TRITON, reason="OTHER"),
        ]

    before = counts()
    for _ in range(2):
        assert fetch(server.http_port, "POST", "/v2/models/linear/infer", LINEAR).status == 200
    bad = {"inputs": [{**LINEAR["inputs"][0], "shape": [4, 2]}]}
    assert fetch(server.http_port, "POST", "/v2/models/linear/infer", bad).status == 400
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [2, 4, 2, 1]
    assert server.metric("nv_inference_pending_request_count", **TRITON) == 0


def test_metrics_port_answers_only_scrapes_when_asked_for_something_else(
    server: RunningServer,
) -> None:
    assert fetch(server.metrics_port, "GET", "/secrets").status == 404
    assert fetch(server.metrics_port, "GET", "/metrics?x=1").status == 200
