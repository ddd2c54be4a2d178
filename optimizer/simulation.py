"""Simulation: arrivals played through a replica, with simulated time.

It calls `serve.batch_policy`, the very code that the server runs. It knows measured service
times, not how they were measured, and no engine. The model, from a request's arrival to its
answer:

1. The front end takes `serial_s` of one request at a time, first come, first served.
2. The batching policy queues it, and batches it with others when an instance is idle.
3. A batch of n rows takes the median service time of n, or longer: half of the batches take
   just the median, the others exp(σ|z|) times it, z standard normal and σ such that the 99th
   percentile is the measured one. No batch is faster than the median, and the tail beyond the
   99th percentile is a log-normal's.
4. Where instances and front end want more than the replica's cores, batches take longer in
   proportion: the front end's work has its share, and the instances get what is left.
5. The way there and back (network, thread wake-ups), for which nobody waits in line, takes
   `delay_s` or longer, drawn like a batch's time with `delay_p99_s`.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loadtest.slo import Slo
from optimizer.result import InstanceTimes
from serve.batch_policy import BatchQueue, Entry, Limits, ServiceTimes

FloatArray = NDArray[np.float64]

MAX_QUEUE_SIZE = 1024
_Z99 = NormalDist().inv_cdf(0.99)
_MAX_SPREAD = 3.0
"""The largest σ: a 99th percentile a thousand times the median, a broken measurement."""


@dataclass(frozen=True)
class FrontEnd:
    """What a request costs outside of the engine: the front end's work on it, one request at a
    time, and the median and 99th percentile of the way there and back.

    The defaults were measured on `trimserve serve` at light load, with REST and gRPC in equal
    parts over the loopback and tensors of some kilobytes; docs/experiments.md says how.
    """

    serial_s: float = 500e-6
    delay_s: float = 500e-6
    delay_p99_s: float = 1_200e-6


@dataclass(frozen=True)
class Replica:
    """One server process: measured instances, the cores that it may use, and its batching."""

    times: InstanceTimes
    cores: int
    max_batch_size: int = 1
    max_queue_delay_s: float = 0.0
    max_queue_size: int = MAX_QUEUE_SIZE
    front_end: FrontEnd = FrontEnd()

    def highest_throughput(self, rows: int) -> float:
        """Requests of `rows` a second that no policy could exceed."""
        rate, serial_s = self.engine_throughput(rows), self.front_end.serial_s
        return min(rate, 1 / serial_s) if serial_s > 0 else rate

    def engine_throughput(self, rows: int) -> float:
        """Requests of `rows` a second that the instances could answer at most, the front end
        left aside."""
        medians = _medians(self)
        batches = range(rows, max(rows, self.max_batch_size) + 1, rows)
        return self.times.instances * max(n / rows / medians.of(n) for n in batches)

    def light_load(self, load: "Load") -> float:
        """The rate at which fewer requests meet another than the load's quantile leaves out: a
        replica that is too slow there is at any rate."""
        seconds = _medians(self).of(load.rows) / self.times.instances
        return (1 - load.quantile) / 2 / max(seconds, self.front_end.serial_s)


@dataclass(frozen=True)
class Load:
    """Requests a second, rows in each, and when an answer is in time."""

    rate_per_s: float
    threshold_s: float = math.inf
    quantile: float = 0.99
    success_ratio: float = 0.999
    rows: int = 1
    arrivals: Literal["poisson", "constant"] = "poisson"

    @classmethod
    def of(cls, slo: Slo) -> "Load":
        return cls(
            rate_per_s=slo.workload.rate_per_s,
            threshold_s=slo.latency.threshold_s,
            quantile=slo.latency.quantile,
            success_ratio=slo.success_ratio,
            rows=slo.workload.rows,
            arrivals=slo.workload.arrivals,
        )

    def at(self, rate_per_s: float) -> "Load":
        return replace(self, rate_per_s=rate_per_s)


@dataclass(frozen=True)
class Batch:
    """A simulated batch: `requests` are indices of arrivals."""

    start_s: float
    finish_s: float
    requests: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """A simulation, instants from its begin: [n] by request, in the order of arrival."""

    arrival_s: FloatArray
    queued_s: FloatArray
    """When the front end handed it to the batching policy."""
    answer_s: FloatArray
    """Infinite where it was refused or expired."""
    batches: tuple[Batch, ...]

    @property
    def latency_s(self) -> FloatArray:
        return self.answer_s - self.arrival_s


@dataclass(frozen=True)
class TooLate:
    """When a simulation needn't go on: more than `max_late` of the requests from `first` on are
    late. What isn't answered then counts as refused."""

    first: int
    max_late: int


def simulate(
    replica: Replica,
    load: Load,
    *,
    n_requests: int,
    seed: int = 0,
    stop: TooLate | None = None,
) -> Trace:
    """Play `n_requests` arrivals through the replica, until the last is answered.

    Equal arguments give equal traces. At another rate the same requests arrive, only faster.
    """
    return _Simulation(replica, load, n_requests, seed, stop or TooLate(0, n_requests)).run()


class _Simulation:
    """One run: an event loop over arrivals, finishing batches and the policy's wake-ups."""

    def __init__(
        self, replica: Replica, load: Load, n_requests: int, seed: int, stop: TooLate
    ) -> None:
        if n_requests < 1 or not 0 < load.rate_per_s < math.inf:
            raise ValueError("want at least one request, and a finite rate above 0")
        rng = np.random.default_rng(seed)
        self._replica = replica
        self._load = load
        self._arrival_s = _arrivals(load, n_requests, rng)
        self._queued_s = _through_front_end(self._arrival_s, replica.front_end.serial_s)
        self._spread = np.maximum(rng.standard_normal(n_requests), 0.0).tolist()
        self._delay_s = _delays(replica.front_end, n_requests, rng)
        in_time_s = self._arrival_s + load.threshold_s - self._delay_s
        self._in_time_s: list[float] = in_time_s.tolist()  # when a batch must have finished
        self._seconds_of = _batch_seconds(replica, load)
        self._queue: BatchQueue[int] = BatchQueue(
            Limits(
                replica.max_batch_size,
                replica.max_queue_size,
                replica.max_queue_delay_s,
                replica.times.instances,
            ),
            _medians(replica),
        )
        self._finish_s = [math.inf] * n_requests
        self._running: list[tuple[float, int, int]] = []  # finish, number of batch, rows
        self._batches: list[Batch] = []
        self._first_counted = stop.first
        self._late_left = stop.max_late + 1

    def run(self) -> Trace:
        queued_s = self._queued_s.tolist()
        n, index, wake_s = len(queued_s), 0, math.inf
        while self._late_left > 0 and (index < n or self._running or self._queue.n_requests):
            next_arrival_s = queued_s[index] if index < n else math.inf
            next_finish_s = self._running[0][0] if self._running else math.inf
            now = min(next_arrival_s, next_finish_s, wake_s)
            assert now < math.inf, "requests are queued, and nothing will happen"
            if now == next_finish_s:
                self._finish(now)
            elif now == next_arrival_s:
                self._offer(index, now)
                index += 1
            wake_s = self._dispatch(now)
        answer_s = np.asarray(self._finish_s) + self._delay_s
        return Trace(self._arrival_s, self._queued_s, answer_s, tuple(self._batches))

    def _offer(self, index: int, now: float) -> None:
        target_s = now + self._load.threshold_s
        admitted, evicted = self._queue.offer(Entry(index, self._load.rows, now, target_s), now)
        if not admitted:
            self._count_late(index)
        for entry in evicted:
            self._count_late(entry.item)

    def _dispatch(self, now: float) -> float:
        """Give idle instances work; returns when to look again."""
        while len(self._running) < self._replica.times.instances and self._queue.n_requests:
            decision = self._queue.decide(now)
            for entry in decision.expired:
                self._count_late(entry.item)
            if decision.batch:
                self._start(decision.batch, now)
            elif not decision.expired:
                return decision.wake_at_s
        return math.inf

    def _start(self, entries: Sequence[Entry[int]], now: float) -> None:
        n_rows = self._load.rows * len(entries)
        number = len(self._batches)
        seconds = self._seconds_of(n_rows, self._spread[number])
        self._batches.append(Batch(now, now + seconds, tuple(entry.item for entry in entries)))
        heapq.heappush(self._running, (now + seconds, number, n_rows))

    def _finish(self, now: float) -> None:
        _, number, n_rows = heapq.heappop(self._running)
        batch = self._batches[number]
        self._queue.times.observe(n_rows, batch.finish_s - batch.start_s)
        for index in batch.requests:
            self._finish_s[index] = now
            if now > self._in_time_s[index]:
                self._count_late(index)

    def _count_late(self, index: int) -> None:
        self._late_left -= index >= self._first_counted


def _arrivals(load: Load, n: int, rng: np.random.Generator) -> FloatArray:
    """[n] ascending seconds, drawn as the load test draws them: given their number, the times of
    a Poisson process are independent and uniform."""
    steps = np.sort(rng.uniform(0.0, n, n)) if load.arrivals == "poisson" else np.arange(n)
    return np.asarray(steps / load.rate_per_s, dtype=np.float64)


def _through_front_end(arrival_s: FloatArray, serial_s: float) -> FloatArray:
    """[n] when each leaves a server that takes `serial_s` a request, first come, first served.

    Lindley's recursion d[i] = max(a[i], d[i-1]) + s, unrolled to a running maximum.
    """
    work_s = serial_s * np.arange(len(arrival_s))
    left_s: FloatArray = np.maximum.accumulate(arrival_s - work_s) + work_s + serial_s
    return left_s


def _delays(front_end: FrontEnd, n: int, rng: np.random.Generator) -> FloatArray:
    """[n] seconds of the way there and back."""
    if front_end.delay_s <= 0:
        return np.zeros(n)
    spread = _spread(front_end.delay_s, front_end.delay_p99_s)
    delays: FloatArray = front_end.delay_s * np.exp(
        spread * np.maximum(rng.standard_normal(n), 0.0)
    )
    return delays


def _batch_seconds(replica: Replica, load: Load) -> Callable[[int, float], float]:
    """(rows, z) -> seconds of a batch; z is a standard normal's positive part."""
    medians = _medians(replica)
    tails = _service_times(replica, [time.p99_s for time in replica.times.times])
    contention = _contention(replica, load.rate_per_s)
    known: dict[int, tuple[float, float]] = {}

    def seconds(n_rows: int, z: float) -> float:
        if n_rows not in known:
            median = medians.of(n_rows)
            known[n_rows] = median * contention, _spread(median, tails.of(n_rows))
        median, spread = known[n_rows]
        return median * math.exp(spread * z)

    return seconds


def _spread(median_s: float, p99_s: float) -> float:
    """The σ with which the 99th percentile of median * exp(σ|z|), half of them, is `p99_s`."""
    return min(math.log(max(1.0, p99_s / median_s)) / _Z99, _MAX_SPREAD)


def _contention(replica: Replica, rate_per_s: float) -> float:
    """How many times longer batches take since the front end works on the same cores."""
    wanted = replica.times.instances * replica.times.threads
    front_end = min(1.0, rate_per_s * replica.front_end.serial_s)
    left = max(replica.cores - front_end, 0.1)
    return max(1.0, wanted / left)


def _medians(replica: Replica) -> ServiceTimes:
    return _service_times(replica, [time.p50_s for time in replica.times.times])


def _service_times(replica: Replica, seconds: Sequence[float]) -> ServiceTimes:
    """The policy's model of service times; they must rise with the size, so noise that says
    otherwise is smoothed away, as the server does."""
    rising = np.maximum.accumulate(seconds).tolist()
    sizes = [time.batch_size for time in replica.times.times]
    return ServiceTimes(sizes, rising, replica.times.padded)
