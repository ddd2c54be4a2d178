"""Variants beside each other, figure by figure, the best of each marked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optimizer.quantities import bytes_, milliseconds, number, percent, points
from optimizer.service.page.findings import Finding

MAX_COMPARED = 6


@dataclass(frozen=True)
class Line:
    """A figure of each variant. `best` are the places of the best, none where all are equal."""

    name: str
    texts: tuple[str, ...]
    best: frozenset[int]


@dataclass(frozen=True)
class StepLine:
    """A step of the recipes: its parameters in each variant, None where it isn't there."""

    technique: str
    texts: tuple[str | None, ...]
    differs: bool


def comparison(found: Sequence[Finding], quantile: float) -> list[Line]:
    name = f"p{quantile * 100:g}"
    return [
        _line("accuracy", found, lambda one: one.quality, percent, more_is_better=True),
        _line("drop, points", found, lambda one: one.drop, points),
        _line(f"{name} predicted, ms", found, lambda one: one.predicted_latency_s, milliseconds),
        _line(f"{name} measured, ms", found, lambda one: one.measured_latency_s, milliseconds),
        _line(
            "a replica's requests/s", found, lambda one: one.max_rate_per_s, number,
            more_is_better=True,
        ),
        _line("cost per million", found, lambda one: one.cost_per_million, number),
        _line("size", found, lambda one: one.size_bytes, bytes_),
        _line("memory", found, lambda one: one.memory_bytes, bytes_),
        _line("faster than the baseline", found, lambda one: one.speedup, _times, True),
    ]  # fmt: skip


def recipe_lines(found: Sequence[Finding]) -> list[StepLine]:
    """By technique, in the order of the recipes; what a technique does twice stands in one line."""
    names: list[str] = []
    for one in found:
        names += [n for step in one.recipe if (n := str(step.get("technique"))) not in names]
    lines = []
    for name in names:
        texts = tuple(_step(one, name) for one in found)
        lines.append(StepLine(name, texts, len(set(texts)) > 1))
    return lines


def _line(
    name: str,
    found: Sequence[Finding],
    value: Callable[[Finding], float | None],
    shown: Callable[[float | None], str],
    more_is_better: bool = False,
) -> Line:
    values = [value(one) for one in found]
    known = [one for one in values if one is not None]
    best: frozenset[int] = frozenset()
    if len(set(known)) > 1:
        goal = max(known) if more_is_better else min(known)
        best = frozenset(index for index, one in enumerate(values) if one == goal)
    return Line(name, tuple(shown(one) for one in values), best)


def _step(one: Finding, technique: str) -> str | None:
    told = [
        ", ".join(f"{name} {value}" for name, value in (step.get("parameters") or {}).items())
        for step in one.recipe
        if step.get("technique") == technique
    ]
    return "; then ".join(text or "as it is" for text in told) if told else None


def _times(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}×"
