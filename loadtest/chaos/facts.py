"""What a report holds of a chaos profile's actions, and how its charts show them."""

from typing import Any, Literal

from loadtest.chaos.findings import Finding, is_kept
from loadtest.chaos.profile import ChaosProfile
from loadtest.document import Strict
from loadtest.verdict import Judgement

BAND, FAILED = "#8d5fc4", "#d6453d"
MIN_BAND_SHARE = 0.002
"""Of the window: a recovery in no time is still to be seen."""


class ActionFacts(Strict):
    """Seconds of the window, but for `recovery_s`, which counts from `started_s`."""

    kind: Literal["kill", "stop", "pause", "slow", "command"]
    label: str
    process: str
    """or the command"""
    at_s: float
    started_s: float | None
    """none: it didn't begin"""
    ended_s: float | None
    """when the process was gone or ran again, or the last command had ended; none: unknown"""
    recovery_s: float | None
    """0 where nothing was lost; none: not within the window"""
    n_lost: int | None
    """none: it didn't begin"""
    error: str
    """why it failed; empty where it didn't"""
    kept: bool
    """it took place, and recovery and losses were within the objectives"""


class ChaosFacts(Strict):
    """Each action by itself. The SLO's objectives are kept or missed by all requests of the window
    beside, lost ones included."""

    max_recovery_s: float
    max_lost: int | None
    """none: shown, not judged"""
    hold_s: float
    actions: tuple[ActionFacts, ...]
    """by their time"""
    n_undisturbed: int
    """requests that weren't under way between an action's start and the recovery; the lower bound
    of the latency objective is on these"""
    n_undisturbed_good: int


def chaos_facts(profile: ChaosProfile | None, judgement: Judgement) -> ChaosFacts | None:
    if profile is None:
        return None
    wanted, calm = profile.objectives, judgement.calm
    return ChaosFacts(
        max_recovery_s=wanted.max_recovery_s,
        max_lost=wanted.max_lost,
        hold_s=wanted.hold_s,
        actions=tuple(
            _action_facts(profile, one)
            for one in sorted(judgement.chaos, key=lambda one: one.performed.action.at_s)
        ),
        n_undisturbed=0 if calm is None else calm.n,
        n_undisturbed_good=0 if calm is None else calm.n_good,
    )


def _action_facts(profile: ChaosProfile, finding: Finding) -> ActionFacts:
    performed, recovery = finding.performed, finding.recovery
    return ActionFacts(
        kind=performed.action.kind,
        label=finding.label,
        process=performed.action.process,
        at_s=performed.action.at_s,
        started_s=performed.started_s,
        ended_s=performed.ended_s,
        recovery_s=None if recovery is None else recovery.recovery_s,
        n_lost=None if recovery is None else recovery.n_lost,
        error=performed.error,
        kept=is_kept(profile.objectives, finding),
    )


def summary_of(action: ActionFacts) -> str:
    """In a line: "recovered in 1.25 s, 187 requests lost"."""
    if action.started_s is None:
        return f"didn't begin: {action.error}"
    recovered = (
        "not recovered by the window's end"
        if action.recovery_s is None
        else f"recovered in {action.recovery_s:.4g} s"
    )
    failed = f"; failed: {action.error}" if action.error else ""
    return f"{recovered}, {action.n_lost} requests lost{failed}"


def bands(facts: ChaosFacts | None, window_s: float) -> dict[str, list[dict[str, Any]]]:
    """Plotly's `shapes` and `annotations` for a chart over the window's time.

    From each action's start until it was over and the server had recovered, or to the window's
    end.
    """
    shapes, annotations = [], []
    for one in () if facts is None else facts.actions:
        if one.started_s is None:
            continue
        recovered_s = window_s if one.recovery_s is None else one.started_s + one.recovery_s
        seen_s = one.started_s + MIN_BAND_SHARE * window_s
        end_s = min(window_s, max(recovered_s, one.ended_s or 0.0, seen_s))
        colour = BAND if one.kept else FAILED
        shapes.append(
            {
                "type": "rect",
                "layer": "above",
                "yref": "paper",
                "x0": one.started_s,
                "x1": end_s,
                "y0": 0,
                "y1": 1,
                "fillcolor": colour,
                "opacity": 0.25,
                "line": {"width": 0},
            }
        )
        recovered = "not recovered" if one.recovery_s is None else f"{one.recovery_s:.3g} s"
        annotations.append(
            {
                "x": one.started_s,
                "y": 1,
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "top",
                "showarrow": False,
                "text": f"{one.kind}: {recovered}",
                "font": {"color": colour, "size": 11},
            }
        )
    return {"shapes": shapes, "annotations": annotations}
