"""The window's counts by Prometheus: the scrapes at its ends, and whether any is missing between.

The server is at rest at both ends, so any scrape that begins there will do, as long as it is one
and the same for all counters. Nothing here needs the clocks of two machines to agree: a scrape is
known to have begun after a moment when it is the second to come in since.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from loadtest.memory import METRIC, MemorySeries, series_of
from loadtest.prometheus import Prometheus, PrometheusUnusable, ScrapeTarget, find_target
from loadtest.samples import Samples
from loadtest.server_metrics import Coverage, MetricsUnusable, Scrapes, Snapshot, snapshot_of
from loadtest.verdict import ServerEvidence

NEW_SCRAPES = 2
"""The first to come in may have begun before we asked, the second can't."""
MAX_MORE_SCRAPES = 3
MAX_MEMORY_POINTS = 1500
"""For counters that haven't settled by then."""
WAIT_PER_INTERVAL = 3
WAIT_S = 5.0
POLLS_PER_INTERVAL = 10
MIN_POLL_S, MAX_POLL_S = 0.05, 1.0


class PrometheusObserver:
    """Takes the counters of all servers before and after the measured requests.

    Making one asks Prometheus what it scrapes, and raises PrometheusUnusable.
    """

    def __init__(
        self,
        prometheus: Prometheus,
        metrics_urls: Sequence[str],
        model: str,
        version: str,
        threshold_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._prometheus = prometheus
        self._model, self._version, self._threshold_s = model, version, threshold_s
        self._clock, self._sleep = clock, sleep
        self.targets = tuple(find_target(prometheus, url) for url in metrics_urls)
        """[one for each of `metrics_urls`]"""
        self._starts_s: list[float] = []
        self._before: list[Snapshot] = []
        self._error = ""

    @property
    def longest_s(self) -> float:
        """How long `before` may take."""
        each_s = max((_patience_s(one) for one in self.targets), default=0.0)
        return (NEW_SCRAPES + MAX_MORE_SCRAPES) * each_s

    def before(self) -> None:
        """Wait for scrapes without a request in flight, until two in turn have the same counters.

        The second of them is the window's end. What goes wrong is kept for `evidence`.
        """
        try:
            self._starts_s = self._await_scrapes(self._last_scrapes(), 1)
            self._before = self._snapshots(self._starts_s)
            for _ in range(1 + MAX_MORE_SCRAPES):
                later_s = self._await_scrapes(self._starts_s, 1)
                again = self._snapshots(later_s)
                settled = again == self._before
                self._starts_s, self._before = later_s, again
                if settled:
                    return
        except (PrometheusUnusable, MetricsUnusable) as error:
            self._error = str(error)

    def evidence(self, samples: Samples) -> ServerEvidence:
        """Wait for scrapes after the last answer, until every answered request is counted."""
        if self._error:
            return ServerEvidence(error=self._error)
        n_answered = int(samples.answered.sum())
        try:
            ends_s = self._await_scrapes(self._last_scrapes(), NEW_SCRAPES)
            for _ in range(MAX_MORE_SCRAPES):
                after = self._snapshots(ends_s)
                if _n_grown(self._before, after) >= n_answered:
                    break
                ends_s = self._await_scrapes(ends_s, 1)
            return ServerEvidence(
                scrapes=self._pairs(self._snapshots(ends_s), ends_s),
                coverage=self._coverage(ends_s),
                memory=self._memory(ends_s),
            )
        except (PrometheusUnusable, MetricsUnusable) as error:
            return ServerEvidence(error=str(error))

    def _pairs(self, after: list[Snapshot], ends_s: list[float]) -> tuple[Scrapes, ...]:
        return tuple(
            Scrapes(target.url, before, then, self._prometheus.n_resets(target, start_s, end_s))
            for target, before, then, start_s, end_s in zip(
                self.targets, self._before, after, self._starts_s, ends_s, strict=True
            )
        )

    def _coverage(self, ends_s: list[float]) -> tuple[Coverage, ...]:
        found = []
        for target, start_s, end_s in zip(self.targets, self._starts_s, ends_s, strict=True):
            scrapes = self._prometheus.scrapes(target, start_s, end_s)
            times_s = [start_s, *(time_s for time_s, _ in scrapes), end_s]
            found.append(
                Coverage(
                    url=target.url,
                    from_s=start_s,
                    to_s=end_s,
                    interval_s=target.interval_s,
                    n_scrapes=len(scrapes),
                    n_failed=sum(not succeeded for _, succeeded in scrapes),
                    longest_gap_s=max(later - one for one, later in pairwise(times_s)),
                )
            )
        return tuple(found)

    def _memory(self, ends_s: list[float]) -> tuple[MemorySeries, ...]:
        found = []
        for target, start_s, end_s in zip(self.targets, self._starts_s, ends_s, strict=True):
            points = self._prometheus.values(target, METRIC, start_s, end_s)
            # As many as a direct reading takes: a long window has many thousands of scrapes.
            step = max(1, -(-len(points) // MAX_MEMORY_POINTS))
            if points:
                found.append(series_of(target.url, points[::step]))
        return tuple(found)

    def _snapshots(self, at_s: list[float]) -> list[Snapshot]:
        return [self._snapshot(*one) for one in zip(self.targets, at_s, strict=True)]

    def _snapshot(self, target: ScrapeTarget, at_s: float) -> Snapshot:
        """A model without a series had no request, for the scrape itself is there."""
        samples = self._prometheus.counters_at(target, at_s)
        return snapshot_of(samples, self._model, self._version, self._threshold_s, target.url)

    def _last_scrapes(self) -> list[float]:
        last = (self._prometheus.last_scrape_s(target) for target in self.targets)
        return [0.0 if time_s is None else time_s for time_s in last]

    def _await_scrapes(self, since_s: list[float], n: int) -> list[float]:
        """The n-th new scrape of each target, or a later one: a successful one in any case."""
        for _ in range(n):
            since_s = [self._await(*one) for one in zip(self.targets, since_s, strict=True)]
        return since_s

    def _await(self, target: ScrapeTarget, since_s: float) -> float:
        poll_s = min(MAX_POLL_S, max(MIN_POLL_S, target.interval_s / POLLS_PER_INTERVAL))
        deadline_s = self._clock() + _patience_s(target)
        while self._clock() < deadline_s:
            time_s = self._prometheus.last_scrape_s(target)
            if time_s is not None and time_s > since_s:
                scrapes = self._prometheus.scrapes(target, time_s, time_s)
                if scrapes and scrapes[-1][1]:
                    return time_s
            self._sleep(poll_s)
        raise PrometheusUnusable(
            f"{self._prometheus.url} had no successful scrape of {target.url} for "
            f"{_patience_s(target):g} s"
        )


def _patience_s(target: ScrapeTarget) -> float:
    return WAIT_PER_INTERVAL * target.interval_s + WAIT_S


def _n_grown(before: list[Snapshot], after: list[Snapshot]) -> int:
    then = sum(count.n for one in after for count in one.counts.values())
    return then - sum(count.n for one in before for count in one.counts.values())
