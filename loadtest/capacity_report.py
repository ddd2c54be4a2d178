"""The record of a search for the highest rate: a versioned JSON document.

Times in seconds. A latency of null stands for a quantile without a good answer.
"""

from datetime import datetime
from typing import Literal

import numpy as np
from pydantic import Field

from loadtest.capacity import Ending
from loadtest.capacity_run import CapacityResult, Measured
from loadtest.document import Strict
from loadtest.report import EXIT_CODES
from loadtest.slo import Slo
from loadtest.verdict import Outcome


class RatePoint(Strict):
    rate_per_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    mean_s: float | None = None
    """of the answers that are no failures"""
    in_flight: float | None = None
    """requests in the servers on average, by their own count; none where they don't say"""
    goodput_per_s: float
    good_share: float
    success_ratio: float
    batch_rows: float | None
    """rows of a batch, on average; none where the server doesn't say"""
    verdict: Outcome
    reasons: tuple[str, ...]
    usable: bool


class CapacityReport(Strict):
    """`verdict` compares the capacity with the SLO's rate: met if it is at least that."""

    api_version: Literal["trimserve/v1"] = Field(alias="apiVersion")
    kind: Literal["CapacityReport"]
    created_at: str
    verdict: Outcome
    exit_code: int
    message: str
    slo: Slo
    model: str
    targets: tuple[str, ...]
    window_s: float
    ending: Ending
    capacity_per_s: float | None
    request_bytes: float | None = None
    """of a request's body, on average, without headers"""
    points: tuple[RatePoint, ...]
    """in the order of measuring"""
    confirmation: RatePoint | None
    """at 0.95 of the capacity"""
    operation: RatePoint | None = None
    """at 0.8 of it, where an autoscaler keeps the replicas"""


def make_capacity_report(result: CapacityResult, created_at: datetime) -> CapacityReport:
    verdict, message = judge_capacity(result)
    settings, last = result.settings, result.measured[-1]
    return CapacityReport(
        apiVersion="trimserve/v1",
        kind="CapacityReport",
        created_at=created_at.isoformat(timespec="seconds"),
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        message=message,
        slo=settings.slo,
        model=settings.model,
        targets=tuple(target.url for target in settings.targets),
        window_s=settings.window_s,
        ending=result.capacity.ending,
        capacity_per_s=result.capacity.rate_per_s,
        request_bytes=last.request_bytes,
        points=tuple(_point(one) for one in result.measured),
        confirmation=None if result.confirmation is None else _point(result.confirmation),
        operation=None if result.operation is None else _point(result.operation),
    )


def judge_capacity(result: CapacityResult) -> tuple[Outcome, str]:
    """Whether the server carries the SLO's rate, and what the search says in a sentence."""
    wanted = result.settings.slo.workload.rate_per_s
    last = result.measured[-1]
    found = result.capacity.rate_per_s
    if result.capacity.ending == "unusable":
        return "inconclusive", (
            f"at {last.rate_per_s:.4g} requests/s the measurement itself is in doubt: "
            + "; ".join(last.reasons)
        )
    if found is None:
        side = "at least" if last.good_share >= result.settings.slo.latency.quantile else "below"
        return "inconclusive", (
            f"no crossing: the highest rate is {side} {last.rate_per_s:.4g} requests/s, as far "
            "as was looked"
        )
    confirmed = result.confirmation
    assert confirmed is not None
    said = (
        f"the highest rate that meets the SLO is about {found:.4g} requests/s, {wanted:.4g} are "
        f"wanted; an independent run at {confirmed.rate_per_s:.4g}/s is {confirmed.outcome}"
    )
    if confirmed.outcome == "violated":
        return "inconclusive", f"{said}, so the rate found is too high: want a longer --duration-s"
    return ("met" if found >= wanted else "violated"), said


def _point(one: Measured) -> RatePoint:
    p50_s, p95_s, p99_s = (
        value if np.isfinite(value) else None for value in (one.p50_s, one.p95_s, one.p99_s)
    )
    return RatePoint(
        rate_per_s=one.rate_per_s,
        p50_s=p50_s,
        p95_s=p95_s,
        p99_s=p99_s,
        mean_s=one.mean_s,
        in_flight=one.in_flight,
        goodput_per_s=one.goodput_per_s,
        good_share=one.good_share,
        success_ratio=one.success_ratio,
        batch_rows=one.batch_rows,
        verdict=one.outcome,
        reasons=one.reasons,
        usable=one.usable,
    )
