"""Prometheus metrics of the server: names, labels and edges in one place.

Labels are closed sets: models are those of the repository, codes those of `serve.errors`.
"""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from loadtest.slo import histogram_edges
from serve.batcher import Batch, Completion

DEFAULT_THRESHOLD_S = 0.1
BATCH_ROWS_EDGES = tuple(2**power for power in range(11))


class Metrics:
    """The server's metrics in a registry of their own."""

    def __init__(self, threshold_s: float = DEFAULT_THRESHOLD_S) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        edges = histogram_edges(threshold_s)
        version = ("model", "version")
        self._request_s = Histogram(
            "trimserve_request_duration_seconds",
            "From the request's arrival to its answer being ready to send, errors included.",
            (*version, "transport", "code"),
            buckets=edges,
            registry=self.registry,
        )
        self._queue_s = Histogram(
            "trimserve_queue_duration_seconds",
            "From admission to the start of the batch.",
            version,
            buckets=edges,
            registry=self.registry,
        )
        self._execute_s = Histogram(
            "trimserve_execute_duration_seconds",
            "One batch in the engine, with assembling and splitting it.",
            version,
            buckets=edges,
            registry=self.registry,
        )
        self._batch_rows = Histogram(
            "trimserve_batch_rows",
            "Rows of an executed batch.",
            version,
            buckets=BATCH_ROWS_EDGES,
            registry=self.registry,
        )
        self._batches = Counter(
            "trimserve_batches",
            "Executed batches by the reason for which they were closed.",
            (*version, "reason"),
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "trimserve_requests_in_flight",
            "Requests admitted and not yet answered.",
            version,
            registry=self.registry,
        )
        self._model_info = Gauge(
            "trimserve_model_info",
            "1 for each loaded version, with what it is.",
            (*version, "variant", "engine", "precision"),
            registry=self.registry,
        )
        # `labels()` costs more than the observation: keep the children (closed label sets).
        self._child = functools.cache(lambda metric, *labels: metric.labels(*labels))

    def request_answered(
        self, model: str, version: str, transport: str, code: str, seconds: float
    ) -> None:
        self._child(self._request_s, model, version, transport, code).observe(seconds)

    def request_admitted(self, model: str, version: str) -> None:
        self._child(self._in_flight, model, version).inc()

    def request_left(self, model: str, version: str) -> None:
        self._child(self._in_flight, model, version).dec()

    def batch_executed(self, model: str, version: str, batch: Batch) -> None:
        self._child(self._execute_s, model, version).observe(batch.execute_s)
        self._child(self._batch_rows, model, version).observe(batch.n_rows)
        self._child(self._batches, model, version, batch.reason).inc()

    def request_queued(self, model: str, version: str, completion: Completion) -> None:
        self._child(self._queue_s, model, version).observe(completion.timing.queue_s)

    def model_loaded(
        self, model: str, version: str, variant: str, engine: str, precision: str
    ) -> None:
        self._model_info.labels(model, version, variant, engine, precision).set(1)
