"""The choice: which variants keep the SLO, and in which order to prefer them.

Pure functions of measurements and the SLO: the same records give the same choice. A prediction is
no proof, so what they call feasible still has to be verified.
"""

import math
from collections.abc import Mapping, Sequence

from loadtest.slo import AccuracyObjective, Slo
from optimizer.result import Constraint, NearestMiss, Reason, ServingChoice, Variant, Verification
from optimizer.spec import Constraints, Objective
from serve.artifact import Quality

LATENCY_MARGIN = 0.1
"""Of the SLO's threshold, kept free in predictions: a simulation knows less than a load test."""
EQUAL = 0.01
"""Relative difference of the objective below which two variants are equally good."""
MAX_EXCESS = 1e6
"""Told of a constraint that is broken by more, or by nobody knows what."""
EQUALLY_BUSY = 0.1
"""The same for the cores that they keep busy, which are noisier."""


def with_margin(slo: Slo) -> Slo:
    """The SLO that predictions are held against."""
    tight = {"threshold_ms": slo.latency.threshold_ms * (1 - LATENCY_MARGIN)}
    return slo.model_copy(update={"latency": slo.latency.model_copy(update=tight)})


def reasons_against(slo: Slo, quality: Quality | None, serving: ServingChoice) -> list[Reason]:
    """The constraints that a variant breaks, each with how far; none where it is feasible."""
    reasons = []
    if slo.accuracy is not None and quality is not None:
        reasons += _accuracy_reasons(slo.accuracy, quality)
    limit_s = with_margin(slo).latency.threshold_s
    prediction = serving.prediction
    if serving.max_rate_per_s <= 0:
        what = f"predicted at its best, with {LATENCY_MARGIN:.0%} kept free"
        # Whatever the load, so the prediction may look fine at a rate it was made for.
        latency_s = max(prediction.slo_latency_s, math.nextafter(limit_s, math.inf))
        reasons.append(Reason("latency", latency_s, limit_s, "s", what))
    elif prediction.success_ratio < slo.success_ratio:
        reasons.append(
            Reason("success_ratio", prediction.success_ratio, slo.success_ratio, "1", "predicted")
        )
    return reasons


def limit_reasons(
    constraints: Constraints, size_bytes: int, memory_bytes: int | None
) -> list[Reason]:
    """The spec's own limits that a variant exceeds; memory that isn't known exceeds none."""
    given: tuple[tuple[Constraint, int | None, int | None], ...] = (
        ("size", size_bytes, constraints.size_bytes),
        ("memory", memory_bytes, constraints.memory_bytes),
    )
    return [
        Reason(name, float(value), float(limit), "bytes", "measured")
        for name, value, limit in given
        if limit is not None and value is not None and value > limit
    ]


def selection_reason(
    accuracy: AccuracyObjective, bound_among_all: float, n_compared: int
) -> Reason | None:
    """Why a candidate doesn't pass once it is one of many: the bound of its drop that holds for
    all `n_compared` variants at once is too large."""
    if accuracy.judged_by == "estimate" or bound_among_all <= accuracy.max_drop:
        return None
    detail = (
        f"by its upper bound at {accuracy.confidence:.0%}, corrected for the choice among "
        f"{n_compared} variants: more validation samples would narrow it"
    )
    return Reason("accuracy_drop", bound_among_all, accuracy.max_drop, "1", detail)


def contradictions(accuracy: AccuracyObjective, quality: Quality) -> list[Reason]:
    """Whether the locked test split contradicts the promise: even the lower end of the drop is
    too much. It is looked at once and is often too small to prove what validation did."""
    if quality.drop_lower <= accuracy.max_drop:
        return []
    detail = "on the locked test split, by the lower end of its interval"
    return [Reason("accuracy_drop", quality.drop_lower, accuracy.max_drop, "1", detail)]


def verification_reasons(slo: Slo, verification: Verification) -> list[Reason]:
    """Why the load test didn't confirm the variant."""
    detail = "on the real server: " + ("; ".join(verification.reasons) or verification.verdict)
    latency_s, limit_s = verification.slo_latency_s, slo.latency.threshold_s
    if verification.verdict == "violated" and latency_s is not None and latency_s > limit_s:
        return [Reason("latency", latency_s, limit_s, "s", detail)]
    return [Reason("evidence", detail=detail)]


def is_undecided(slo: Slo, variant: Variant) -> bool:
    """Whether nothing but the accuracy's bound stands against it, and more samples might help:
    the drop itself is small enough."""
    return (
        slo.accuracy is not None
        and variant.status == "infeasible"
        and variant.quality is not None
        and [reason.constraint for reason in variant.reasons] == ["accuracy_drop"]
        and variant.quality.drop <= slo.accuracy.max_drop
    )


def value_of(variant: Variant, objective: Objective) -> float:
    """What is minimized; infinite where it isn't known."""
    if objective == "size":
        return math.inf if variant.size_bytes is None else float(variant.size_bytes)
    if objective == "energy":
        return math.inf if variant.joules is None else variant.joules
    if variant.serving is None:
        return math.inf
    if objective == "latency":
        return variant.serving.prediction.slo_latency_s
    return variant.serving.cost_per_million


def excess(reason: Reason) -> float:
    """How far a constraint is broken, relative to its limit; infinite without numbers."""
    if reason.value is None or reason.limit is None:
        return math.inf
    difference = abs(reason.value - reason.limit)
    return difference / abs(reason.limit) if reason.limit else difference


def ranked(variants: Sequence[Variant], objective: Objective) -> list[Variant]:
    """The feasible variants, the best first.

    Among equals the less busy is better, then the smaller drop.
    """
    left = [variant for variant in variants if is_candidate(variant)]
    order = []
    while left:
        best = min(value_of(variant, objective) for variant in left)
        equal = [one for one in left if value_of(one, objective) <= best * (1 + EQUAL)]
        chosen = _best_of_equals(equal)
        order.append(chosen)
        left.remove(chosen)
    return order


def finalists(variants: Sequence[Variant], objective: Objective, n: int) -> list[Variant]:
    """The best of each engine and precision, at most `n`: what refutes one most likely refutes
    its siblings too."""
    best: dict[tuple[str, str], Variant] = {}
    for variant in ranked(variants, objective):
        best.setdefault((variant.engine, variant.precision), variant)
    return list(best.values())[:n]


def is_candidate(variant: Variant) -> bool:
    """Whether it breaks no constraint that was measured or predicted."""
    return variant.status == "unverified" and not variant.reasons


def nearest_miss(variants: Sequence[Variant]) -> NearestMiss | None:
    """The variant whose worst violation is smallest, with that violation."""
    missed = [
        (max(variant.reasons, key=excess), variant)
        for variant in variants
        if variant.status == "infeasible" and variant.reasons
    ]
    if not missed:
        return None
    binding, variant = min(missed, key=lambda miss: (excess(miss[0]), miss[1].id))
    return NearestMiss(variant.id, binding)


def _accuracy_reasons(accuracy: AccuracyObjective, quality: Quality) -> list[Reason]:
    value = judged_drop(accuracy, quality)
    bound = f"by its upper bound at {accuracy.confidence:.0%}"
    what = "estimated" if accuracy.judged_by == "estimate" else bound
    if value <= accuracy.max_drop:
        return []
    detail = f"{what} on {quality.n_samples} samples"
    return [Reason("accuracy_drop", value, accuracy.max_drop, "1", detail)]


def _best_of_equals(variants: Sequence[Variant]) -> Variant:
    """The one that keeps fewer cores busy: what it leaves free is headroom. Then the smaller
    drop, then the id."""
    least = min(busy_cores(variant) for variant in variants)
    equal = [one for one in variants if busy_cores(one) <= least * (1 + EQUALLY_BUSY)]
    return min(equal, key=lambda one: (one.quality.drop if one.quality else 0.0, one.id))


def busy_cores(variant: Variant) -> float:
    """Cores that the engine occupies at the SLO's rate, in the mean."""
    serving = variant.serving
    if serving is None:
        return math.inf
    return serving.prediction.utilization * serving.instances * serving.threads


def constraint_values(
    slo: Slo, constraints: Constraints, row: Variant, *, is_final: bool
) -> Mapping[str, float]:
    """Constraints for the search, kept where at most 0, relative to their limits: those of which
    something is known. `is_final`: the row's quality is of the weights that would be served."""
    broken = {reason.constraint: min(excess(reason), MAX_EXCESS) for reason in row.reasons[::-1]}
    found = {"latency": broken.get("latency", broken.get("success_ratio", -1.0))}
    if slo.accuracy is not None and row.quality is not None and is_final:
        limit = slo.accuracy.max_drop
        found["accuracy_drop"] = (judged_drop(slo.accuracy, row.quality) - limit) / (limit or 1.0)
    elif slo.accuracy is not None and row.reasons and row.reasons[0].constraint == "accuracy_drop":
        found["accuracy_drop"] = broken["accuracy_drop"]
    if constraints.size_bytes is not None and row.size_bytes is not None:
        found["size"] = row.size_bytes / constraints.size_bytes - 1
    if constraints.memory_bytes is not None and row.memory_bytes is not None:
        found["memory"] = row.memory_bytes / constraints.memory_bytes - 1
    return found


def judged_drop(accuracy: AccuracyObjective, quality: Quality) -> float:
    """The drop, or its bound: whichever the objective judges."""
    return quality.drop if accuracy.judged_by == "estimate" else quality.drop_bound
