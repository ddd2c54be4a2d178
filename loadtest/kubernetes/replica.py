"""Replica: what one copy of the server carries, as `trimserve loadtest --find-capacity` found.

Knows no cluster.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from loadtest.capacity_report import CapacityReport, RatePoint
from loadtest.document import DocumentInvalid
from loadtest.slo import Slo
from loadtest.verdict import Outcome

MAX_REPORT_BYTES = 64_000_000
_WANTED = "want a file that `trimserve loadtest --find-capacity --json` wrote"
_NEAR = 1.001
"""A point this little above the rate that is asked for counts as at it."""


@dataclass(frozen=True)
class Replica:
    """Rates of one replica; `source` is the file that says so."""

    source: str
    capacity_per_s: float
    """the highest rate that keeps the SLO"""
    confirmation: Outcome | None
    """of the run a little below it"""
    points: tuple[RatePoint, ...]
    n_measured: int
    """replicas behind the targets, whose points are of all of them together"""
    request_bytes: float | None = None
    """of a body, without headers"""


@dataclass(frozen=True)
class Load:
    """Requests in flight in a replica at a rate, and the measurement that it was taken from."""

    in_flight: float
    measured_at_per_s: float
    seen_by: Literal["server", "client"]
    """client: with the network's time, so too long, where the server's own count is missing"""


def read_replica(path: Path, slo: Slo, n_replicas: int | None = None) -> Replica:
    """Raises DocumentInvalid for a file that is no capacity, or not of this SLO.

    `n_replicas` is how many were behind the targets; by default one behind each.
    """
    report = _read(path)
    for name in ("latency", "success_ratio"):
        _check_same(path, name, getattr(report.slo, name), getattr(slo, name))
    measured, wanted = (
        one.workload.model_dump(exclude={"rate_per_s"}) for one in (report.slo, slo)
    )
    _check_same(path, "workload", measured, wanted)
    if report.capacity_per_s is None or report.verdict == "inconclusive":
        raise DocumentInvalid(
            str(path), [f"{path}: inconclusive ({report.message}), want a capacity that was found"]
        )
    if not 0 < report.capacity_per_s < math.inf:
        raise DocumentInvalid(
            str(path), [f"{path}: capacity_per_s: got {report.capacity_per_s:g}, want above 0"]
        )
    n = n_replicas or len(report.targets)
    others = (report.confirmation, report.operation)
    points = (*report.points, *(one for one in others if one is not None))
    confirmed = None if report.confirmation is None else report.confirmation.verdict
    capacity_per_s = report.capacity_per_s / n
    return Replica(str(path), capacity_per_s, confirmed, points, n, report.request_bytes)


def load_at(replica: Replica, rate_per_s: float) -> Load:
    """The requests in flight at `rate_per_s`, from the mean time of a request at the highest
    measured rate that isn't above it: times grow with the rate, so this errs to the small side.
    Measurements that are in doubt, or fell short of the SLO, are passed over.

    Raises DocumentInvalid where nothing was measured there.
    """
    below = [
        one
        for one in replica.points
        if one.usable
        and one.verdict != "violated"
        and one.rate_per_s <= _NEAR * rate_per_s * replica.n_measured
    ]
    known = [one for one in below if _in_flight(one) is not None]
    if not known:
        rates = ", ".join(f"{one.rate_per_s:.4g}" for one in replica.points)
        raise DocumentInvalid(
            replica.source,
            [
                f"{replica.source}: no mean time of requests at or below "
                f"{rate_per_s * replica.n_measured:.4g} requests/s was measured that keeps the SLO "
                f"(got points at {rates}), want the search made again, which measures at 0.8 of "
                "what it finds"
            ],
        )
    point = max(known, key=lambda one: one.rate_per_s)
    in_flight = _in_flight(point)
    assert in_flight is not None
    return Load(
        in_flight=rate_per_s * in_flight / point.rate_per_s,
        measured_at_per_s=point.rate_per_s,
        seen_by="client" if point.in_flight is None else "server",
    )


def peak_in_flight(replica: Replica) -> float | None:
    """The most requests in flight in a replica at any rate up to its capacity; none if unknown."""
    most_per_s = _NEAR * replica.capacity_per_s * replica.n_measured
    held = [_in_flight(one) for one in replica.points if one.rate_per_s <= most_per_s]
    return max((one / replica.n_measured for one in held if one is not None), default=None)


def _in_flight(point: RatePoint) -> float | None:
    """By the server, or else by the client's mean time; none where neither is known."""
    if point.in_flight is not None or point.mean_s is None:
        return point.in_flight
    return point.rate_per_s * point.mean_s


def _read(path: Path) -> CapacityReport:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise DocumentInvalid(str(path), [f"{path}: {error.strerror or error}"]) from error
    if len(raw) > MAX_REPORT_BYTES:
        raise DocumentInvalid(str(path), [f"{path}: over {MAX_REPORT_BYTES} bytes, {_WANTED}"])
    try:
        return CapacityReport.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise DocumentInvalid(str(path), [f"{path}: {where}: {first['msg']}, {_WANTED}"]) from error


def _check_same(path: Path, name: str, measured: object, wanted: object) -> None:
    if measured != wanted:
        raise DocumentInvalid(
            str(path),
            [f"{path}: slo.{name}: measured for {measured}, the SLO has {wanted}, want the same"],
        )
