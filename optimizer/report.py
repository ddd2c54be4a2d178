"""How a study's result is shown: the sentence that answers, the table, and the HTML page.

The page is one file that opens offline. Everything shown comes from the result; nothing is
computed here that another reader of the JSON would miss.
"""

import json
import math
import shlex
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.slo import Slo
from optimizer.chart import Figure
from optimizer.figures import latency_by_batch_size, predicted_against_measured
from optimizer.pareto import drawn_points, pareto_chart, pareto_front
from optimizer.result import Outcome, Reason, Status, StudyResult, Variant

TEMPLATE = "report.html"
MARKS: dict[Status, tuple[str, str]] = {
    "chosen": ("★", "bold green"),
    "verified": ("✓", ""),
    "unverified": ("·", ""),
    "infeasible": ("✗", "red"),
    "dropped": ("-", "dim"),
}
MAX_ROWS = 12
WIDE = 100
"""Columns of a terminal that have room for all of the table."""
LEGEND = (
    "★ chosen  · could keep the SLO  ✗ breaks it  - dropped.  Latency at the SLO's "
    "rate, measured where marked *, else predicted; req/s: the most that a replica sustains "
    "within the SLO; cost: of a million inferences at that rate."
)
TITLES: dict[Outcome, str] = {
    "met": "met",
    "infeasible": "nothing feasible",
    "inconclusive": "inconclusive",
    "unverified": "unverified",
}
_ORDER: dict[Status, int] = {
    "chosen": 0,
    "verified": 1,
    "unverified": 2,
    "infeasible": 3,
    "dropped": 4,
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
        "accuracy_drop": f"accuracy may be {_points(reason.value)} points lower, "
        f"allowed are {_points(reason.limit)}",
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


def slo_latency_s(variant: Variant) -> float | None:
    """At the SLO's quantile and rate: measured where it was, else predicted; None if unknown."""
    if variant.verification is not None and variant.verification.slo_latency_s is not None:
        return variant.verification.slo_latency_s
    return variant.serving.prediction.slo_latency_s if variant.serving is not None else None


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


def print_table(result: StudyResult, console: Console) -> None:
    """Every variant with what it is and does, the chosen one marked, and the answer below."""
    table = Table(
        title=f"{result.model}: {slo_sentence(result.slo)}",
        title_style="bold",
        title_justify="left",
        header_style="bold",
        box=None,
        padding=(0, 2 if console.width >= WIDE else 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("")
    table.add_column("technique", overflow="fold", min_width=12)
    for name in _columns(result, console):
        table.add_column(name, justify="right", no_wrap=True)
    shown = _shown(result)
    for variant in shown:
        mark, style = MARKS[variant.status]
        cells = _cells(result, variant)
        table.add_row(
            mark,
            _name(result, variant),
            *(cells[n] for n in _columns(result, console)),
            style=style,
        )
    console.print(table)
    if len(shown) < len(result.variants):
        console.print(f"… and {len(result.variants) - len(shown)} more, see the report")
    console.print(LEGEND, style="dim", highlight=False)
    for variant in shown:
        if variant.reasons:
            mark, style = MARKS[variant.status]
            line = f"{mark} {variant.label}: {remark(variant)}"
            console.print(Text(line, style=style), highlight=False)
    console.print()
    console.print(Text(headline(result), style="bold"))
    if said := details(result):
        console.print(Text(said))


def remark(variant: Variant) -> str:
    """Why it isn't the answer; empty where nothing stands against it."""
    return "; ".join(explain(reason) for reason in variant.reasons)


def render_html(result: StudyResult) -> str:
    """The report as one HTML page with everything in it."""
    environment = Environment(
        loader=PackageLoader("optimizer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (bytes_, explain, milliseconds, number, percent):
        environment.filters[filter_.__name__.rstrip("_")] = filter_
    figures: dict[str, Figure | None] = {
        "pareto": pareto_chart(result),
        "batches": latency_by_batch_size(result),
        "predictions": predicted_against_measured(result),
    }
    drawn = {point.variant.id for point in drawn_points(result)}
    return environment.get_template(TEMPLATE).render(
        result=result,
        headline=headline(result),
        details=details(result),
        title=TITLES[result.outcome],
        variants=sorted_variants(result),
        front=pareto_front(result.variants),
        latency_of=slo_latency_s,
        undrawn=[variant for variant in result.variants if variant.id not in drawn],
        command=shlex.join(result.command),
        figures={name: figure for name, figure in figures.items() if figure is not None},
        script_json=script_json,
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - Plotly's own script, nothing of a result
    )


def script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(_without_nan(value), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def milliseconds(seconds: float | None) -> str:
    """Three digits, without the unit; a dash for what isn't known, ∞ for infinity."""
    return number(None if seconds is None else seconds * 1e3)


def number(value: float | None, digits: int = 3) -> str:
    """Without an exponent where a reader can do without one."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        rounded = float(f"{value:.{digits}g}") if abs(value) < 10**digits else round(value)
        return f"{rounded:,.10f}".rstrip("0").rstrip(".")
    return f"{value:.{digits}g}"


def percent(share: float | None, decimals: int = 2) -> str:
    return "–" if share is None else f"{share * 100:.{decimals}f}%"


def bytes_(size: float | None) -> str:
    """In the largest decimal unit of which there is at least one."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size is not None and size >= scale:
            return f"{number(size / scale)} {unit}"
    return "–" if size is None else f"{size:.0f} bytes"


def quantity(value: float | None, unit: str) -> str:
    """A reason's value or limit with its unit."""
    if value is None:
        return "–"
    if unit == "s":
        return f"{milliseconds(value)} ms"
    if unit == "1":
        return percent(value)
    if unit == "bytes":
        return bytes_(value)
    return f"{number(value)} {unit.replace('1/s', 'requests/s')}".strip()


def _shown(result: StudyResult) -> list[Variant]:
    """The first rows of the table, with the baseline."""
    ordered = sorted_variants(result)
    first = ordered[:MAX_ROWS]
    return first + [v for v in ordered[MAX_ROWS:] if v.id == result.baseline_id]


def _columns(result: StudyResult, console: Console) -> list[str]:
    latency = f"p{result.slo.latency.quantile * 100:g} ms"
    names = ["accuracy", "drop, points", "p50 ms", latency, "faster", "req/s", "MB", "cost"]
    return [name for name in names if name != "faster" or console.width >= WIDE]


def _name(result: StudyResult, variant: Variant) -> str:
    return variant.label + (" (baseline)" if variant.id == result.baseline_id else "")


def _cells(result: StudyResult, variant: Variant) -> dict[str, str]:
    """By name of the column."""
    serving, verification, quality = variant.serving, variant.verification, variant.quality
    measured = verification is not None and verification.slo_latency_s is not None
    star = "*" if measured else ""
    p50_s = verification.p50_s if verification and measured else None
    if p50_s is None and serving is not None:
        p50_s = serving.prediction.p50_s
    return {
        "accuracy": percent(quality.value) if quality else "–",
        "drop, points": _drop_with_interval(variant),
        "p50 ms": milliseconds(p50_s) + star,
        f"p{result.slo.latency.quantile * 100:g} ms": milliseconds(slo_latency_s(variant)) + star,
        "faster": f"{number(variant.speedup.estimate)}×" if variant.speedup else "–",
        "req/s": number(serving.max_rate_per_s) if serving else "–",
        "MB": number(variant.size_bytes / 1e6) if variant.size_bytes is not None else "–",
        "cost": number(serving.cost_per_million) if serving else "–",
    }


def _drop_with_interval(variant: Variant) -> str:
    """In percentage points; positive is worse than the base."""
    quality = variant.quality
    if quality is None:
        return "–"
    low, high = _points(quality.drop_lower), _points(quality.drop_upper)
    return f"{_points(quality.drop)} [{low}, {high}]"


def _points(share: float | None) -> str:
    return "–" if share is None else f"{share * 100 + 0.0:.2f}"


def _accuracy_details(result: StudyResult, chosen: Variant) -> list[str]:
    quality, objective = chosen.quality, result.slo.accuracy
    if quality is None:
        return []
    lower = f"Its accuracy is {percent(quality.value)}, at most "
    bound = f"{_points(max(0.0, quality.drop_bound))} points lower than the base's"
    allowed = f", {objective.max_drop_points:g} allowed" if objective else ""
    sentences = [f"{lower}{bound} ({quality.confidence * 100:g}% confidence{allowed})."]
    if (test := chosen.test_quality) is not None:
        sentences.append(
            f"On the locked test split, looked at once, it is {percent(test.value)}, where the "
            f"base has {percent(test.value + test.drop)}."
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


def _without_nan(value: Any) -> Any:
    """Plotly reads null as a gap; JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
