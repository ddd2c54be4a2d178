"""Bounds: the ranks that a form can have, by the layer's sides and by the ranks beside each.

Beyond them a factorization doesn't exist or has components of nothing but zeros. It knows shapes
of weights, [out, in, y, x], and no layers.
"""

from collections.abc import Sequence
from math import prod


def max_ranks(form: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The largest rank of each kind that the form has; at all of them it is exact."""
    n_out, n_in, height, width = shape
    if form == "tucker":
        return min(n_in, n_out * height * width), min(n_out, n_in * height * width)
    if form == "cp":
        return (prod(shape) // max(shape),)
    if form == "tensor_train":
        first = min(n_in, height * width * n_out)
        return first, min(n_in * height, width * n_out), min(n_in * height * width, n_out)
    return (min(n_in, n_out),)


def rank_bounds(form: str, shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """What each rank is at most while the others are as given: of a tensor train a neighbour's
    rank times the side between the two (Oseledets 2011), of Tucker the other's times the kernel."""
    n_out, n_in, height, width = shape
    if form == "tucker":
        first, last = ranks
        return min(n_in, last * height * width), min(n_out, first * height * width)
    if form == "tensor_train":
        first, second, third = ranks
        return (
            min(n_in, height * second),
            min(first * height, width * third),
            min(second * width, n_out),
        )
    return max_ranks(form, shape)


def consistent(form: str, shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """The largest ranks, none above those given, that keep each other's bounds. There is one such
    list: of two that keep them the larger of each rank keeps them, too."""
    found = list(ranks)
    while True:
        bounds = rank_bounds(form, shape, found)
        lowered = [min(rank, bound) for rank, bound in zip(found, bounds, strict=True)]
        if lowered == found:
            return found
        found = lowered


def check_ranks(layer: str, form: str, shape: Sequence[int], ranks: Sequence[int]) -> None:
    """Raises ValueError, which names layer, value and bound, for ranks that can't be."""
    limits = max_ranks(form, shape)
    if len(ranks) != len(limits):
        raise ValueError(f"{layer}: got {len(ranks)} ranks, {form} has {len(limits)}")
    for rank, largest in zip(ranks, limits, strict=True):
        if not 1 <= rank <= largest:
            raise ValueError(f"{layer}: got the rank {rank}, want 1 to {largest}")
    for rank, largest in zip(ranks, rank_bounds(form, shape, ranks), strict=True):
        if rank > largest:
            raise ValueError(
                f"{layer}: got the rank {rank} among {list(ranks)}, want at most {largest} beside "
                "the others"
            )
