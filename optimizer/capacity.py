"""Capacity: what rate a replica sustains within an SLO, how to serve, and what that costs.

Everything rests on `optimizer.simulation`; nothing here knows how a request gets its answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from loadtest.slo import Slo
from optimizer.result import InstanceTimes, Prediction, ServingChoice
from optimizer.simulation import FloatArray, FrontEnd, Load, Replica, TooLate, simulate

N_REQUESTS = 5_000
"""Of a simulation that only decides whether a rate is sustained."""
N_COMPARED_REQUESTS = 2_500
"""Of one whose latency is compared with another's under the same arrivals."""
N_ROUGH_REQUESTS = 1_500
"""Of one that only tells where to look."""
N_PREDICTED_REQUESTS = 10_000
WARMUP_SHARE = 0.1
"""Of a simulation's requests, the first, which meet an empty queue: they aren't counted."""
ROUGH = 1.25
"""Between rates that are further apart than that, it is enough to tell roughly."""
RATE_TOLERANCE = 0.01
"""Relative: to how close the highest rate is found, and below which two are equal."""
LATENCY_TOLERANCE = 0.05
"""Relative: below it, a lower latency is no reason for a more complex configuration."""
QUEUE_DELAY_SHARES = (0.05, 0.2)
"""Queue delays that are tried, as shares of the SLO's threshold."""


def predict(
    replica: Replica, load: Load, *, n_requests: int = N_PREDICTED_REQUESTS, seed: int = 0
) -> Prediction:
    """What clients see of the replica under the load."""
    trace = simulate(replica, load, n_requests=n_requests, seed=seed)
    counted = trace.latency_s[int(n_requests * WARMUP_SHARE) :]
    good = int(np.count_nonzero(counted <= load.threshold_s))
    busy_s = sum(batch.finish_s - batch.start_s for batch in trace.batches)
    end_s = max([trace.arrival_s[-1], *(batch.finish_s for batch in trace.batches)])
    n_rows = load.rows * sum(len(batch.requests) for batch in trace.batches)
    return Prediction(
        rate_per_s=load.rate_per_s,
        p50_s=_quantile(counted, 0.5),
        p95_s=_quantile(counted, 0.95),
        p99_s=_quantile(counted, 0.99),
        slo_latency_s=_quantile(counted, load.quantile),
        goodput_per_s=load.rate_per_s * good / len(counted),
        success_ratio=float(np.count_nonzero(np.isfinite(counted)) / len(counted)),
        utilization=float(busy_s / (replica.times.instances * end_s)),
        mean_batch_rows=n_rows / max(1, len(trace.batches)),
        n_requests=len(counted),
    )


def sustains(replica: Replica, load: Load, *, n_requests: int = N_REQUESTS, seed: int = 0) -> bool:
    """Whether the replica keeps the load's latency and success ratio, estimates both.

    Decided as in `predict`, but ends as soon as too many requests are late.
    """
    first = int(n_requests * WARMUP_SHARE)
    n_counted = n_requests - first
    too_late = TooLate(first, max_late=n_counted - _rank(n_counted, load.quantile))
    trace = simulate(replica, load, n_requests=n_requests, seed=seed, stop=too_late)
    counted = trace.latency_s[first:]
    successes = int(np.count_nonzero(np.isfinite(counted))) / n_counted
    latency_s = _quantile(counted, load.quantile)
    return latency_s <= load.threshold_s and successes >= load.success_ratio


def max_rate_per_s(
    replica: Replica, load: Load, *, above_per_s: float = 0.0, seed: int = 0
) -> float:
    """The highest rate that the replica sustains, by bisection to `RATE_TOLERANCE`.

    0 where it sustains not even `above_per_s`, or light load.
    """
    high = replica.highest_throughput(load.rows)
    low_load = replica.light_load(load)
    low = max(above_per_s, low_load)

    def keeps(rate_per_s: float, n_requests: int = N_REQUESTS) -> bool:
        return sustains(replica, load.at(rate_per_s), n_requests=n_requests, seed=seed)

    n_light = N_REQUESTS if above_per_s > low_load else N_ROUGH_REQUESTS
    if low >= high or not keeps(low, n_light):
        return 0.0
    low, high = _bracket(low, high, keeps)
    while high > (1 + RATE_TOLERANCE) * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def _bracket(low: float, high: float, keeps: Callable[[float, int], bool]) -> tuple[float, float]:
    """(a rate that is sustained, one that isn't or `high`), not much more than `ROUGH` apart:
    found by short simulations and confirmed by whole ones. `low` is known to be sustained."""
    lowest, highest = low, high
    while high > ROUGH * low:
        middle = math.sqrt(low * high)
        roughly = keeps(middle, N_ROUGH_REQUESTS)
        low, high = (middle, high) if roughly else (low, middle)
    while low > lowest and not keeps(low, N_REQUESTS):
        low, high = max(lowest, low / ROUGH), low
    while high < highest and keeps(high, N_REQUESTS):
        low, high = high, min(highest, high * ROUGH)
    return low, high


def n_replicas(rate_per_s: float, max_rate_per_s: float) -> int:
    """Replicas that share `rate_per_s` evenly; 1 where none sustains anything."""
    return math.ceil(rate_per_s / max_rate_per_s * (1 - 1e-9)) if max_rate_per_s > 0 else 1


def cost_per_million(
    price_per_core_hour: float, cores: int, max_rate_per_s: float, rows: int = 1
) -> float:
    """Price of a million inferences (rows) by a replica at the highest rate within the SLO.

    Counted at that rate and not at the SLO's: there, every variant that needs one replica would
    cost the same. Infinite where no rate is within the SLO.
    """
    if max_rate_per_s <= 0:
        return math.inf
    return price_per_core_hour * cores / 3600 / (max_rate_per_s * rows) * 1e6


def choose_serving(
    options: Sequence[InstanceTimes],
    slo: Slo,
    cores: int,
    price_per_core_hour: float,
    *,
    front_end: FrontEnd | None = None,
    objective: Literal["cost", "latency", "size"] = "cost",
    seed: int = 0,
) -> ServingChoice:
    """The configuration that sustains the highest rate within the SLO, on a replica of `cores`.

    For the objective latency: the one with the lowest latency at the SLO's rate among those that
    sustain it. Rates within `RATE_TOLERANCE` count as equal; then the lower latency decides, and
    within `LATENCY_TOLERANCE` of it the simpler configuration: no delay, fewer instances and
    threads, larger batches (the policy forms none without need, so they are room for bursts and
    for clients that send several rows). Where none keeps the SLO at any rate, it is the one that
    comes closest at light load. Raises ValueError if no option fits the cores.
    """
    search = _Search(Load.of(slo), cores, front_end or FrontEnd(), seed)
    rate, best = search.run(options, objective)
    replicas = n_replicas(slo.workload.rate_per_s, rate)
    return ServingChoice(
        instances=best.times.instances,
        threads=best.times.threads,
        max_batch_size=best.max_batch_size,
        max_queue_delay_s=best.max_queue_delay_s,
        replicas=replicas,
        max_rate_per_s=rate,
        cost_per_million=cost_per_million(price_per_core_hour, cores, rate, slo.workload.rows),
        prediction=predict(best, search.load.at(search.load.rate_per_s / replicas), seed=seed),
    )


@dataclass(frozen=True)
class _Search:
    """Over configurations: batch sizes first, without a delay, then delays for the best."""

    load: Load
    cores: int
    front_end: FrontEnd
    seed: int

    def run(
        self, options: Sequence[InstanceTimes], objective: Literal["cost", "latency", "size"]
    ) -> tuple[float, Replica]:
        """(highest rate within the SLO, replica)."""
        candidates = self._without_delay(options)
        if objective == "latency" and (kept := [c for c in candidates if self._keeps(c)]):
            best = self._lowest_latency(kept, self.load.rate_per_s)
            return max(self.load.rate_per_s, self._highest_rate(best)), best
        rates = self._highest_rates(candidates)
        if not rates:
            return 0.0, min(candidates, key=self._light_load_latency)
        _, leader = max(rates, key=lambda rated: rated[0])
        delayed = [
            replace(leader, max_queue_delay_s=share * self.load.threshold_s)
            for share in QUEUE_DELAY_SHARES
            if leader.max_batch_size > self.load.rows
        ]
        rates += self._highest_rates(delayed, best=max(rate for rate, _ in rates))
        return self._best_of(rates)

    def _without_delay(self, options: Sequence[InstanceTimes]) -> list[Replica]:
        """The simpler first. A size with which the engine gets no more done than with the one
        before is left out."""
        candidates = []
        for option in sorted(options, key=lambda option: (option.instances, option.threads)):
            throughput = 0.0
            for size in _batch_sizes(option, self.load.rows):
                replica = Replica(option, self.cores, size, front_end=self.front_end)
                more = replica.engine_throughput(self.load.rows)
                if option.instances * option.threads <= self.cores and more > throughput * (
                    1 + RATE_TOLERANCE
                ):
                    candidates.append(replica)
                    throughput = more
        if not candidates:
            raise ValueError(f"want an option with instances x threads of at most {self.cores}")
        return candidates

    def _highest_rates(
        self, candidates: Sequence[Replica], best: float = 0.0
    ) -> list[tuple[float, Replica]]:
        """(rate, replica) of those that come near `best`, which rises on the way.

        Only they are bisected. Those of the highest throughput come first, so that most others
        fail their first simulation.
        """
        rates = []
        for replica in sorted(candidates, key=lambda c: -c.highest_throughput(self.load.rows)):
            rate = self._highest_rate(replica, above_per_s=best / (1 + RATE_TOLERANCE))
            if rate > 0:
                rates.append((rate, replica))
                best = max(best, rate)
        return rates

    def _best_of(self, rates: Sequence[tuple[float, Replica]]) -> tuple[float, Replica]:
        highest = max(rate for rate, _ in rates)
        equal = [replica for rate, replica in rates if rate * (1 + RATE_TOLERANCE) >= highest]
        shared = self.load.rate_per_s / n_replicas(self.load.rate_per_s, highest)
        best = self._lowest_latency(equal, shared)
        return next(rate for rate, replica in rates if replica is best), best

    def _lowest_latency(self, candidates: Sequence[Replica], rate_per_s: float) -> Replica:
        if len(candidates) == 1:
            return candidates[0]
        latencies = [self._latency(candidate, rate_per_s) for candidate in candidates]
        limit = min(latencies) * (1 + LATENCY_TOLERANCE)
        near = [c for c, latency in zip(candidates, latencies, strict=True) if latency <= limit]
        return min(near, key=_complexity)

    def _light_load_latency(self, replica: Replica) -> float:
        """Nobody waits for another there, so few requests tell."""
        return self._latency(replica, replica.light_load(self.load), N_ROUGH_REQUESTS)

    def _latency(
        self, replica: Replica, rate_per_s: float, n_requests: int = N_COMPARED_REQUESTS
    ) -> float:
        load = self.load.at(rate_per_s)
        return predict(replica, load, n_requests=n_requests, seed=self.seed).slo_latency_s

    def _keeps(self, replica: Replica) -> bool:
        return sustains(replica, self.load, seed=self.seed)

    def _highest_rate(self, replica: Replica, above_per_s: float = 0.0) -> float:
        return max_rate_per_s(replica, self.load, above_per_s=above_per_s, seed=self.seed)


def _batch_sizes(option: InstanceTimes, rows: int) -> list[int]:
    """What one request needs, the largest size measured, and powers of eight between: the policy
    sizes each batch itself, so a finer limit makes little difference and costs simulations."""
    largest = max(rows, option.times[-1].batch_size)
    powers = [8**power for power in range(1, largest.bit_length()) if rows < 8**power < largest]
    return sorted({rows, *powers, largest})


def _complexity(replica: Replica) -> tuple[float, int, int, int]:
    times = replica.times
    return replica.max_queue_delay_s, times.instances, times.threads, -replica.max_batch_size


def _rank(n: int, quantile: float) -> int:
    """Of the smallest of n ordered values that `quantile` of them don't exceed, from 1."""
    return max(1, math.ceil(n * quantile * (1 - 1e-12)))


def _quantile(values: FloatArray, quantile: float) -> float:
    """A value that occurs, so that infinite ones are no trouble."""
    rank = _rank(len(values), quantile)
    return float(np.partition(values, rank - 1)[rank - 1])
