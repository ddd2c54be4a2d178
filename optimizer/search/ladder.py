"""The ladder of fidelity: what a trial has to show before the next, dearer look at it.

Each rung's rule is a pure function of what is known by then; it gives the reason why the trial
goes no further, or None. Latency comes first, since it doesn't depend on the values of weights: a
network that is too slow untrained is so trained. It runs nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from loadtest.slo import AccuracyObjective
from optimizer.result import Reason, RungRecord
from optimizer.search.recovery import Recovered

OUTCLASSED = 0.1
"""Relative: by so much a trial's objective must be behind the best candidate's to be dropped
before its accuracy is known. Less would trust one timing, and leave no second where the best is
refuted on the server."""


class Rung(Enum):
    """The steps of the ladder in order: (rung as the architecture counts them, what is looked
    at)."""

    ESTIMATED = (1, "estimated by blocks")
    BUILT = (0, "built and equal")
    TIMED = (1, "timed")
    UNTRAINED = (2, "accuracy before training")
    SHORT = (3, "short training")
    FULL = (4, "full training")
    SERVER = (5, "on the real server")

    @property
    def number(self) -> int:
        return self.value[0]

    @property
    def title(self) -> str:
        return self.value[1]


@dataclass(frozen=True)
class Bound:
    """The most optimistic view of a variant: no batch takes less than `seconds`, and no value of
    the objective is below `value`."""

    seconds: float
    """Of the smallest batch that a request makes."""
    value: float


def estimate_reason(bound: Bound | None, limit_s: float, best: float | None) -> Reason | None:
    """Why blocks' times already rule the shape out: even the fastest that they allow is too slow
    or outclassed. None where blocks tell nothing."""
    if bound is None:
        return None
    if bound.seconds > limit_s:
        return Reason("latency", bound.seconds, limit_s, "s", "estimated by its blocks' times")
    return outclassed_reason(bound.value, best, "estimated by its blocks' times")


def outclassed_reason(value: float, best: float | None, detail: str = "") -> Reason | None:
    """Why a trial that a candidate beats by far in the objective needs no further look; `best`
    is the best candidate's value, None while there is none."""
    if best is None or not math.isfinite(best) or value <= best * (1 + OUTCLASSED):
        return None
    what = "the objective's value against the best candidate's"
    return Reason("outclassed", value, best, "", f"{what}, {detail}" if detail else what)


def recovery_reason(
    expected: Recovered | None, accuracy: AccuracyObjective | None
) -> Reason | None:
    """Why more training won't do: even the optimistic end of the drop that trials like it ended
    with is too large. None where nothing asks for accuracy or nothing is known yet."""
    if expected is None or accuracy is None or expected.low <= accuracy.max_drop:
        return None
    detail = (
        f"as {expected.n} trained variants let expect, which ended at {expected.estimate:.2%} "
        f"from such a drop"
    )
    return Reason("accuracy_drop", expected.low, accuracy.max_drop, "1", detail)


def epochs_reason(spent: float, wanted: float, limit: float | None) -> Reason | None:
    """Why the training isn't begun: it would exceed the budget of epochs."""
    if limit is None or spent + wanted <= limit:
        return None
    detail = f"{spent:g} epochs of {limit:g} are spent, its training takes {wanted:g}"
    return Reason("budget", spent + wanted, limit, "", detail)


@dataclass(frozen=True)
class Climb:
    """How far a trial came: seconds on each rung that it came to, in order, the last one being
    where it ended; `dropped` unless that was its last rung and it passed."""

    seconds: tuple[tuple[Rung, float], ...]
    dropped: bool
    trains: bool

    @property
    def last(self) -> Rung | None:
        return self.seconds[-1][0] if self.seconds else None


def rung_records(climbs: Sequence[Climb]) -> tuple[RungRecord, ...]:
    """What each rung did over all trials: see `RungRecord`."""
    return tuple(record for rung in Rung if (record := _record(rung, climbs)).n_entered)


def _record(rung: Rung, climbs: Sequence[Climb]) -> RungRecord:
    spent = [seconds for climb in climbs for at, seconds in climb.seconds if at is rung]
    dropped = [climb for climb in climbs if climb.dropped and climb.last is rung]
    saved_s = sum(_left_s(rung, climb.trains, climbs) for climb in dropped)
    return RungRecord(rung.number, rung.title, len(spent), len(dropped), sum(spent), saved_s)


def _left_s(rung: Rung, trains: bool, climbs: Sequence[Climb]) -> float:
    """Seconds that the rungs above take in the mean for a trial like it. Those of the last rung
    aren't counted: the server is for finalists only."""
    order = list(Rung)
    above = order[order.index(rung) + 1 : order.index(Rung.SERVER)]
    left_s = 0.0
    for other in above:
        if other in (Rung.SHORT, Rung.FULL) and not trains:
            continue
        known = [
            s
            for climb in climbs
            if climb.trains == trains
            for at, s in climb.seconds
            if at is other
        ]
        left_s += sum(known) / len(known) if known else 0.0
    return left_s
