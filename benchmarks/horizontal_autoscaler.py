"""Kubernetes' HorizontalPodAutoscaler as pure functions of what it sees and the time.

After pkg/controller/podautoscaler of Kubernetes 1.32 (replica_calculator.go, horizontal.go): the
ratio with its tolerance, pods that aren't ready, stabilization windows, and policies of scaling
behavior. Left out: metrics that are missing for a pod, several metrics at once, and policies
selected by Min or Disabled, none of which the manifests have. Knows no load and no queue.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TOLERANCE = 0.1
"""--horizontal-pod-autoscaler-tolerance"""
SYNC_S = 15.0
"""--horizontal-pod-autoscaler-sync-period"""


@dataclass(frozen=True)
class Policy:
    kind: Literal["Percent", "Pods"]
    value: int
    period_s: float


@dataclass(frozen=True)
class Rules:
    """Of one direction; of several policies the one that allows the largest change counts."""

    stabilization_s: float
    policies: tuple[Policy, ...]


@dataclass(frozen=True)
class Behavior:
    up: Rules
    down: Rules


DEFAULT = Behavior(
    up=Rules(0, (Policy("Pods", 4, 15), Policy("Percent", 100, 15))),
    down=Rules(300, (Policy("Percent", 100, 15),)),
)
"""What a HorizontalPodAutoscaler without `behavior` has."""


@dataclass(frozen=True)
class State:
    """`recommendations` are (time, replicas) as metrics asked for; `changes` (time, replicas added,
    or less where taken)."""

    replicas: int
    recommendations: tuple[tuple[float, int], ...] = ()
    changes: tuple[tuple[float, int], ...] = ()


def behavior_of(document: Mapping[str, Any]) -> Behavior:
    """From `behavior` of a manifest, with both directions in it."""

    def rules(of: Mapping[str, Any]) -> Rules:
        policies = [
            Policy(one["type"], one["value"], one["periodSeconds"]) for one in of["policies"]
        ]
        return Rules(of["stabilizationWindowSeconds"], tuple(policies))

    return Behavior(rules(document["scaleUp"]), rules(document["scaleDown"]))


def wanted_by_total(total: float, target: float, replicas: int) -> int:
    """For a metric of the whole fleet and a target for each replica (External, AverageValue)."""
    if abs(1 - total / (target * replicas)) <= TOLERANCE:
        return replicas
    return math.ceil(total / target)


def wanted_by_utilization(
    used: Sequence[float], target: float, n_unready: int, replicas: int
) -> int:
    """For shares of what was requested, of pods that are ready (Resource, Utilization).

    Pods that aren't ready count as idle where that makes a rise smaller, and don't count at all
    where the others ask for less. Shares are whole percents, rounded down, as there.
    """
    if not used:
        return replicas
    ratio = _percent(sum(used), len(used)) / (100 * target)
    if not (n_unready > 0 and ratio > 1):
        return replicas if abs(1 - ratio) <= TOLERANCE else math.ceil(ratio * len(used))
    n = len(used) + n_unready
    damped = _percent(sum(used), n) / (100 * target)
    if abs(1 - damped) <= TOLERANCE or damped < 1:
        return replicas
    return max(replicas, math.ceil(damped * n))


def _percent(total: float, n: int) -> int:
    return math.floor(100 * total / n)


def decide(
    state: State, wanted: int, now: float, behavior: Behavior, least: int, most: int
) -> State:
    """The state after a sync at `now` in which the metric asks for `wanted` replicas."""
    kept = [
        (at, n)
        for at, n in state.recommendations
        if at > now - max(behavior.up.stabilization_s, behavior.down.stabilization_s)
    ]
    stable = _stabilized(state.replicas, wanted, kept, now, behavior)
    replicas = _limited(state, stable, now, behavior, least, most)
    periods = [one.period_s for rules in (behavior.up, behavior.down) for one in rules.policies]
    changes = [(at, n) for at, n in state.changes if at > now - max(periods)]
    if replicas != state.replicas:
        changes.append((now, replicas - state.replicas))
    return State(replicas, (*kept, (now, wanted)), tuple(changes))


def _stabilized(
    replicas: int, wanted: int, before: Sequence[tuple[float, int]], now: float, behavior: Behavior
) -> int:
    """Up to the lowest of the recommendations in the window for it, down to the highest."""
    up, down = (
        [wanted, *(n for at, n in before if at > now - rules.stabilization_s)]
        for rules in (behavior.up, behavior.down)
    )
    return min(max(replicas, min(up)), max(down))


def _limited(
    state: State, wanted: int, now: float, behavior: Behavior, least: int, most: int
) -> int:
    """As far as the policies allow, counted from what there was at the start of their periods."""
    if wanted > state.replicas:
        limits = [_limit(state, one, now, +1) for one in behavior.up.policies]
        return min(wanted, most, max(state.replicas, *limits))
    if wanted < state.replicas:
        limits = [_limit(state, one, now, -1) for one in behavior.down.policies]
        return max(wanted, least, min(state.replicas, *limits))
    return min(most, max(least, wanted))


def _limit(state: State, policy: Policy, now: float, sign: int) -> int:
    start = state.replicas - sum(n for at, n in state.changes if at > now - policy.period_s)
    if policy.kind == "Pods":
        return start + sign * policy.value
    scaled = start * (1 + sign * policy.value / 100)
    return math.ceil(round(scaled, 9)) if sign > 0 else int(round(scaled, 9))
