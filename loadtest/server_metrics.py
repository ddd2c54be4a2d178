"""The server's own count of the same requests, from two scrapes of its metrics.

Differences of raw counters, bucket edge on the threshold: exact, where increase() extrapolates
and histogram_quantile() interpolates. Knows the text format and one histogram, no client.
"""

import http.client
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

HISTOGRAM = "trimserve_request_duration_seconds"
BATCH_ROWS = "trimserve_batch_rows"
START_TIME = "process_start_time_seconds"
TIMEOUT_S = 5.0
MAX_GAP_INTERVALS = 1.5
"""Between two scrapes; a missing one makes it 2."""
MAX_METRICS_BYTES = 50_000_000
EDGE_TOLERANCE = 1e-9
"""Relative; edges and thresholds are decimal fractions that went through text."""


class MetricsUnusable(Exception):
    """The metrics can't be read; `str()` says where and why."""


@dataclass(frozen=True)
class Sample:
    """One number of a scrape."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Count:
    """Requests of one transport."""

    n: int = 0
    n_ok: int = 0
    n_over: int = 0
    """took longer than the threshold, whatever came of them"""

    def __add__(self, other: "Count") -> "Count":
        return Count(self.n + other.n, self.n_ok + other.n_ok, self.n_over + other.n_over)

    def __sub__(self, other: "Count") -> "Count":
        return Count(self.n - other.n, self.n_ok - other.n_ok, self.n_over - other.n_over)


@dataclass(frozen=True)
class Snapshot:
    """One server's totals for one model at one scrape."""

    started_s: float | None
    """when the process started, Unix time"""
    counts: Mapping[str, Count]
    """by transport"""
    edges_s: tuple[float, ...]
    """of the model's histogram, infinity left out; none where it has no request yet"""
    has_edge: bool
    """every series has an edge on the threshold"""
    n_batches: float = 0
    n_rows: float = 0
    """in all those batches"""
    duration_s: float = 0
    """of all requests together"""


@dataclass(frozen=True)
class Scrapes:
    """One server before and after the measurement."""

    url: str
    before: Snapshot
    after: Snapshot
    n_resets: int = 0
    """falls of a counter seen in between"""

    @property
    def restarted(self) -> bool:
        """Another process answers now, or a counter fell."""
        fell = any(
            self.after.counts.get(transport, Count()).n < count.n
            for transport, count in self.before.counts.items()
        )
        return fell or self.n_resets > 0 or self.before.started_s != self.after.started_s


@dataclass(frozen=True)
class Coverage:
    """How completely Prometheus scraped one server between the two ends, both of them scrapes."""

    url: str
    from_s: float
    to_s: float
    """Unix time, by Prometheus's clock"""
    interval_s: float
    n_scrapes: int
    n_failed: int
    longest_gap_s: float

    @property
    def complete(self) -> bool:
        """Each scrape succeeded, and none was left out."""
        return self.n_failed == 0 and self.longest_gap_s <= MAX_GAP_INTERVALS * self.interval_s


def counted(scrapes: tuple[Scrapes, ...]) -> dict[str, Count]:
    """Requests by transport between the scrapes, all servers together."""
    totals: dict[str, Count] = {}
    for pair in scrapes:
        for transport, count in pair.after.counts.items():
            grown = count - pair.before.counts.get(transport, Count())
            totals[transport] = totals.get(transport, Count()) + grown
    return totals


def mean_batch_rows(scrapes: tuple[Scrapes, ...]) -> float | None:
    """Rows of a batch between the scrapes, on average; none where no batch was counted."""
    n_batches = sum(pair.after.n_batches - pair.before.n_batches for pair in scrapes)
    n_rows = sum(pair.after.n_rows - pair.before.n_rows for pair in scrapes)
    return n_rows / n_batches if n_batches > 0 else None


def mean_in_flight(scrapes: tuple[Scrapes, ...], window_s: float) -> float | None:
    """Requests in the servers of those that came within `window_s`, averaged over it; none where
    none was counted.

    The sum of their durations by the length (Little's law), as `loadtest.scaling` asks for.
    """
    total_s = sum(pair.after.duration_s - pair.before.duration_s for pair in scrapes)
    return total_s / window_s if total_s > 0 else None


def scrape(url: str, model: str, version: str, threshold_s: float) -> Snapshot:
    """Raises MetricsUnusable."""
    return read_snapshot(fetch(url), model, version, threshold_s, source=url)


def fetch(url: str) -> str:
    """The text at an http:// URL. Raises MetricsUnusable."""
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        raise MetricsUnusable(f"{url}: {error}") from error
    if parts.scheme != "http" or not parts.hostname:
        raise MetricsUnusable(f"got {url!r}, want http://HOST:PORT/PATH")
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path or "/metrics", headers={"Accept": "text/plain"})
        answer = connection.getresponse()
        text = answer.read(MAX_METRICS_BYTES).decode("utf-8")
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        raise MetricsUnusable(f"{url}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise MetricsUnusable(f"{url}: HTTP {answer.status}")
    return text


def read_snapshot(text: str, model: str, version: str, threshold_s: float, source: str) -> Snapshot:
    """Pick the model's counters out of a scrape's text, as `snapshot_of` does.

    Raises MetricsUnusable where the text is no metrics.
    """
    try:
        samples = [
            Sample(one.name, one.labels, one.value)
            for family in text_string_to_metric_families(text)
            for one in family.samples
        ]
    except ValueError as error:
        raise MetricsUnusable(f"{source}: not the metrics expected ({error!r})") from error
    return snapshot_of(samples, model, version, threshold_s, source)


def snapshot_of(
    samples: Iterable[Sample], model: str, version: str, threshold_s: float, source: str
) -> Snapshot:
    """Add up the model's counters of one scrape; an empty `version` takes all versions together.

    Raises MetricsUnusable where a counter lacks a label.
    """
    series: dict[tuple[str, str, str], dict[float, float]] = {}
    started_s = None
    totals = {f"{BATCH_ROWS}_count": 0.0, f"{BATCH_ROWS}_sum": 0.0, f"{HISTOGRAM}_sum": 0.0}
    try:
        for sample in samples:
            if sample.name == START_TIME:
                started_s = sample.value
            elif sample.name == f"{HISTOGRAM}_bucket" and sample.labels["model"] == model:
                labels = sample.labels
                if version in ("", labels["version"]):
                    key = (labels["transport"], labels["code"], labels["version"])
                    series.setdefault(key, {})[float(labels["le"])] = sample.value
            elif (
                sample.name in totals
                and sample.labels["model"] == model
                and version in ("", sample.labels["version"])
            ):
                totals[sample.name] += sample.value
    except (ValueError, KeyError) as error:
        raise MetricsUnusable(f"{source}: not the metrics expected ({error!r})") from error
    counts: dict[str, Count] = {}
    edges: set[float] = set()
    has_edge = True
    for (transport, code, _), buckets in series.items():
        within = _within(buckets, threshold_s)
        has_edge = has_edge and within is not None
        edges.update(buckets)
        n = int(buckets.get(math.inf, 0))
        over = n - int(within) if within is not None else 0
        counts[transport] = counts.get(transport, Count()) + Count(n, n * (code == "ok"), over)
    return Snapshot(
        started_s,
        counts,
        tuple(sorted(edge for edge in edges if edge < math.inf)),
        has_edge,
        n_batches=totals[f"{BATCH_ROWS}_count"],
        n_rows=totals[f"{BATCH_ROWS}_sum"],
        duration_s=totals[f"{HISTOGRAM}_sum"],
    )


def _within(buckets: Mapping[float, float], threshold_s: float) -> float | None:
    for edge, count in buckets.items():
        if math.isclose(edge, threshold_s, rel_tol=EDGE_TOLERANCE):
            return count
    return None
