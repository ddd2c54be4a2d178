"""How a study's result is shown: the sentence that answers, the table, and the HTML page.

The page is one file that opens offline. Everything shown comes from the result; nothing is
computed here that another reader of the JSON would miss.
"""

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimizer.architecture_figures import accuracy_by_latency, regret_by_evaluation
from optimizer.chart import Figure
from optimizer.contribution import (
    MAX_LAYERS,
    contributions,
    layer_rows,
    layers_summary,
    slowest_layers,
)
from optimizer.figures import latency_by_batch_size, predicted_against_measured
from optimizer.fusion_rows import fusion_rows, fusion_summary
from optimizer.parallel import parallel_coordinates
from optimizer.pareto import drawn_points, pareto_front, pareto_views
from optimizer.quantities import milliseconds, number, percent, points
from optimizer.result import Outcome, Status, StudyResult, Variant
from optimizer.templating import environment
from optimizer.wording import (
    details,
    explain,
    guarantee,
    headline,
    ladder,
    offer,
    slo_latency_s,
    slo_sentence,
    sorted_variants,
)

TEMPLATE = "report.html"
MARKS: dict[Status, tuple[str, str]] = {
    "chosen": ("★", "bold green"),
    "verified": ("✓", ""),
    "unverified": ("·", ""),
    "infeasible": ("✗", "red"),
    "dropped": ("-", "dim"),
}
MAX_ROWS = 12
"""Of the table on a terminal."""
MAX_FUSIONS = 16
MAX_ARCHITECTURES = 6
"""Searches for another network that are drawn."""
MAX_PAGE_ROWS = 20
"""Of the table on the page, before the rest is folded away."""
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
    shown = _first(result, sorted_variants(result), MAX_ROWS)
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
    for line in _remarks(result):
        console.print(Text(line))


def _remarks(result: StudyResult) -> list[str]:
    """What stands below the answer, a line each."""
    chosen, said = result.chosen, details(result)
    lines = [said] if said else []
    if chosen is not None and chosen.quality and chosen.quality.guarantee == "fidelity":
        lines.append(f"Guarantee by fidelity. {guarantee(chosen.quality)}")
    if chosen is None and result.relaxations:
        lines.append("Giving way on one thing would be enough:")
        lines += [f"  {offer(result, one)}" for one in result.relaxations]
    if told := ladder(result):
        lines.append(f"Ladder: {told}.")
    return lines


def remark(variant: Variant) -> str:
    """Why it isn't the answer; empty where nothing stands against it."""
    return "; ".join(explain(reason) for reason in variant.reasons)


def render_html(result: StudyResult) -> str:
    """The report as one HTML page with everything in it."""
    drawn = {point.variant.id for point in drawn_points(result)}
    variants = sorted_variants(result)
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            result=result,
            headline=headline(result),
            details=details(result),
            title=TITLES[result.outcome],
            variants=variants,
            first=_first(result, variants, MAX_PAGE_ROWS),
            front=pareto_front(result.variants),
            undrawn=[variant for variant in variants if variant.id not in drawn],
            offers=[offer(result, one) for one in result.relaxations],
            contributions=contributions(result),
            layers=layer_rows(result.layers),
            slowest=slowest_layers(result.layers),
            max_layers=MAX_LAYERS,
            layers_summary=layers_summary(result.layers),
            fusions=fusion_rows(result.fusions)[:MAX_FUSIONS],
            fusion_summary=fusion_summary(result.fusions),
            architectures=result.architectures[:MAX_ARCHITECTURES],
            command=shlex.join(result.command),
            views=pareto_views(result),
            figures=_figures(result),
            script_json=script_json,
            plotly=Markup(get_plotlyjs()),  # noqa: S704 - Plotly's own script, nothing of a result
        )
    )


def _figures(result: StudyResult) -> dict[str, Figure]:
    """By the id of the element that they are drawn in; those that have nothing to show are
    left out. The front is drawn in several views, which are apart."""
    figures = {
        "batches": latency_by_batch_size(result),
        "predictions": predicted_against_measured(result),
        "parallel": parallel_coordinates(result),
    }
    for index, record in enumerate(result.architectures[:MAX_ARCHITECTURES]):
        figures[f"architecture-front-{index}"] = accuracy_by_latency(record)
        figures[f"architecture-regret-{index}"] = regret_by_evaluation(record)
    return {name: figure for name, figure in figures.items() if figure is not None}


def script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(_without_nan(value), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def _first(result: StudyResult, ordered: Sequence[Variant], n: int) -> list[Variant]:
    """The first `n` rows of a table, with the baseline."""
    return [*ordered[:n], *(v for v in ordered[n:] if v.id == result.baseline_id)]


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
    low, high = points(quality.drop_lower), points(quality.drop_upper)
    return f"{points(quality.drop)} [{low}, {high}]"


def _without_nan(value: Any) -> Any:
    """Plotly reads null as a gap; JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
