"""The load test's JSON report, as far as the optimizer reads it; the rest of it is for people.

`loadtest.report` writes it. This module checks that it is one, and judges nothing.
"""

import math
from pathlib import Path

import pydantic

from loadtest.slo import Slo
from optimizer.result import Verdict

MAX_REPORT_BYTES = 64_000_000


class Kind(pydantic.BaseModel):
    kind: str = ""


class ReportReason(pydantic.BaseModel):
    message: str
    reason: Kind = Kind()


class Requests(pydantic.BaseModel):
    n: int
    n_ok: int
    achieved_per_s: float
    goodput_per_s: float


class LatencyPoint(pydantic.BaseModel):
    """`latency_s` is None where that many got no good answer."""

    quantile: float = pydantic.Field(ge=0, le=1)
    latency_s: float | None = pydantic.Field(ge=0)


class GoodShare(pydantic.BaseModel):
    """`effective_n` is the number of independent requests that say as much as those sent."""

    confidence: float = pydantic.Field(gt=0, lt=1)
    effective_n: int


class Run(pydantic.BaseModel):
    model: str
    version: str = ""


class LoadTestReport(pydantic.BaseModel):
    """`curve` is the distribution of latencies, by rising quantiles that end with 1."""

    verdict: Verdict
    reasons: tuple[ReportReason, ...]
    requests: Requests
    latency: tuple[LatencyPoint, ...]
    good_share: GoodShare | None = None
    curve: tuple[LatencyPoint, ...] = ()

    def latency_s(self, quantile: float) -> float | None:
        return next((one.latency_s for one in self.latency if one.quantile == quantile), None)

    def latency_bound_s(self, quantile: float) -> float | None:
        """The upper confidence bound of a quantile, by order statistics; infinite where a request
        that was never answered is in its place. None where so few requests can't bound it.

        As the load test does for its verdict, the effective number of requests stands for their
        number, since requests that share a queue share its delays.
        """
        share = self.good_share
        if share is None or not self.curve:
            return None
        n_above = n_above_bound(share.effective_n, quantile, share.confidence)
        if n_above is None:
            return None
        wanted = 1 - n_above / share.effective_n
        points = (one.latency_s for one in self.curve if one.quantile >= wanted * (1 - 1e-9))
        found = next(points, None)
        return math.inf if found is None else found


class FullReport(LoadTestReport):
    """One that names what was tested, too."""

    slo: Slo
    run: Run


def read_bytes(path: Path) -> bytes:
    """Raises OSError. A report that is longer than any is cut, and thereby no JSON any more."""
    with path.open("rb") as file:
        return file.read(MAX_REPORT_BYTES)


def n_above_bound(n: int, quantile: float, confidence: float) -> int | None:
    """How many of n independent values lie above the quantile's upper confidence bound, which is
    the next of them. None where even the largest is no bound.

    The largest k with P(at most k of n lie above the quantile) <= 1 - confidence: the value with k
    above it is below the quantile no more often than that (Hahn and Meeker 1991, *Statistical
    Intervals*, 5.2).
    """
    log_term = n * math.log(quantile)  # of the probability that none lies above it
    at_most = math.exp(log_term)
    if n < 1 or at_most > 1 - confidence:
        return None
    k, log_odds = 0, math.log1p(-quantile) - math.log(quantile)
    while k < n:
        log_term += math.log((n - k) / (k + 1)) + log_odds
        at_most += math.exp(log_term)
        if at_most > 1 - confidence:
            return k
        k += 1
    return None
