"""Reach: which speedups a space's networks come to on the target, known before any is trained."""

from optimizer.architecture.latency import Unmeasured
from optimizer.architecture.search import NothingFastEnough, check_target
from optimizer.architecture.setting import Setting
from optimizer.architecture.space import Choices
from optimizer.architecture.table import SpaceTable


def why_not(setting: Setting) -> str | None:
    """Why no network of the space can be found, or None: it can't stand in the model's place, no
    latency is known, or none is fast enough for any of the speedups."""
    reason = setting.reason_against()
    if reason is not None:
        return reason
    table = setting.table()
    if table is None:
        return "the target's times of the layers are missing, without which no latency is known"
    missed = unreachable(setting, table)
    return None if len(missed) < len(setting.spec.speedups) else "; ".join(missed.values())


def slow_precisions(setting: Setting) -> dict[str, str]:
    """By precision of several, why no network of the space reaches any speedup in it."""
    precisions = setting.spec.precisions
    if len(precisions) == 1:
        return {}
    found = {one: why_not(setting.at(one)) for one in precisions}
    return {one: reason for one, reason in found.items() if reason is not None}


def unreachable(setting: Setting, table: SpaceTable) -> dict[float, str]:
    """By speedup, why no network of the space reaches it."""
    try:
        fastest = table.fastest()
    except Unmeasured as error:
        return dict.fromkeys(setting.spec.speedups, str(error))
    found: dict[float, str] = {}
    for speedup in setting.spec.speedups:
        try:
            check_target(
                fastest.seconds,
                setting.base_s(table) / speedup,
                lambda: _shown(setting, fastest.choices),
                fastest.n_looked,
            )
        except NothingFastEnough as error:
            found[speedup] = f"at {speedup:g}x {error}"
    return found


def _shown(setting: Setting, choices: Choices) -> str:
    """What was chosen where there was a choice."""
    names = [one.name for one in setting.space.decisions if len(one.options) > 1]
    chosen = {name: setting.space.option(choices, name) for name in names}
    return ", ".join(f"{name} {option}" for name, option in chosen.items() if option is not None)
