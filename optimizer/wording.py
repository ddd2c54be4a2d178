"""What a study's result says, in sentences: the answer, the reasons, and what would change them."""

import math

from loadtest.slo import Slo
from optimizer.quantities import bytes_, duration, milliseconds, number, percent, points, quantity
from optimizer.result import Reason, Relaxation, Status, StudyResult, Variant
from serve.artifact import Quality

_ORDER: dict[Status, int] = {
    "chosen": 0,
    "verified": 1,
    "unverified": 2,
    "infeasible": 3,
    "dropped": 4,
}
_MOVES = {
    "accuracy_drop": "allow a drop of {to} points instead of {old}",
    "latency": "raise the threshold from {old} to {to}",
    "success_ratio": "lower the success ratio from {old} to {to}",
    "size": "allow {to} instead of {old}",
    "memory": "allow {to} of memory instead of {old}",
}


def headline(result: StudyResult) -> str:
    """The answer in one sentence."""
    promise, chosen = slo_sentence(result.slo), result.chosen
    if chosen is not None and chosen.serving is not None and result.outcome == "met":
        cost = number(chosen.serving.cost_per_million)
        measured = f"measured {milliseconds(slo_latency_s(chosen))} ms"
        return (
            f"{result.model} as {chosen.label} keeps {promise} ({measured}), for {cost} per "
            "million inferences."
        )
    if chosen is not None and chosen.serving is not None and result.outcome == "unverified":
        cost = number(chosen.serving.cost_per_million)
        return (
            f"{result.model} as {chosen.label} should keep {promise}, for {cost} per million "
            "inferences; nothing has checked it on the server."
        )
    if result.outcome == "inconclusive":
        return f"Whether {result.model} can keep {promise} isn't decided."
    return f"No variant of {result.model} keeps {promise}."


def details(result: StudyResult) -> str:
    """What else there is to say of the answer, in a sentence or two; empty where nothing is."""
    chosen = result.chosen
    if result.outcome in ("met", "unverified") and chosen is not None:
        return " ".join(_accuracy_details(result, chosen) + _cost_details(result, chosen))
    if result.outcome == "inconclusive" and (doubts := _doubts(result)):
        return " ".join(f"{_capitalized(doubt)}." for doubt in doubts)
    miss = result.nearest_miss
    nearest = result.variant(miss.variant_id) if miss else None
    if miss is None or nearest is None:
        return ""
    return f"The nearest is {nearest.label}: {explain(miss.binding)}."


def slo_sentence(slo: Slo) -> str:
    """What is promised, but for the accuracy."""
    return (
        f"p{slo.latency.quantile * 100:g} within {milliseconds(slo.latency.threshold_s)} ms at "
        f"{number(slo.workload.rate_per_s)} requests/s"
    )


def explain(reason: Reason) -> str:
    """A reason as a phrase that names both numbers."""
    value, limit = quantity(reason.value, reason.unit), quantity(reason.limit, reason.unit)
    phrases = {
        "accuracy_drop": f"accuracy may be {points(reason.value)} points lower, "
        f"allowed are {points(reason.limit)}",
        "accuracy_samples": f"{value} show no bound of the accuracy, {limit} would",
        "latency": f"latency {value}, allowed {limit}",
        "rate": f"sustains {value}, wanted {limit}",
        "success_ratio": f"{value} of the requests succeed, wanted {limit}",
        "size": f"size {value}, allowed {limit}",
        "memory": f"memory {value}, allowed {limit}",
    }
    if reason.value is not None and reason.constraint in phrases:
        phrase = phrases[reason.constraint]
        return f"{phrase} ({reason.detail})" if reason.detail else phrase
    named = {"built": "couldn't be built", "parity": "computes something else"}
    named |= {"applicable": "not applicable", "budget": "out of budget", "evidence": "unproven"}
    words = named.get(reason.constraint, reason.constraint.replace("_", " "))
    return f"{words}: {reason.detail}" if reason.detail else words


def guarantee(quality: Quality) -> str:
    """What the accuracy promise rests on, in a sentence."""
    where = f"{quality.n_samples:,} samples of the {quality.split} split"
    if quality.guarantee == "labels":
        return f"Measured against the labels of {where}, pair by pair with the base."
    return (
        f"Without labels: the share of {where} that it answers otherwise than its base bounds what "
        "it can lose. It may lose less, and whether the base is right isn't known."
    )


def offer(result: StudyResult, relaxation: Relaxation) -> str:
    """What giving way on one constraint would buy, as a phrase."""
    old, to = (
        quantity(limit, relaxation.unit)
        if relaxation.constraint != "accuracy_drop"
        else number(limit * 100)
        for limit in (relaxation.from_limit, relaxation.to_limit)
    )
    move = _MOVES.get(relaxation.constraint, "{constraint}: {to} instead of {old}")
    words = relaxation.constraint.replace("_", " ")
    variant = result.variant(relaxation.variant_id)
    name = variant.label if variant is not None else relaxation.variant_id[:12]
    values = {
        "cost": f"{number(relaxation.value)} per million",
        "latency": f"{milliseconds(relaxation.value)} ms",
        "size": bytes_(relaxation.value),
    }
    at = f", at {values[result.objective]}" if math.isfinite(relaxation.value) else ""
    return f"{move.format(old=old, to=to, constraint=words)}: {name} would do{at}"


def ladder(result: StudyResult) -> str:
    """What the rungs did, in a line; empty where none dropped anything."""
    told = []
    for rung in result.rungs:
        if rung.n_dropped:
            saved = f", saved ~{duration(rung.saved_s)}" if rung.saved_s >= 1 else ""
            told.append(
                f"rung {rung.rung} ({rung.name}) took {rung.n_entered}, dropped {rung.n_dropped}"
                f"{saved}"
            )
    return "; ".join(told)


def slo_latency_s(variant: Variant) -> float | None:
    """At the SLO's quantile and rate: measured where it was, else predicted; None if unknown."""
    if variant.verification is not None and variant.verification.slo_latency_s is not None:
        return variant.verification.slo_latency_s
    return variant.serving.prediction.slo_latency_s if variant.serving is not None else None


def _accuracy_details(result: StudyResult, chosen: Variant) -> list[str]:
    quality, objective = chosen.quality, result.slo.accuracy
    if quality is None:
        return []
    lower = f"Its accuracy is {percent(quality.value)}, at most "
    if quality.guarantee == "fidelity":
        faithful = f"({quality.metric} {percent(quality.value)})"
        lower = f"It answers as its base does {faithful}: its accuracy is at most "
    bound = f"{points(max(0.0, quality.drop_bound))} points lower than the base's"
    allowed = f", {objective.max_drop_points:g} allowed" if objective else ""
    sentences = [f"{lower}{bound} ({quality.confidence * 100:g}% confidence{allowed})."]
    if (test := chosen.test_quality) is not None:
        base = (
            ""
            if test.guarantee == "fidelity"
            else (f", where the base has {percent(test.value + test.drop)}")
        )
        sentences.append(
            f"On the locked test split, looked at once, it is {percent(test.value)}{base}."
        )
    return sentences


def _cost_details(result: StudyResult, chosen: Variant) -> list[str]:
    """Against the baseline, where both have a cost."""
    baseline = result.baseline
    if baseline is None or baseline is chosen or not baseline.serving or not chosen.serving:
        return []
    cost = chosen.serving.cost_per_million
    ratio = baseline.serving.cost_per_million / cost if cost > 0 else math.inf
    if not math.isfinite(ratio) or ratio <= 1:
        return []
    return [f"That is {number(ratio)} times cheaper than {baseline.label}."]


def _doubts(result: StudyResult) -> list[str]:
    """Why nothing was decided: what the load tests said that came to no conclusion."""
    loaded = [v.verification for v in sorted_variants(result) if v.verification is not None]
    undecided = [verification for verification in loaded if verification.verdict == "inconclusive"]
    return [reason for verification in undecided for reason in verification.reasons]


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".")


def sorted_variants(result: StudyResult) -> list[Variant]:
    """The chosen first, then by status, by what the study minimizes and by predicted latency."""

    def key(variant: Variant) -> tuple[int, float, float]:
        serving = variant.serving
        latency_s = serving.prediction.slo_latency_s if serving else math.inf
        values = {
            "cost": serving.cost_per_million if serving else math.inf,
            "latency": latency_s,
            "size": float(variant.size_bytes or math.inf),
        }
        return _ORDER[variant.status], values[result.objective], latency_s

    return sorted(result.variants, key=key)
