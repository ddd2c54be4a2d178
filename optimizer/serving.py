"""Serving: how variants of a study would be served, by simulation of measured times.

One place for what every such question shares: the SLO with the margin that predictions keep
free, the replica's cores, the price, and the model of the front end. It measures nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.slo import Slo
from optimizer.capacity import choose_serving, cost_per_million
from optimizer.choice import with_margin
from optimizer.result import InstanceTimes, ServingChoice
from optimizer.simulation import FrontEnd, Replica
from optimizer.spec import Spec


@dataclass(frozen=True)
class Serving:
    spec: Spec
    cores: int
    front_end: FrontEnd

    def choose(self, times: Sequence[InstanceTimes], slo: Slo | None = None) -> ServingChoice:
        """The configuration that serves best, under another SLO where one is given."""
        return choose_serving(
            times,
            with_margin(slo or self.spec.slo),
            self.cores,
            self.spec.target.price_per_core_hour,
            front_end=self.front_end,
            objective="latency" if self.spec.objective == "latency" else "cost",
            seed=self.spec.seed,
        )

    def least_value(self, times: Sequence[InstanceTimes]) -> float:
        """What the objective can't be below, without any simulation."""
        rows = self.spec.slo.workload.rows
        if self.spec.objective == "latency":
            return min(one.times[0].p50_s for one in times)
        if self.spec.objective != "cost":
            return 0.0
        rate = max(
            Replica(
                one, self.cores, one.times[-1].batch_size, front_end=self.front_end
            ).highest_throughput(rows)
            for one in times
        )
        return cost_per_million(self.spec.target.price_per_core_hour, self.cores, rate, rows)
