"""Scaling: what an autoscaler watches, and at which value it adds a replica.

Not CPU, which is busy long before the promise breaks or idle while a queue grows, and not latency,
which is flat until it is vertical. The metric is the number of requests in flight, averaged over
time: by Little's law the sum of their durations per second, so that short ones count as well. The
target follows from the capacity that was measured.
"""

from dataclasses import dataclass

from loadtest.burn import shown
from loadtest.rules import REQUESTS

WINDOW_S = 60.0
UTILIZATION = 0.8
"""Of the capacity, at which a replica counts as full: what is left serves while others start."""


@dataclass(frozen=True)
class ScalingTarget:
    """`query` gives the requests in flight of all replicas together; one more is wanted for every
    `in_flight_per_replica`."""

    query: str
    in_flight_per_replica: float
    capacity_per_s: float
    utilization: float

    def document(self) -> dict[str, object]:
        return {
            "query": self.query,
            "in_flight_per_replica": self.in_flight_per_replica,
            "capacity_per_s": self.capacity_per_s,
            "utilization": self.utilization,
        }


def scaling_query(model: str) -> str:
    """PromQL of the requests in flight of the model, one value."""
    return f'sum(rate({REQUESTS}_sum{{model="{model}"}}[{shown(WINDOW_S)}]))'


def scaling_target(
    model: str, capacity_per_s: float, mean_latency_s: float, utilization: float = UTILIZATION
) -> ScalingTarget:
    """For replicas that keep the SLO up to `capacity_per_s` requests a second each, at a mean
    latency of `mean_latency_s` there. Raises ValueError for what isn't above 0, or a utilization
    above 1."""
    for name, value in (("capacity_per_s", capacity_per_s), ("mean_latency_s", mean_latency_s)):
        if not value > 0:
            raise ValueError(f"{name}: got {value:g}, want above 0")
    check_utilization(utilization)
    in_flight = capacity_per_s * utilization * mean_latency_s
    return ScalingTarget(
        scaling_query(model), float(f"{in_flight:.4g}"), capacity_per_s, utilization
    )


def check_utilization(utilization: float) -> None:
    """Raises ValueError."""
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization: got {utilization:g}, want above 0 and at most 1")
