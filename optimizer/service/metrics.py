"""What Prometheus reads of the service and of its workers, by base units and with few labels."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from optimizer.service.database import DatabaseUnavailable
from optimizer.service.jobs import State
from optimizer.service.ledger import Ledger
from optimizer.service.worker import WorkerMetrics

SEEN_WITHIN_S = 30.0
"""A worker that was seen within that time counts as there."""
_JOB_EDGES = (1, 10, 60, 300, 900, 1_800, 3_600, 7_200, 14_400, 43_200, 86_400)


class ServiceMetrics:
    """Of the process that answers REST and gRPC."""

    def __init__(self, ledger: Ledger) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Jobs(ledger))
        self.requests = Counter(
            "trimserve_service_requests",
            "Requests answered, by transport and code.",
            ("transport", "operation", "code"),
            registry=self.registry,
        )
        self.request_duration = Histogram(
            "trimserve_service_request_duration_seconds",
            "From a request's arrival to its answer; streams of events are left out.",
            ("transport", "operation"),
            registry=self.registry,
        )
        self.followers = Gauge(
            "trimserve_service_event_followers",
            "Clients that follow events now.",
            registry=self.registry,
        )
        self.info = Gauge(
            "process_start_time_seconds",
            "When the process started, seconds since 1970.",
            registry=self.registry,
        )
        self.info.set(time.time())


class _Jobs(Collector):
    """Jobs by state and workers, asked of the database when Prometheus asks."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("trimserve_service_database_up", "Whether the database answers.")
        jobs = GaugeMetricFamily("trimserve_jobs", "Jobs by state.", labels=["state"])
        workers = GaugeMetricFamily(
            "trimserve_workers", "Workers seen lately, busy with a job or not.", labels=["busy"]
        )
        stored = GaugeMetricFamily(
            "trimserve_stored_bytes",
            "Bytes of files kept: what jobs made, and uploads as they were announced.",
            labels=["kind"],
        )
        try:
            jobs_bytes, uploads_bytes = self._ledger.stored_bytes(), self._ledger.uploaded_bytes()
            counts, seen = self._ledger.counts(), self._ledger.workers(SEEN_WITHIN_S)
        except DatabaseUnavailable:
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        for state in State:
            if state is not State.DELETED:
                jobs.add_metric([state], counts.get(state, 0))
        n_busy = sum(job is not None for job in seen.values())
        workers.add_metric(["true"], n_busy)
        workers.add_metric(["false"], len(seen) - n_busy)
        stored.add_metric(["jobs"], jobs_bytes)
        stored.add_metric(["uploads"], uploads_bytes)
        return [up, jobs, workers, stored]


class PrometheusWorkerMetrics(WorkerMetrics):
    """Of a worker process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "trimserve_worker_job_duration_seconds",
            "From a claim to its end, by how it ended: a state of the job, or let_go.",
            ("how",),
            buckets=_JOB_EDGES,
            registry=self.registry,
        )

    def ended(self, how: str, seconds: float) -> None:
        self._seconds.labels(str(how)).observe(seconds)
