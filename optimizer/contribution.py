"""Rows of the report's tables that compare: the answer with and without a step, and layer by
layer. Bars are shares of the longest, for the page to draw; colours and words are the page's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optimizer.quantities import bytes_, milliseconds, number, points
from optimizer.result import Ablation, Layer, StudyResult
from optimizer.wording import explain

MAX_LAYERS = 16
"""Shown at once: those that took the base longest. All are there, folded away."""


@dataclass(frozen=True)
class Effect:
    """A figure of the answer beside that of the variant without the step. `text` says what the
    step changed; `size` is the length of its bar, 0 to 1, and `is_better` its colour."""

    without: str
    value: str
    text: str
    size: float
    is_better: bool


@dataclass(frozen=True)
class Contribution:
    """What one step did. `verdict` says what stands against the answer without it."""

    technique: str
    label: str
    verdict: str
    effects: tuple[Effect | None, ...]
    """Of cost, latency, drop and size; None where one of the two isn't known."""


@dataclass(frozen=True)
class LayerRow:
    """A layer with bars of its times, as shares of the longest. `change` is `same`, `changed`,
    `gone` or `new`."""

    layer: Layer
    change: str
    base_size: float
    size: float


def contributions(result: StudyResult) -> list[Contribution]:
    """What each step of the answer contributed, in the recipe's order."""
    return [_contribution(result, one) for one in result.ablations]


def _contribution(result: StudyResult, ablation: Ablation) -> Contribution:
    chosen, other = result.chosen, result.variant(ablation.without_id)
    serving = chosen.serving if chosen else None
    quality = chosen.quality if chosen else None
    allowed = result.slo.accuracy.max_drop if result.slo.accuracy else 0.01
    return Contribution(
        technique=ablation.technique,
        label=other.label if other else ablation.without_id[:12],
        verdict="; ".join(explain(reason) for reason in other.reasons) if other else "",
        effects=(
            _relative(
                serving.cost_per_million if serving else None, ablation.cost_per_million, number
            ),
            _relative(
                serving.prediction.slo_latency_s if serving else None,
                ablation.latency_s,
                lambda seconds: f"{milliseconds(seconds)} ms",
            ),
            _drop(quality.drop if quality else None, ablation.drop, allowed),
            _relative(chosen.size_bytes if chosen else None, ablation.size_bytes, bytes_),
        ),
    )


def _relative(
    value: float | None, difference: float | None, shown: Callable[[float], str]
) -> Effect | None:
    if value is None or difference is None or value <= difference:
        return None
    change = difference / (value - difference)
    text = "none" if abs(change) < 0.0005 else f"{change * 100:+.3g}%".replace("-", "−")
    return Effect(shown(value - difference), shown(value), text, min(1.0, abs(change)), change < 0)


def _drop(value: float | None, difference: float | None, allowed: float) -> Effect | None:
    """In points, the bar as a share of the drop that the SLO allows."""
    if value is None or difference is None:
        return None
    text = "none" if abs(difference) < 5e-5 else f"{difference * 100:+.2f}".replace("-", "−")
    size = min(1.0, abs(difference) / allowed) if allowed > 0 else 0.0
    return Effect(points(value - difference), points(value), text, size, difference < 0)


def layer_rows(layers: Sequence[Layer]) -> list[LayerRow]:
    longest = max((max(one.base_s or 0.0, one.seconds or 0.0) for one in layers), default=0.0)

    def size(seconds: float | None) -> float:
        return seconds / longest if seconds and longest > 0 else 0.0

    return [LayerRow(one, _change(one), size(one.base_s), size(one.seconds)) for one in layers]


def slowest_layers(layers: Sequence[Layer]) -> list[LayerRow]:
    """The `MAX_LAYERS` rows that took longest in either, the longest first."""
    rows = layer_rows(layers)
    return sorted(rows, key=lambda row: -max(row.base_size, row.size))[:MAX_LAYERS]


def layers_summary(layers: Sequence[Layer]) -> str:
    """How many layers there are, how many changed, and the seconds of those timed in both."""
    if not layers:
        return ""
    changes = [_change(one) for one in layers]
    told = [f"{len(layers)} layers with weights or attention"]
    other = sum(
        one.precision != one.base_precision for one in layers if one.shape and one.base_shape
    )
    if other:
        told.append(f"{other} in another precision")
    told += [f"{n} {words}" for name, words in _CHANGES.items() if (n := changes.count(name))]
    timed = [(one.base_s, one.seconds) for one in layers]
    before = sum(first for first, _ in timed if first is not None)
    after = sum(second for _, second in timed if second is not None)
    if before and after:
        told.append(f"together {milliseconds(before)} → {milliseconds(after)} ms")
    return ", ".join(told) + "."


_CHANGES = {"changed": "of another shape", "gone": "gone", "new": "new"}


def _change(layer: Layer) -> str:
    if not layer.precision:
        return "gone"
    if not layer.base_precision:
        return "new"
    return "same" if layer.shape == layer.base_shape else "changed"
