import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from loadtest.server_metrics import (
    Count,
    MetricsUnusable,
    Scrapes,
    Snapshot,
    counted,
    fetch,
    mean_batch_rows,
    mean_in_flight,
    read_snapshot,
)


class Server:
    """A histogram such as the server's, and its text."""

    def __init__(self, *edges_s: float) -> None:
        self.registry = CollectorRegistry()
        self.histogram = Histogram(
            "trimserve_request_duration_seconds",
            "Duration.",
            ("model", "version", "transport", "code"),
            buckets=edges_s,
            registry=self.registry,
        )

    def serve(self, *durations_s: float, version: str = "1", code: str = "ok") -> None:
        for duration_s in durations_s:
            self.histogram.labels("m", version, "rest", code).observe(duration_s)

    def snapshot(self, model: str = "m", version: str = "", threshold_s: float = 0.05) -> Snapshot:
        text = generate_latest(self.registry).decode() + "process_start_time_seconds 7.0\n"
        return read_snapshot(text, model, version, threshold_s, source="here")


def test_counts_are_the_differences_when_requests_came_before_too() -> None:
    server = Server(0.01, 0.05, 1.0)
    server.serve(0.001, 0.2)
    before = server.snapshot()
    server.serve(0.001, 0.05, 0.0500001, 3.0)
    server.serve(0.002, code="queue_full")
    pair = Scrapes("here", before, server.snapshot())
    # An observation just on the edge is within it.
    assert counted((pair,)) == {"rest": Count(n=5, n_ok=4, n_over=2)}
    assert not pair.restarted


def test_counts_start_from_zero_when_the_model_had_no_request_before() -> None:
    server = Server(0.05)
    before = server.snapshot()
    server.serve(0.01)
    assert before.counts == {}
    assert counted((Scrapes("here", before, server.snapshot()),)) == {"rest": Count(1, 1, 0)}


def test_counts_add_up_when_there_are_several_servers() -> None:
    one, two = Server(0.05), Server(0.05)
    empty = one.snapshot()
    one.serve(0.01)
    two.serve(0.01, 0.2)
    pairs = (Scrapes("one", empty, one.snapshot()), Scrapes("two", empty, two.snapshot()))
    assert counted(pairs) == {"rest": Count(n=3, n_ok=3, n_over=1)}


@pytest.mark.parametrize(("version", "n"), [("", 3), ("1", 1), ("2", 2), ("3", 0)])
def test_snapshot_takes_one_version_or_all_when_told(version: str, n: int) -> None:
    server = Server(0.05)
    server.serve(0.01)
    server.serve(0.01, 0.01, version="2")
    counts = server.snapshot(version=version).counts
    assert counts.get("rest", Count()).n == n


def test_snapshot_leaves_other_models_out_when_they_share_the_server() -> None:
    server = Server(0.05)
    server.serve(0.01)
    assert server.snapshot(model="other").counts == {}


def test_snapshot_says_that_the_edge_is_missing_when_there_is_none_on_the_threshold() -> None:
    server = Server(0.01, 0.06)
    server.serve(0.02)
    assert server.snapshot(threshold_s=0.06).has_edge
    missing = server.snapshot(threshold_s=0.05)
    assert not missing.has_edge
    assert missing.edges_s == (0.01, 0.06)


def test_scrapes_see_a_restart_when_the_start_time_or_a_counter_fell() -> None:
    server = Server(0.05)
    empty = server.snapshot()
    server.serve(0.01)
    full = server.snapshot()
    later = Snapshot(8.0, full.counts, full.edges_s, full.has_edge)
    assert Scrapes("here", full, later).restarted
    assert Scrapes("here", full, empty).restarted


def test_snapshot_is_refused_when_the_text_is_no_metrics() -> None:
    with pytest.raises(MetricsUnusable, match="here: not the metrics expected"):
        read_snapshot("<html> hello", "m", "", 0.05, source="here")


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1:1/metrics", "127.0.0.1:8002", "http://127.0.0.1:99999/metrics"]
)
def test_fetch_refuses_a_url_when_it_is_no_http_address(url: str) -> None:
    with pytest.raises(MetricsUnusable):
        fetch(url)


def test_batch_rows_are_the_mean_of_the_batches_between_the_scrapes() -> None:
    before = Snapshot(1.0, {}, (), True, n_batches=5, n_rows=50)
    after = Snapshot(1.0, {}, (), True, n_batches=9, n_rows=64)
    assert mean_batch_rows((Scrapes("here", before, after),)) == 3.5
    assert mean_batch_rows((Scrapes("here", before, before),)) is None


def test_snapshot_counts_the_models_batches_when_they_are_exported() -> None:
    server = Server(0.05)
    rows = Histogram(
        "trimserve_batch_rows", "Rows.", ("model", "version"), registry=server.registry
    )
    for model, version, n in (("m", "1", 4), ("m", "2", 2), ("other", "1", 8)):
        rows.labels(model, version).observe(n)
    both, one = server.snapshot(), server.snapshot(version="2")
    assert (both.n_batches, both.n_rows) == (2, 6)
    assert (one.n_batches, one.n_rows) == (1, 2)


def test_in_flight_is_the_sum_of_durations_by_the_windows_length() -> None:
    server = Server(0.05)
    server.serve(5.0)
    server.serve(7.0, version="2")
    before = server.snapshot(version="1")
    server.serve(0.5, 1.0)
    server.serve(0.5, code="queue_full")
    server.serve(9.0, version="2")
    pair = Scrapes("here", before, server.snapshot(version="1"))
    assert mean_in_flight((pair, pair), 4.0) == pytest.approx(1.0)
    assert mean_in_flight((Scrapes("here", before, before),), 4.0) is None
