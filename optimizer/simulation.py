"""Simulation: arrivals played through a replica, with simulated time.

It calls `serve.batch_policy`, the very code that the server runs. It knows measured service
times and overheads, not how they were measured, and no engine. The model, from a request's
intended send to its answer:

1. The front end, one thread, reads it (`receive_s`) and hands it to the batching policy. It does
   one thing at a time, first come, first served, and `wakeup_s` longer after a sleep.
2. The policy queues it, and batches it with others when an instance is idle.
3. A batch takes `batch_s` and the engine's time, drawn from what was measured for its size.
4. The front end writes the answers of a batch, `answer_s` each.
5. Cores are shared. While the front end works where none is free, instances wait: it has slept,
   so the kernel gives it the core. But it has to be given one: where it has to wake up while
   the engines' threads have all cores, it waits until one of them sleeps, or for `wake`, until the
   kernel interrupts one (a timer's tick, milliseconds). An instance that finds requests waiting
   goes on at once, and answers of the batch before stay unsent for so long.
6. The way there and back (client, network, wake-ups), for which nobody waits in line, takes
   `way`.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loadtest.slo import Slo
from optimizer.result import LEVELS, InstanceTimes
from serve.batch_policy import BatchQueue, Entry, Limits, ServiceTimes

FloatArray = NDArray[np.float64]

MAX_QUEUE_SIZE = 1024
_MEDIAN = LEVELS.index(0.5)
_Z99 = NormalDist().inv_cdf(0.99)
_MAX_Z = NormalDist().inv_cdf(0.9999)
_MAX_SPREAD = 3.0
"""The largest σ: a 99th percentile a thousand times the median, a broken measurement."""


@dataclass(frozen=True)
class Spread:
    """A distribution of seconds, by its quantiles at `LEVELS`, rising and at least 0; between
    them it is linear."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(low <= high for low, high in zip(self.seconds, self.seconds[1:], strict=False))
        if len(self.seconds) != len(LEVELS) or not rising or not 0 <= self.seconds[0] < math.inf:
            raise ValueError(f"seconds: got {self.seconds}, want {len(LEVELS)} rising ones from 0")

    @classmethod
    def of(cls, samples: Sequence[float] | FloatArray) -> "Spread":
        """That of measured seconds, at least one."""
        return cls(tuple(np.quantile(np.asarray(samples, np.float64), LEVELS).tolist()))

    @classmethod
    def constant(cls, seconds: float) -> "Spread":
        return cls((seconds,) * len(LEVELS))

    @property
    def median_s(self) -> float:
        return self.seconds[_MEDIAN]

    def draw(self, n: int, rng: np.random.Generator) -> FloatArray:
        """[n] seconds."""
        drawn: FloatArray = np.interp(rng.random(n), LEVELS, self.seconds)
        return drawn

    def stretched(self, factor: float) -> "Spread":
        """What is above the median taken `factor` times as far from it."""
        more = factor - 1
        above = [one + more * (one - self.median_s) for one in self.seconds[_MEDIAN:]]
        return Spread((*self.seconds[:_MEDIAN], *above))


@dataclass(frozen=True)
class FrontEnd:
    """What serving costs beside the engine; the module's docstring says how each part acts.

    `receive_s` and `answer_s` are the front end's work on one request, `wakeup_s` what it costs to
    begin after a sleep, `batch_s` an instance's work on one batch, and `stretch` how many times
    longer an engine takes in the server than timed alone. The defaults were measured by
    `optimizer.overheads` on the machine of docs/experiments.md, for REST and gRPC in equal parts;
    another machine has other ones.
    """

    receive_s: float = 375e-6
    answer_s: float = 375e-6
    wakeup_s: float = 460e-6
    batch_s: float = 180e-6
    way: Spread = Spread(
        (0.0, 0.0, 40e-6, 430e-6, 810e-6, 1_260e-6, 1_600e-6, 1_840e-6, 2_110e-6, 2_330e-6,
         2_530e-6, 2_910e-6, 2_970e-6)
    )  # fmt: skip
    wake: Spread = Spread(
        (60e-6, 60e-6, 65e-6, 75e-6, 95e-6, 110e-6, 130e-6, 150e-6, 3_390e-6, 3_870e-6,
         3_910e-6, 4_990e-6, 5_550e-6)
    )  # fmt: skip
    stretch: float = 1.0

    @property
    def serial_s(self) -> float:
        """Of each request, one request at a time, while it never sleeps."""
        return self.receive_s + self.answer_s


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
        """Requests of `rows` a second that no policy could exceed, by the instances, by the front
        end, and by the cores that both share."""
        rate, serial_s = self.engine_throughput(rows), self.front_end.serial_s
        core_s = self.times.instances * self.times.threads / rate + serial_s
        shared = self.cores / core_s
        return min(rate, shared, 1 / serial_s) if serial_s > 0 else min(rate, shared)

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
    """One run: an event loop over arrivals, the front end, finishing batches and the policy's
    wake-ups."""

    def __init__(
        self, replica: Replica, load: Load, n_requests: int, seed: int, stop: TooLate
    ) -> None:
        if n_requests < 1 or not 0 < load.rate_per_s < math.inf:
            raise ValueError("want at least one request, and a finite rate above 0")
        rng = np.random.default_rng(seed)
        self._load = load
        self._instances = replica.times.instances
        self._arrival_s = _arrivals(load, n_requests, rng)
        self._seconds_of = _batch_seconds(replica)
        self._luck = rng.random(n_requests).tolist()
        self._way_s = replica.front_end.way.draw(n_requests, rng)
        late_s = self._arrival_s + load.threshold_s - self._way_s
        self._in_time_s: list[float] = late_s.tolist()  # when the front end must have answered
        self._queue: BatchQueue[int] = BatchQueue(
            Limits(
                replica.max_batch_size,
                replica.max_queue_size,
                replica.max_queue_delay_s,
                self._instances,
            ),
            _medians(replica),
        )
        self._cores = _Cores(replica)
        self._front_end = _FrontEndThread(
            replica.front_end, self._cores, replica.front_end.wake.draw(n_requests, rng).tolist()
        )
        self._queued_s = [math.inf] * n_requests
        self._answer_s = [math.inf] * n_requests
        self._batches: list[_Running] = []
        self._first_counted = stop.first
        self._late_left = stop.max_late + 1

    def run(self) -> Trace:
        arrival_s = self._arrival_s.tolist()
        n, index, wake_s = len(arrival_s), 0, math.inf
        front_end, cores = self._front_end, self._cores
        while self._late_left > 0:
            next_arrival_s = arrival_s[index] if index < n else math.inf
            next_finish_s = cores.next_finish_s
            now = min(next_arrival_s, next_finish_s, front_end.next_s, wake_s)
            if now == math.inf:
                assert not self._queue.n_requests, "requests are queued, and nothing will happen"
                break
            if now == next_finish_s:
                self._finish(now)
            elif now == front_end.next_s:
                self._step_front_end(now)
            elif now == next_arrival_s:
                front_end.jobs.append(index)
                index += 1
            wake_s = self._dispatch(now) if self._queue.n_requests else math.inf
            if front_end.jobs and not front_end.works:
                front_end.look(now)
        batches = tuple(Batch(one.start_s, one.finish_s, one.requests) for one in self._batches)
        answer_s = np.asarray(self._answer_s) + self._way_s
        return Trace(self._arrival_s, np.asarray(self._queued_s), answer_s, batches)

    def _step_front_end(self, now: float) -> None:
        done = self._front_end.step(now)
        if isinstance(done, int):
            self._offer(done, now)
        elif done is not None:
            self._answer(done, now)

    def _answer(self, batch: "_Running", now: float) -> None:
        """The front end is through with a batch's answers, of which the last went out now."""
        each_s = self._front_end.answer_s
        for n_after, index in enumerate(reversed(batch.requests)):
            self._answer_s[index] = answered_s = now - n_after * each_s
            if answered_s > self._in_time_s[index]:
                self._count_late(index)

    def _offer(self, index: int, now: float) -> None:
        self._queued_s[index] = now
        target_s = now + self._load.threshold_s
        admitted, evicted = self._queue.offer(Entry(index, self._load.rows, now, target_s), now)
        if not admitted:
            self._count_late(index)
        for entry in evicted:
            self._count_late(entry.item)

    def _dispatch(self, now: float) -> float:
        """Give idle instances work; returns when to look again."""
        while (
            self._queue.n_requests
            and self._cores.n_busy < self._instances
            and self._cores.has_one_for_an_instance()
        ):
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
        seconds = self._seconds_of(n_rows, self._luck[len(self._batches)])
        batch = _Running(len(self._batches), n_rows, now, tuple(entry.item for entry in entries))
        self._batches.append(batch)
        self._cores.start(batch, seconds, now)

    def _finish(self, now: float) -> None:
        batch = self._cores.finish(now)
        self._queue.times.observe(batch.n_rows, now - batch.start_s)
        self._front_end.jobs.append(batch)

    def _count_late(self, index: int) -> None:
        self._late_left -= index >= self._first_counted


@dataclass(slots=True, eq=False)
class _Running:
    """A batch in an instance."""

    number: int
    n_rows: int
    start_s: float
    requests: tuple[int, ...]
    finish_s: float = math.inf


class _Cores:
    """The replica's cores, and the batches that run on what the front end leaves of them.

    Busy instances share what they get evenly. So all of them have the same `done_s`, the seconds
    of work that an instance would have done that was busy from the begin; a batch finishes when
    it reaches a value that is known when it starts.
    """

    def __init__(self, replica: Replica) -> None:
        self._n = replica.cores
        self._threads = replica.times.threads
        self._running: list[tuple[float, int, _Running]] = []
        self._done_s = 0.0
        self._since_s = 0.0
        self._rate = 1.0
        self._front_end_works = False
        self.next_finish_s = math.inf
        """When the next batch finishes if nothing changes."""

    @property
    def n_busy(self) -> int:
        return len(self._running)

    def are_taken(self) -> bool:
        """Whether the instances' threads have them all."""
        return len(self._running) * self._threads >= self._n

    def has_one_for_an_instance(self) -> bool:
        return not self._front_end_works or len(self._running) * self._threads + 1 < self._n

    def start(self, batch: _Running, seconds: float, now: float) -> None:
        self._advance(now)
        heapq.heappush(self._running, (self._done_s + seconds, batch.number, batch))
        self._set_rate()

    def finish(self, now: float) -> _Running:
        self._advance(now)
        batch = heapq.heappop(self._running)[2]
        batch.finish_s = now
        self._set_rate()
        return batch

    def front_end_works(self, works: bool, now: float) -> None:
        self._advance(now)
        self._front_end_works = works
        self._set_rate()

    def _advance(self, now: float) -> None:
        self._done_s += self._rate * (now - self._since_s)
        self._since_s = now

    def _set_rate(self) -> None:
        left = self._n - self._front_end_works
        runnable = left // self._threads
        n_busy = len(self._running)
        self._rate = min(1.0, runnable / n_busy) if n_busy else 1.0
        self.next_finish_s = math.inf
        if n_busy and self._rate > 0:
            left_s = max(0.0, self._running[0][0] - self._done_s)
            self.next_finish_s = self._since_s + left_s / self._rate


class _FrontEndThread:
    """The front end's thread: asleep, waiting for a core, or at work. `jobs` are requests to read
    (their index) and batches to answer."""

    def __init__(self, costs: FrontEnd, cores: _Cores, wake_s: list[float]) -> None:
        self.jobs: deque[int | _Running] = deque()
        self.next_s = math.inf
        """When it gets a core or is through with a job; infinite while it sleeps."""
        self.answer_s = costs.answer_s
        self._receive_s = costs.receive_s
        self._wakeup_s = costs.wakeup_s
        self._cores = cores
        self._wake_s = wake_s
        self._n_waits = 0
        self.works = False

    def look(self, now: float) -> None:
        """Asleep with something to do: wake up, at once if a core is free."""
        if not self._cores.are_taken():
            self._begin(now)
        elif self.next_s == math.inf:
            self.next_s = now + self._wake_s[self._n_waits % len(self._wake_s)]
            self._n_waits += 1

    def step(self, now: float) -> int | _Running | None:
        """Get a core, or end a job, which is returned, and begin the next."""
        if not self.works:
            self._begin(now)
            return None
        done = self.jobs.popleft()
        if self.jobs:
            self._begin(now)
        else:
            self.works = False
            self.next_s = math.inf
            self._cores.front_end_works(False, now)
        return done

    def _begin(self, now: float) -> None:
        seconds = 0.0
        if not self.works:
            self.works = True
            self._cores.front_end_works(True, now)
            seconds = self._wakeup_s
        job = self.jobs[0]
        seconds += self._receive_s if isinstance(job, int) else self.answer_s * len(job.requests)
        self.next_s = now + seconds


def _arrivals(load: Load, n: int, rng: np.random.Generator) -> FloatArray:
    """[n] ascending seconds, drawn as the load test draws them: given their number, the times of
    a Poisson process are independent and uniform."""
    steps = np.sort(rng.uniform(0.0, n, n)) if load.arrivals == "poisson" else np.arange(n)
    return np.asarray(steps / load.rate_per_s, dtype=np.float64)


def _batch_seconds(replica: Replica) -> Callable[[int, float], float]:
    """(rows, share) -> seconds of a batch at that quantile of its size."""
    spreads = [_spread_of(replica.times, index) for index in range(len(replica.times.times))]
    by_level = [_service_times(replica, seconds) for seconds in zip(*spreads, strict=True)]
    costs = replica.front_end

    @cache
    def at_levels(n_rows: int) -> list[float]:
        return [costs.batch_s + costs.stretch * times.of(n_rows) for times in by_level]

    def seconds(n_rows: int, share: float) -> float:
        known = at_levels(n_rows)
        index = _level_below(share)
        low, high = LEVELS[index], LEVELS[index + 1]
        return known[index] + (known[index + 1] - known[index]) * (share - low) / (high - low)

    return seconds


_STEPS = tuple(
    max(index for index, level in enumerate(LEVELS[:-1]) if level <= step / 1000)
    for step in range(1000)
)


def _level_below(share: float) -> int:
    """Index of the last of `LEVELS` but one that is at most `share`, which is below 1."""
    return _STEPS[int(share * 1000)]


def _spread_of(times: InstanceTimes, index: int) -> Sequence[float]:
    """Seconds at `LEVELS` of the size of that index: as measured, else by median and p99."""
    if times.quantiles:
        return times.quantiles[index]
    return _half_log_normal(times.times[index].p50_s, times.times[index].p99_s)


def _half_log_normal(median_s: float, p99_s: float) -> list[float]:
    """Where only two quantiles are known: half of it just the median, the others exp(σ|z|) times
    it, z standard normal, σ such that the 99th percentile fits."""
    sigma = min(math.log(max(1.0, p99_s / median_s)) / _Z99, _MAX_SPREAD)
    return [median_s * math.exp(sigma * z) for z in _normal_scores()]


@cache
def _normal_scores() -> tuple[float, ...]:
    normal = NormalDist()
    scores = (normal.inv_cdf(level) if 0.5 < level < 1 else _MAX_Z * level for level in LEVELS)
    return tuple(0.0 if level <= 0.5 else z for level, z in zip(LEVELS, scores, strict=True))


def _medians(replica: Replica) -> ServiceTimes:
    """What the policy expects of a batch: the server measures what it takes there."""
    costs = replica.front_end
    medians = [costs.batch_s + costs.stretch * time.p50_s for time in replica.times.times]
    return _service_times(replica, medians)


def _service_times(replica: Replica, seconds: Sequence[float]) -> ServiceTimes:
    """The policy's model of service times; they must rise with the size, so noise that says
    otherwise is smoothed away, as the server does."""
    rising = np.maximum.accumulate(seconds).tolist()
    sizes = [time.batch_size for time in replica.times.times]
    return ServiceTimes(sizes, rising, replica.times.padded)
