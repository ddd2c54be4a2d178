"""Bounds of quantiles, against enumeration and known sample sizes."""

import math

import numpy as np
import pytest

from optimizer.loadtest_report import LoadTestReport, n_above_bound


@pytest.mark.parametrize(("n", "quantile"), [(299, 0.99), (59, 0.95), (2_995, 0.999)])
def test_bound_is_the_largest_value_when_there_are_just_enough(n: int, quantile: float) -> None:
    assert n_above_bound(n, quantile, 0.95) == 0
    assert n_above_bound(n - 1, quantile, 0.95) is None


@pytest.mark.parametrize("n", [400, 1_000, 6_000, 50_000])
def test_bound_is_that_of_the_binomial_sum(n: int) -> None:
    quantile, confidence = 0.99, 0.95

    k = n_above_bound(n, quantile, confidence)

    def at_most(k: int) -> float:
        return sum(
            math.exp(
                math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                + i * math.log(1 - quantile) + (n - i) * math.log(quantile)
            )
            for i in range(k + 1)
        )  # fmt: skip

    assert k is not None
    assert at_most(k) <= 1 - confidence < at_most(k + 1)


def test_bound_covers_the_true_quantile_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    true_s = -math.log(0.01)
    k = n_above_bound(1_000, 0.99, 0.95)
    assert k is not None
    samples = np.sort(rng.exponential(1.0, (2_000, 1_000)))

    covered = float((samples[:, -1 - k] >= true_s).mean())

    assert 0.94 <= covered <= 0.985


def test_report_bounds_its_quantile_by_the_effective_number_of_requests() -> None:
    curve = [{"quantile": i / 1_000, "latency_s": i * 1e-3} for i in range(1, 1_001)]

    def bound(effective_n: int) -> float | None:
        return LoadTestReport.model_validate(
            {
                "verdict": "met",
                "reasons": [],
                "requests": {"n": 1_000, "n_ok": 1_000, "achieved_per_s": 1, "goodput_per_s": 1},
                "latency": [],
                "good_share": {"confidence": 0.95, "effective_n": effective_n},
                "curve": curve,
            }
        ).latency_bound_s(0.99)

    assert bound(1_000) == pytest.approx(0.996)
    assert bound(300) == pytest.approx(1.0)
    assert bound(200) is None
