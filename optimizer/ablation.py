"""Ablation: what each step of a recipe contributed, by the variant that goes without it.

Pure functions of the variants on record. Which recipes would complete the picture is said; they
are measured elsewhere.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from optimizer.result import Ablation, Variant
from serve.artifact import Step

REQUIRED = frozenset({"export", "compilation"})
"""Steps of every recipe: nothing runs without them, so there is nothing to compare with."""
SETS_PRECISION = frozenset({"quantization"})
"""Techniques whose result has another precision, which an engine's parameter then repeats."""
_PRECISION = "precision"
_OF_QUANTIZED = "rest"
"""An engine's parameter that only a quantized model has: what its other operators compute in."""


def ablations(
    rows: Sequence[Variant], chosen: Variant, required: Collection[str] = REQUIRED
) -> tuple[Ablation, ...]:
    """For each step of the chosen recipe the row that lacks it alone, in the recipe's order.

    Steps are equal if technique, its version and parameters are, but that the engine may name
    another precision: without quantization it runs what it is given. Rows that were dropped have
    no figures and don't count. Latencies are both predicted. A step without such a row is left
    out; `missing` names its recipe.
    """
    found = []
    for step, recipe in _without_each(chosen, required):
        other = _best_match(rows, recipe)
        if other is not None:
            found.append(_difference(step.technique, chosen, other))
    return tuple(found)


def missing(
    rows: Sequence[Variant], chosen: Variant, required: Collection[str] = REQUIRED
) -> tuple[tuple[Step, ...], ...]:
    """The recipes that have to be measured before `ablations` is complete; dropped ones were
    tried, so they aren't named again."""
    return tuple(
        recipe
        for _, recipe in _without_each(chosen, required)
        if not any(_fit(row.recipe, recipe) is not None for row in rows)
    )


def _without_each(
    chosen: Variant, required: Collection[str]
) -> Iterator[tuple[Step, tuple[Step, ...]]]:
    """Each step that can go, with the recipe that is left."""
    for index, step in enumerate(chosen.recipe):
        if step.technique not in required:
            later = chosen.recipe[index + 1 :]
            if step.technique in SETS_PRECISION:
                later = tuple(_in_fp32(other) for other in later)
            yield step, (*chosen.recipe[:index], *later)


def _in_fp32(step: Step) -> Step:
    if _PRECISION not in step.parameters:
        return step
    kept = {name: value for name, value in step.parameters.items() if name != _OF_QUANTIZED}
    return replace(step, parameters={**kept, _PRECISION: "fp32"})


def _best_match(rows: Sequence[Variant], recipe: Sequence[Step]) -> Variant | None:
    """The measured row whose recipe it is, in the precision that it names if that is there."""
    measured = [(_fit(row.recipe, recipe), row) for row in rows if row.status != "dropped"]
    fitting = [(fit, row) for fit, row in measured if fit is not None]
    return min(fitting, key=lambda pair: (pair[0], pair[1].id))[1] if fitting else None


def _fit(recipe: Sequence[Step], wanted: Sequence[Step]) -> int | None:
    """How many steps differ, in precision alone; None where another thing differs."""
    if len(recipe) != len(wanted):
        return None
    n_other = 0
    for step, want in zip(recipe, wanted, strict=True):
        if _identity(step) != _identity(want):
            return None
        n_other += step.parameters.get(_PRECISION) != want.parameters.get(_PRECISION)
    return n_other


def _identity(step: Step) -> tuple[object, ...]:
    parameters = {name: value for name, value in step.parameters.items() if name != _PRECISION}
    return step.technique, step.technique_version, step.seed, parameters


def _difference(technique: str, chosen: Variant, other: Variant) -> Ablation:
    one, two = chosen.serving, other.serving
    return Ablation(
        technique=technique,
        without_id=other.id,
        cost_per_million=_less(
            one.cost_per_million if one else None, two.cost_per_million if two else None
        ),
        latency_s=_less(
            one.prediction.slo_latency_s if one else None,
            two.prediction.slo_latency_s if two else None,
        ),
        drop=_less(
            chosen.quality.drop if chosen.quality else None,
            other.quality.drop if other.quality else None,
        ),
        size_bytes=_less(chosen.size_bytes, other.size_bytes),
    )


def _less(value: float | None, other: float | None) -> float | None:
    """None where one isn't known or infinite: it keeps no rate, so there is no difference."""
    if value is None or other is None or not (math.isfinite(value) and math.isfinite(other)):
        return None
    return value - other
