"""What giving way on one constraint alone would buy, where nothing is feasible.

Pure functions of the variants on record; how a variant is served under another threshold comes
in as a function. Nothing here builds or measures.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from loadtest.slo import Slo
from optimizer.choice import LATENCY_MARGIN, value_of
from optimizer.result import Reason, Relaxation, ServingChoice, Variant
from optimizer.spec import Objective

Serve = Callable[[Variant, Slo], ServingChoice]
"""How to serve the variant under another SLO. The margin that predictions keep free is its
matter, so that it decides exactly as a trial does."""

MAX_SIMULATED = 1
"""Variants whose threshold is looked for: the quickest. Each takes some seven choices of how to
serve it, at a few seconds each."""
MAX_TIMES = 10.0
"""The SLO's threshold: a step beyond isn't worth telling."""
WORTHWHILE = 0.5
"""Of the rate that a replica sustains at `MAX_TIMES` the threshold: the least that a new threshold
has to leave it. The smallest of all is kept by thousands of replicas that idle."""
TOLERANCE = 0.1
"""Relative: how closely the smallest threshold is found."""
_DIGITS = 3


def relaxations(
    variants: Sequence[Variant], slo: Slo, objective: Objective, serve: Serve
) -> tuple[Relaxation, ...]:
    """For each constraint, the smallest step on it alone that makes a variant feasible.

    Only variants that break this one constraint and no other count. Limits are rounded to three
    digits, away from what is asked now. The smallest relative step comes first; of equal steps on
    one constraint the better variant counts. Empty where every variant breaks two constraints or
    something that has no limit to move.
    """
    found: dict[str, Relaxation] = {}
    steps = (*_recorded(variants, objective), *_simulated(variants, slo, objective, serve))
    for step in steps:
        other = found.get(step.constraint)
        if other is None or _order(step) < _order(other):
            found[step.constraint] = step
    return tuple(sorted(found.values(), key=_order))


def relative_step(relaxation: Relaxation) -> float:
    """How far the limit moves, relative to what it is; absolute where that is 0."""
    difference = abs(relaxation.to_limit - relaxation.from_limit)
    return difference / abs(relaxation.from_limit) if relaxation.from_limit else difference


def relaxed(slo: Slo, threshold_s: float) -> Slo:
    """The SLO with another latency threshold."""
    latency = slo.latency.model_copy(update={"threshold_ms": threshold_s * 1e3})
    return slo.model_copy(update={"latency": latency})


def _order(relaxation: Relaxation) -> tuple[float, float, str]:
    return relative_step(relaxation), relaxation.value, relaxation.variant_id


def _recorded(variants: Sequence[Variant], objective: Objective) -> Iterator[Relaxation]:
    """Steps that end at a figure on record: all but thresholds that were only predicted."""
    for variant in variants:
        reason = _only_reason(variant)
        if reason is None or reason.value is None or reason.limit is None:
            continue
        if reason.constraint == "success_ratio":
            limit = _rounded_down(reason.value)
        elif reason.constraint in ("accuracy_drop", "size", "memory") or (
            reason.constraint == "latency" and _was_measured(variant)
        ):
            limit = _rounded_up(reason.value)
        else:
            continue
        value = value_of(variant, objective)
        yield Relaxation(reason.constraint, reason.limit, limit, reason.unit, variant.id, value)


def _simulated(
    variants: Sequence[Variant], slo: Slo, objective: Objective, serve: Serve
) -> Iterator[Relaxation]:
    """The latency threshold that a prediction would keep: the smallest of those on record, where a
    simulation confirms it; only where no prediction is finite it is looked for."""
    late = [
        variant
        for variant in variants
        if (reason := _only_reason(variant)) is not None
        and reason.constraint == "latency"
        and not _was_measured(variant)
        and variant.service_times
    ]
    in_reach = [(limit_s, one) for one in late if (limit_s := _predicted_limit_s(slo, one))]
    for limit_s, variant in sorted(in_reach, key=lambda pair: (pair[0], pair[1].id)):
        served = replace(variant, serving=serve(variant, relaxed(slo, limit_s)))
        if served.serving is not None and served.serving.max_rate_per_s > 0:
            value = value_of(served, objective)
            yield Relaxation("latency", slo.latency.threshold_s, limit_s, "s", variant.id, value)
            return
    for variant in sorted(late, key=_shortest_s)[:MAX_SIMULATED]:
        found_s = _smallest_threshold_s(variant, slo, serve)
        if found_s is not None:
            served = replace(variant, serving=serve(variant, relaxed(slo, found_s)))
            value = value_of(served, objective)
            yield Relaxation("latency", slo.latency.threshold_s, found_s, "s", variant.id, value)


def _predicted_limit_s(slo: Slo, variant: Variant) -> float | None:
    """The threshold that the variant's prediction keeps with the margin: of one replica that
    carries all of the SLO's rate. None where it can't, at any threshold."""
    if variant.serving is None:
        return None
    prediction = variant.serving.prediction
    if not math.isfinite(prediction.slo_latency_s) or prediction.success_ratio < slo.success_ratio:
        return None
    limit_s = _rounded_up(prediction.slo_latency_s / (1 - LATENCY_MARGIN))
    return limit_s if limit_s > slo.latency.threshold_s else None


def _smallest_threshold_s(variant: Variant, slo: Slo, serve: Serve) -> float | None:
    """To `TOLERANCE`, by simulation; None where none is found below `MAX_TIMES` the SLO's."""

    def rate_per_s(threshold_s: float) -> float:
        return serve(variant, relaxed(slo, threshold_s)).max_rate_per_s

    # The configuration that came closest will be the first to keep a threshold.
    variant = _in_one_configuration(variant)
    low, high = slo.latency.threshold_s, slo.latency.threshold_s * MAX_TIMES
    wanted_per_s = rate_per_s(high) * WORTHWHILE
    if wanted_per_s <= 0:
        return None
    while high > low * (1 + TOLERANCE):
        middle = math.sqrt(low * high)
        if rate_per_s(middle) >= wanted_per_s:
            high = middle
        else:
            low = middle
    return _rounded_up(high)


def _in_one_configuration(variant: Variant) -> Variant:
    serving = variant.serving
    kept = tuple(
        times
        for times in variant.service_times
        if serving and (times.instances, times.threads) == (serving.instances, serving.threads)
    )
    return replace(variant, service_times=kept or variant.service_times)


def _only_reason(variant: Variant) -> Reason | None:
    """The one constraint that it breaks, at its worst; None where there are more, or none."""
    constraints = {reason.constraint for reason in variant.reasons}
    if variant.status != "infeasible" or len(constraints) != 1:
        return None
    return variant.reasons[0]


def _was_measured(variant: Variant) -> bool:
    verification = variant.verification
    return verification is not None and verification.slo_latency_s is not None


def _shortest_s(variant: Variant) -> float:
    """Of the smallest batch in the quickest configuration, in the median."""
    return min(times.times[0].p50_s for times in variant.service_times)


def _rounded_up(value: float) -> float:
    scale = 10.0 ** (_DIGITS - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale * (1 - 1e-12)) / scale


def _rounded_down(value: float) -> float:
    return math.floor(value * 10**5) / 10**5
