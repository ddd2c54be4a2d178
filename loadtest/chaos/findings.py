"""What the actions of a chaos profile did to the requests, and what of that is too much.

The SLO's own objectives are kept or missed by all requests of the window, lost ones included.
Whether the window shows more than itself is asked of the others alone: a disturbance comes when it
was told to, so no sample of it says how often another will.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.chaos.conductor import Performed
from loadtest.chaos.profile import Objectives, label_of
from loadtest.chaos.recovery import Recovery, recovery_of, undisturbed
from loadtest.reasons import ActionNotPerformed, AnyReason, LossesMissed, RecoveryMissed
from loadtest.samples import BoolArray, Samples
from loadtest.slo import LatencyObjective


@dataclass(frozen=True)
class Chaos:
    """What was done in a run, and what that may do."""

    objectives: Objectives
    window_s: float
    performed: tuple[Performed, ...]


@dataclass(frozen=True)
class Finding:
    performed: Performed
    recovery: Recovery | None
    """none: the action didn't begin"""

    @property
    def label(self) -> str:
        return label_of(self.performed.action)


def find(samples: Samples, objective: LatencyObjective, chaos: Chaos | None) -> tuple[Finding, ...]:
    """One for each action, in their order; those that overlap count the same requests."""
    if chaos is None:
        return ()
    hold_s = chaos.objectives.hold_s
    return tuple(
        Finding(
            one,
            None
            if one.started_s is None
            else recovery_of(samples, objective, chaos.window_s, one.started_s, hold_s),
        )
        for one in chaos.performed
    )


def calm_of(samples: Samples, findings: Sequence[Finding]) -> BoolArray:
    """[n] requests that no action disturbed"""
    return undisturbed(
        samples,
        (
            (one.performed.started_s, one.recovery)
            for one in findings
            if one.performed.started_s is not None and one.recovery is not None
        ),
    )


def misses_of(chaos: Chaos | None, findings: Sequence[Finding]) -> list[AnyReason]:
    """Where an action did more than it may."""
    if chaos is None:
        return []
    wanted, misses = chaos.objectives, list[AnyReason]()
    for one in findings:
        if one.recovery is None:
            continue
        if not recovers(wanted, one.recovery):
            misses.append(
                RecoveryMissed(
                    action=one.label,
                    recovery_s=one.recovery.recovery_s,
                    max_recovery_s=wanted.max_recovery_s,
                    hold_s=wanted.hold_s,
                )
            )
        if wanted.max_lost is not None and one.recovery.n_lost > wanted.max_lost:
            misses.append(
                LossesMissed(action=one.label, n_lost=one.recovery.n_lost, max_lost=wanted.max_lost)
            )
    return misses


def action_doubts(findings: Sequence[Finding]) -> list[AnyReason]:
    return [
        ActionNotPerformed(action=one.label, error=one.performed.error)
        for one in findings
        if one.performed.error
    ]


def recovers(wanted: Objectives, recovery: Recovery) -> bool:
    return recovery.recovery_s is not None and recovery.recovery_s <= wanted.max_recovery_s


def is_kept(wanted: Objectives, finding: Finding) -> bool:
    """The action took place as asked for, and did no more than it may."""
    recovery = finding.recovery
    if recovery is None or finding.performed.error:
        return False
    enough = wanted.max_lost is None or recovery.n_lost <= wanted.max_lost
    return enough and recovers(wanted, recovery)
