"""Weights in 8 bits against arithmetic written down plainly."""

import numpy as np
import pytest

from optimizer.quantization.weights import (
    mean_error,
    quantize,
    quantize_bias,
    smallest_scales,
)
from tests.optimizer.onnx_networks import random

WEIGHTS = random(6, 5, 3, 3)


def test_weights_are_rounded_to_the_nearest_level_of_their_channel() -> None:
    found = quantize(WEIGHTS, 0, pairs_saturate=False, least_error=False)
    for channel, values in enumerate(WEIGHTS):
        scale = float(np.abs(values).max()) / 127
        assert found.scales[channel] == pytest.approx(scale, rel=1e-6)
        for value, level in zip(values.ravel(), found.values[channel].ravel(), strict=True):
            assert level == round(float(value) / float(found.scales[channel]))
    np.testing.assert_allclose(found.restored(), WEIGHTS, atol=found.scales.max() * 0.51)


def test_weights_have_their_channels_on_the_axis_that_is_asked_for() -> None:
    by_row = quantize(WEIGHTS[..., 0, 0], 0, pairs_saturate=False, least_error=False)
    transposed = quantize(WEIGHTS[..., 0, 0].T, 1, pairs_saturate=False, least_error=False)
    np.testing.assert_array_equal(by_row.values.T, transposed.values)
    np.testing.assert_array_equal(by_row.restored().T, transposed.restored())


@pytest.mark.parametrize("least_error", [False, True])
@pytest.mark.parametrize("outlier", [0.0, 30.0])
def test_no_two_weights_of_a_channel_overflow_16_bits_when_pairs_saturate(
    least_error: bool, outlier: float
) -> None:
    weights = random(64, 40)
    weights[:, 3] += outlier
    found = quantize(weights, 0, pairs_saturate=True, least_error=least_error)
    for row in np.abs(found.values.astype(int)):
        first, second = sorted(row)[-2:]
        assert 255 * (first + second) <= 2**15 - 1


def test_weights_keep_more_levels_than_7_bits_when_one_of_a_channel_is_large() -> None:
    weights = random(1, 100)
    weights[0, 7] = 20
    found = quantize(weights, 0, pairs_saturate=True, least_error=False)
    seven_bits = 20 / 63
    assert found.scales[0] < 0.65 * seven_bits
    error = np.abs(found.restored() - weights).mean()
    assert error < 0.7 * np.abs(np.round(weights / seven_bits) * seven_bits - weights).mean()


def test_weights_have_a_smaller_error_when_their_scale_is_searched() -> None:
    weights = np.random.default_rng(1).laplace(size=(16, 400)).astype(np.float32)

    def squared_error(least_error: bool) -> float:
        found = quantize(weights, 0, pairs_saturate=True, least_error=least_error)
        return float(((found.restored() - weights) ** 2).sum())

    assert squared_error(True) < 0.97 * squared_error(False)


def test_weights_of_zero_stay_zero() -> None:
    found = quantize(np.zeros((2, 3), np.float32), 0, pairs_saturate=True, least_error=True)
    assert not found.restored().any()
    assert (found.scales > 0).all()


def test_weights_are_refused_when_they_are_not_finite() -> None:
    weights = WEIGHTS.copy()
    weights[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weights, 0, pairs_saturate=False, least_error=True)


def test_bias_fits_into_32_bits_when_the_weights_scale_is_raised_for_it() -> None:
    weights, bias = random(2, 4, scale=1e-6), np.float32([100, 0.5])
    input_scale = 1e-4
    found = quantize(
        weights, 0, pairs_saturate=False, least_error=False,
        smallest=smallest_scales(bias, input_scale),
    )  # fmt: skip
    stored = quantize_bias(bias, input_scale, found.scales)
    np.testing.assert_allclose(stored * np.float64(input_scale) * found.scales, bias, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mean_error_is_what_the_mean_of_the_outputs_moves_by(groups: int) -> None:
    weights = random(8, 4 // groups, 3, 3)
    found = quantize(weights, 0, pairs_saturate=True, least_error=False)
    means = random(4, seed=3)
    moved = mean_error(weights, found, means, groups)
    error = found.restored() - weights
    for output in range(8):
        first = output // (8 // groups) * (4 // groups)
        plain = 0.0
        for of_group in range(4 // groups):
            for position in error[output, of_group].ravel():
                plain += float(position) * float(means[first + of_group])
        assert moved[output] == pytest.approx(plain, rel=1e-4, abs=1e-6)
