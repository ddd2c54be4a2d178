"""Prometheus metrics of the server: names, labels and edges in one place.

Two families: our own, and Triton's `nv_inference_*`, for dashboards and autoscalers made for it.
Labels are closed sets: models are those of the repository, codes those of `serve.errors`.
"""

import bisect
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from loadtest.slo import histogram_edges
from serve.batcher import Batch, Completion
from serve.model import Model
from serve.statistics import Statistics

DEFAULT_THRESHOLD_S = 0.1
BATCH_ROWS_EDGES = tuple(2**power for power in range(11))
# Phases of a request that are timed one by one; those of its batch are timed once a batch.
REQUEST_PHASES = ("decode", "transform", "queue", "encode")
BATCH_PHASES = ("assemble", "execute", "split")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TRITON_SUFFIX = re.compile(rb"^(# (?:HELP|TYPE) nv_\w+?)_total ", re.MULTILINE)

# Triton's counter -> its description and its value in a version's statistics.
_TRITON_COUNTERS: dict[str, tuple[str, Callable[[Statistics], float]]] = {
    "nv_inference_request_success": ("Requests answered.", lambda one: one.success.count),
    "nv_inference_count": ("Inferences: rows, without cached ones.", lambda s: s.inference_count),
    "nv_inference_exec_count": ("Executed batches.", lambda s: s.execution_count),
    "nv_inference_request_duration_us": (
        "Time of requests, from arrival to answer, summed up.",
        lambda s: (s.success.ns + s.fail.ns) // 1000,
    ),
    "nv_inference_queue_duration_us": (
        "Time of requests in the queue, summed up.",
        lambda s: s.queue.ns // 1000,
    ),
    "nv_inference_compute_input_duration_us": (
        "Time of putting requests' batches together, summed up over requests.",
        lambda s: s.compute_input.ns // 1000,
    ),
    "nv_inference_compute_infer_duration_us": (
        "Time of requests' batches in the engine, summed up over requests.",
        lambda s: s.compute_infer.ns // 1000,
    ),
    "nv_inference_compute_output_duration_us": (
        "Time of taking requests' batches apart, summed up over requests.",
        lambda s: s.compute_output.ns // 1000,
    ),
    "nv_cache_num_hits_per_model": ("Answers from the cache.", lambda s: s.cache_hit.count),
    "nv_cache_num_misses_per_model": (
        "Answers computed for want of one in the cache.",
        lambda s: s.cache_miss.count,
    ),
    "nv_cache_hit_duration_per_model": (
        "Time of answers from the cache, in microseconds, summed up.",
        lambda s: s.cache_hit.ns // 1000,
    ),
    "nv_cache_miss_duration_per_model": (
        "Time of keeping what was computed, in microseconds, summed up.",
        lambda s: s.cache_miss.ns // 1000,
    ),
}


class Metrics:
    """The server's metrics in a registry of their own, and the statistics of loaded versions."""

    def __init__(self, threshold_s: float = DEFAULT_THRESHOLD_S) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._threshold_s = threshold_s
        self._thresholds: dict[tuple[str, str], float] = {}
        self._models: dict[tuple[str, str], tuple[Model, Statistics]] = {}
        self._info_labels: dict[tuple[str, str], tuple[str, ...]] = {}
        version = ("model", "version")
        self._request_s = _EdgedHistogram(
            "trimserve_request_duration_seconds",
            "From the request's arrival to its answer being ready to send, errors included.",
            (*version, "transport", "code"),
        )
        self._phase_s = _EdgedHistogram(
            "trimserve_phase_duration_seconds",
            "Phases of a request (decode, transform, queue, encode) and of a batch (assemble, "
            "execute, split), by how the phase ended.",
            (*version, "phase", "outcome"),
        )
        self.registry.register(self._request_s)
        self.registry.register(self._phase_s)
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
        self._in_flight: dict[tuple[str, str], int] = {}
        self._merged = Counter(
            "trimserve_merged_requests",
            "Requests answered by an equal one that was under way.",
            version,
            registry=self.registry,
        )
        self._model_info = Gauge(
            "trimserve_model_info",
            "1 for each loaded version, with what it is.",
            (*version, "variant", "engine", "precision"),
            registry=self.registry,
        )
        self.registry.register(_InFlightCollector(self._in_flight))
        self.registry.register(_TritonCollector(self._models))
        # `labels()` costs more than the observation: keep the children (closed label sets).
        self._child = functools.cache(lambda metric, *labels: metric.labels(*labels))

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format.

        Triton's counters have no suffix `_total`, which the client library insists on in the
        comments (not in the samples): they are put right here.
        """
        return _TRITON_SUFFIX.sub(rb"\1 ", generate_latest(self.registry))

    def statistics(self, model: str, version: str) -> Statistics:
        """Those of a loaded version. Raises KeyError for another one."""
        return self._models[model, version][1]

    def model_loaded(self, model: Model) -> None:
        """Count for this version from now on; one that was there before keeps its statistics."""
        manifest = model.manifest
        key = (manifest.model, manifest.version)
        known = self._models.get(key)
        self._forget_info(key)
        self._models[key] = (model, known[1] if known else Statistics())
        if model.slo is not None:
            self._thresholds[key] = model.slo.latency.threshold_s
        labels = (*key, manifest.variant_id, manifest.engine.name, manifest.engine.precision)
        self._info_labels[key] = labels
        self._model_info.labels(*labels).set(1)

    def model_unloaded(self, model: str, version: str) -> None:
        """Forget a version; its histograms stay, since counters must not go back."""
        self._models.pop((model, version), None)
        self._forget_info((model, version))

    def request_answered(
        self, model: str, version: str, transport: str, code: str, seconds: float
    ) -> None:
        edge = self._thresholds.get((model, version), self._threshold_s)
        self._request_s.labels(edge, model, version, transport, code).observe(seconds)

    def phase_ended(
        self, model: str, version: str, phase: str, seconds: float, outcome: str = "ok"
    ) -> None:
        edge = self._thresholds.get((model, version), self._threshold_s)
        self._phase_s.labels(edge, model, version, phase, outcome).observe(seconds)

    def request_admitted(self, model: str, version: str) -> None:
        key = (model, version)
        self._in_flight[key] = self._in_flight.get(key, 0) + 1

    def request_left(self, model: str, version: str) -> None:
        self._in_flight[model, version] -= 1

    def request_merged(self, model: str, version: str) -> None:
        self._child(self._merged, model, version).inc()

    def request_queued(self, model: str, version: str, completion: Completion) -> None:
        """A request left the queue, into a batch or otherwise."""
        in_batch = completion.timing.batch_rows > 0
        outcome = "ok" if in_batch or completion.error is None else completion.error.code
        self.phase_ended(model, version, "queue", completion.timing.queue_s, outcome)

    def batch_executed(self, model: str, version: str, batch: Batch) -> None:
        failed = any(
            completion.error is not None and completion.timing.batch_rows
            for completion in batch.completions
        )
        outcome = "engine_failed" if failed else "ok"
        phases = batch.phases
        for phase, seconds in zip(
            BATCH_PHASES, (phases.assemble_s, phases.execute_s, phases.split_s), strict=True
        ):
            self.phase_ended(model, version, phase, seconds, outcome)
        self._child(self._batch_rows, model, version).observe(batch.n_rows)
        self._child(self._batches, model, version, batch.reason).inc()
        if (model, version) in self._models:
            self.statistics(model, version).executed(batch)

    def _forget_info(self, key: tuple[str, str]) -> None:
        labels = self._info_labels.pop(key, None)
        if labels is not None:
            self._model_info.remove(*labels)


class _Series:
    """One series of a histogram. A single owner counts, without locks; scrapes read."""

    __slots__ = ("_edges", "counts", "total_s")

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self.counts = [0] * len(edges)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self._edges, seconds)] += 1
        self.total_s += seconds

    def samples(self, name: str, labels: dict[str, str]) -> Iterator[Sample]:
        so_far = 0
        for edge, count in zip(self._edges, list(self.counts), strict=True):
            so_far += count
            yield Sample(f"{name}_bucket", {**labels, "le": _edge_text(edge)}, so_far)
        yield Sample(f"{name}_count", labels, so_far)
        yield Sample(f"{name}_sum", labels, self.total_s)


def _edge_text(edge: float) -> str:
    return "+Inf" if math.isinf(edge) else repr(float(edge))


class _EdgedHistogram(Collector):
    """A histogram each of whose series has its edges on its own model's SLO threshold: models may
    be loaded at any time, and bring another one.

    It is filled several times a request, which is why it counts by itself: the client library's
    takes five times as long (docs/experiments.md).
    """

    def __init__(self, name: str, documentation: str, labelnames: tuple[str, ...]) -> None:
        self._name = name
        self._documentation = documentation
        self._labelnames = labelnames
        self._series: dict[tuple[str, ...], _Series] = {}

    def labels(self, threshold_s: float, *labels: str) -> _Series:
        """The series of these labels; the threshold counts when it is made."""
        series = self._series.get(labels)
        if series is None:
            edges = tuple(sorted({*histogram_edges(threshold_s), math.inf}))
            series = self._series[labels] = _Series(edges)
        return series

    def collect(self) -> Iterable[Metric]:
        metric = Metric(self._name, self._documentation, "histogram")
        for labels, series in list(self._series.items()):
            named = dict(zip(self._labelnames, labels, strict=True))
            metric.samples.extend(series.samples(self._name, named))
        yield metric

    def describe(self) -> Iterable[Metric]:
        yield Metric(self._name, self._documentation, "histogram")


class _InFlightCollector(Collector):
    """The requests in flight, counted by the service as they come and go."""

    def __init__(self, in_flight: dict[tuple[str, str], int]) -> None:
        self._in_flight = in_flight

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "trimserve_requests_in_flight",
            "Requests admitted and not yet answered.",
            labels=("model", "version"),
        )
        for key, count in list(self._in_flight.items()):
            family.add_metric(key, count)
        yield family

    def describe(self) -> Iterable[Metric]:
        return []


class _TritonCollector(Collector):
    """Triton's metrics, computed from the statistics when somebody asks."""

    def __init__(self, models: dict[tuple[str, str], tuple[Model, Statistics]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        models = list(self._models.items())
        labels = ("model", "version")
        for name, (documentation, value) in _TRITON_COUNTERS.items():
            family = CounterMetricFamily(name, documentation, labels=labels)
            for key, (_, statistics) in models:
                family.samples.append(
                    Sample(name, dict(zip(labels, key, strict=True)), value(statistics))
                )
            yield family
        failures = CounterMetricFamily(
            "nv_inference_request_failure", "Requests that failed.", labels=(*labels, "reason")
        )
        pending = GaugeMetricFamily(
            "nv_inference_pending_request_count", "Requests in the queue.", labels=labels
        )
        for key, (model, statistics) in models:
            pending.add_metric(key, model.batcher.n_queued)
            for reason, count in statistics.failures.items():
                given = {**dict(zip(labels, key, strict=True)), "reason": reason}
                failures.samples.append(Sample("nv_inference_request_failure", given, count))
        yield failures
        yield pending

    def describe(self) -> Iterable[Metric]:
        return []
