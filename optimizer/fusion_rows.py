"""The fusion report as tables show it: rows with bars, what stayed unfused, and a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.kernels import is_heavy
from optimizer.quantities import milliseconds
from optimizer.result import Fusion


@dataclass(frozen=True)
class FusionRow:
    """Sizes are of the bars, 0 to 1, the longest of all rows being 1."""

    fusion: Fusion
    what: str
    base_size: float
    size: float
    is_unfused: bool


def fusion_rows(fusions: Sequence[Fusion]) -> list[FusionRow]:
    longest = max((max(one.base_s, one.seconds) for one in fusions), default=0.0) or 1.0
    alone = unfused(fusions)
    return [
        FusionRow(one, what(one), one.base_s / longest, one.seconds / longest, one in alone)
        for one in fusions
    ]


def what(fusion: Fusion) -> str:
    return " + ".join(fusion.operators) or "added by the engine"


def unfused(fusions: Sequence[Fusion]) -> list[Fusion]:
    """What stayed alone and isn't a convolution or matrix product, the longest first: conversions
    of layouts and types that the engine put in between, and operators that nothing took in."""

    def is_alone(one: Fusion) -> bool:
        named = (*one.operators, one.kernel)
        return bool(one.kernel) and len(one.operators) <= 1 and not any(map(is_heavy, named))

    return sorted(filter(is_alone, fusions), key=lambda one: -one.seconds)


def fusion_summary(fusions: Sequence[Fusion]) -> str:
    """Kernels before and after, their seconds, and what the unfused ones cost."""
    if not fusions:
        return ""
    before = sum(one.base_s for one in fusions)
    after = sum(one.seconds for one in fusions)
    told = [
        f"{milliseconds(before)} ms in kernels of single operators",
        f"{milliseconds(after)} ms in the {sum(one.n for one in fusions if one.kernel)} kernels "
        "that ran",
    ]
    alone = unfused(fusions)
    cost = sum(one.seconds for one in alone)
    if alone and after > 0:
        told.append(
            f"{milliseconds(cost)} ms of them ({cost / after:.0%}) in operators that stayed "
            f"unfused, most in {what(alone[0])}"
        )
    return ", ".join(told) + "."
