"""Replicas with made-up service times, and SLOs for them."""

from collections.abc import Callable

from loadtest.slo import Slo
from optimizer.result import InstanceTimes
from optimizer.simulation import FrontEnd, Replica, Spread
from serve.artifact import ServiceTime

NO_FRONT_END = FrontEnd(
    receive_s=0.0,
    answer_s=0.0,
    wakeup_s=0.0,
    batch_s=0.0,
    way=Spread.constant(0.0),
    wake=Spread.constant(0.0),
)
SIZES = (1, 2, 4, 8, 16, 32)


def constant(seconds: float) -> Callable[[int], float]:
    return lambda n: seconds


def affine(fixed: float, per_row: float) -> Callable[[int], float]:
    return lambda n: fixed + per_row * n


def times(
    seconds: Callable[[int], float],
    *,
    instances: int = 1,
    threads: int = 1,
    spread: float = 1.0,
    sizes: tuple[int, ...] = SIZES,
) -> InstanceTimes:
    return InstanceTimes(
        instances,
        threads,
        tuple(ServiceTime(n, seconds(n), seconds(n) * spread, 500) for n in sizes),
    )


def replica(measured: InstanceTimes, max_batch_size: int = 1, delay_s: float = 0.0) -> Replica:
    cores = measured.instances * measured.threads
    return Replica(measured, cores, max_batch_size, delay_s, front_end=NO_FRONT_END)


def slo(threshold_ms: float = 20.0, rate_per_s: float = 200.0, rows: int = 1) -> Slo:
    return Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "test",
            "latency": {"threshold_ms": threshold_ms},
            "workload": {"rate_per_s": rate_per_s, "rows": rows},
        }
    )
