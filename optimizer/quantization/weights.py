"""Weights: stored in 8 bits with a scale for each output channel, and biases that make up for it.

On processors that add pairs of 8-bit products in 16 bits (x86 before VNNI) sums can saturate.
The usual remedy is 7-bit weights; here a channel's scale is only as large as its two largest
weights together need, since no other pair of the channel can add up to more. It knows arrays, not
graphs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.quantization.graph import Floats

_MAX_LEVEL = 127
_MAX_PAIR = 128
"""255 · 128 fits into 16 bits, the largest activation times two weights that add up to it."""
_MAX_BIAS = 2**31 - 1
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_SHARES = np.append(np.linspace(1.0, 0.7, 31), (_MAX_PAIR - 1) / _MAX_PAIR)
"""Of the scale that clips nothing: those that the search for the least error tries. The last is for
weights that were rounded before, so that rounding them again changes nothing."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """`values` × `scales` (broadcast along `axis`) stand for the weights."""

    values: NDArray[np.int8]
    scales: Floats
    """[channels], positive."""
    axis: int

    def restored(self) -> Floats:
        shape = [1] * self.values.ndim
        shape[self.axis] = -1
        return self.values.astype(np.float32) * self.scales.reshape(shape)


def quantize(
    weights: Floats,
    axis: int,
    *,
    pairs_saturate: bool,
    least_error: bool,
    smallest: Floats | None = None,
) -> Quantized:
    """In 8 bits around zero, per channel of `axis`.

    Where `pairs_saturate` no two values of a channel add up to more than 128. With `least_error`
    each channel's scale is the one with the least squared error, which may clip its largest
    weights; otherwise nothing is clipped. Scales are at least `smallest` [channels]. Raises
    ValueError for weights that aren't finite.
    """
    if not np.isfinite(weights).all():
        raise ValueError("the weights have values that are NaN or infinite")
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
    scales = _full_scales(rows, pairs_saturate)
    if least_error:
        scales = _best_scales(rows, scales, pairs_saturate)
    if smallest is not None:
        scales = np.maximum(scales, smallest)
    return _rounded(weights, rows, scales, axis, pairs_saturate)


def smallest_scales(bias: Floats, input_scale: float) -> Floats:
    """The scales that weights need so that a bias fits into 32 bits at the product of its
    scales, [channels]."""
    return (np.abs(bias).astype(np.float64) / (input_scale * _MAX_BIAS)).astype(np.float32)


def quantize_bias(bias: Floats, input_scale: float, scales: Floats) -> NDArray[np.int32]:
    """At the scale of the sums that it is added to, so that adding it is exact."""
    steps = np.float64(input_scale) * scales.astype(np.float64)
    rounded = np.round(bias.astype(np.float64) / steps)
    return np.clip(rounded, -_MAX_BIAS, _MAX_BIAS).astype(np.int32)


def mean_error(weights: Floats, quantized: Quantized, input_means: Floats, groups: int) -> Floats:
    """By how much rounding the weights of a convolution (output, input / groups, ...) moves the
    mean of its outputs, [outputs]: what the bias has to take back (Nagel et al. 2019, "Data-free
    quantization through weight equalization and bias correction", section 4.2).

    `input_means` [inputs] are over samples and positions; that padding has another mean is
    neglected.
    """
    error = quantized.restored().astype(np.float64) - weights
    per_input = error.reshape(*error.shape[:2], -1).sum(axis=2)
    n_outputs, n_of_group = per_input.shape
    means = input_means.reshape(groups, n_of_group)
    of_output = np.repeat(means, n_outputs // groups, axis=0)
    return np.asarray((per_input * of_output).sum(axis=1), np.float32)


def _full_scales(rows: NDArray[np.float64], pairs_saturate: bool) -> NDArray[np.float64]:
    first, second = _two_largest(rows)
    # Rounding may add half a step to both of a pair.
    pairs = (first + second) / (_MAX_PAIR - 1) if pairs_saturate else 0.0
    return np.maximum(np.maximum(first / _MAX_LEVEL, pairs), _SMALLEST_SCALE)


def _best_scales(
    rows: NDArray[np.float64], full: NDArray[np.float64], pairs_saturate: bool
) -> NDArray[np.float64]:
    best = full.copy()
    least = np.full(len(rows), np.inf)
    limits = _two_largest(rows)[1]
    for share in _SHARES:
        scales = full * share
        levels = _levels(rows, scales, limits if pairs_saturate else None)
        levels *= scales[:, None]
        levels -= rows
        errors = np.einsum("ij,ij->i", levels, levels)
        better = errors < least
        best[better], least[better] = scales[better], errors[better]
    return best


def _two_largest(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each row's absolute values; 0 where it has no second."""
    sizes = np.abs(rows)
    if rows.shape[1] < 2:
        return sizes.max(axis=1, initial=0.0), np.zeros(len(rows))
    two = np.partition(sizes, -2, axis=1)[:, -2:]
    return two[:, 1], two[:, 0]


def _levels(
    rows: NDArray[np.float64], scales: NDArray[np.float64], second: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Rounded and clipped; where `second` has each row's second largest value, so that no pair
    saturates."""
    levels = rows / scales[:, None]
    np.round(levels, out=levels)
    limit = np.full(len(rows), float(_MAX_LEVEL))
    if second is not None:
        # A single large value may be paired with small ones; where there are two, both keep to
        # half.
        limit = np.clip(_MAX_PAIR - np.round(second / scales), _MAX_PAIR // 2, _MAX_LEVEL)
    return np.clip(levels, -limit[:, None], limit[:, None], out=levels)


def _rounded(
    weights: Floats,
    rows: NDArray[np.float64],
    scales: NDArray[np.float64],
    axis: int,
    pairs_saturate: bool,
) -> Quantized:
    stored = np.maximum(scales, _SMALLEST_SCALE).astype(np.float32)
    second = _two_largest(rows)[1] if pairs_saturate else None
    levels = _levels(rows, stored.astype(np.float64), second).astype(np.int8)
    moved = np.moveaxis(weights, axis, 0).shape
    values = np.moveaxis(levels.reshape(moved), 0, axis)
    return Quantized(np.ascontiguousarray(values), stored, axis)
