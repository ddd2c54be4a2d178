"""The predictor of the drop that remains after training."""

import numpy as np
import pytest

from optimizer.search.recovery import MIN_RECORDS, RecoveryRecord, expected_drop


def records(n: int, seed: int = 0, noise: float = 0.002) -> list[RecoveryRecord]:
    """A drop of 40 % of what remains after short training, which is half of the untrained one."""
    rng = np.random.default_rng(seed)
    untrained = rng.uniform(0.05, 0.6, n)
    return [
        RecoveryRecord(
            size=float(rng.uniform(0.2, 0.9)),
            untrained=float(one),
            short=float(one / 2),
            final=float(0.2 * one + rng.normal(0, noise)),
        )
        for one in untrained
    ]


def test_nothing_is_expected_when_too_few_were_trained() -> None:
    assert expected_drop(records(MIN_RECORDS - 1), 0.5, 0.3) is None
    assert expected_drop(records(MIN_RECORDS), 0.5, 0.3) is not None


def test_expectation_follows_the_records() -> None:
    expected = expected_drop(records(20), size=0.5, untrained=0.4, short=0.2)
    assert expected is not None
    assert expected.estimate == pytest.approx(0.08, abs=0.01)
    assert expected.low <= expected.estimate
    assert expected.n == 20


def test_lower_end_holds_for_nearly_all_when_others_are_like_the_records() -> None:
    below = total = 0
    for seed in range(40):
        known, others = records(15, seed, noise=0.02), records(10, seed + 1000, noise=0.02)
        for one in others:
            expected = expected_drop(known, one.size, one.untrained, one.short)
            assert expected is not None
            below += one.final < expected.low
            total += 1
    assert below / total < 0.15


def test_records_without_short_training_are_left_out_when_it_is_asked_by() -> None:
    without = [RecoveryRecord(r.size, r.untrained, r.final) for r in records(10)]
    assert expected_drop(without, 0.5, 0.3, short=0.1) is None
    assert expected_drop(without, 0.5, 0.3) is not None


def test_expectation_is_a_share_when_the_records_lead_beyond() -> None:
    expected = expected_drop(records(20), size=0.5, untrained=50.0)
    assert expected is not None
    assert expected.estimate == 1.0


def test_record_survives_a_round_trip() -> None:
    one = records(1)[0]
    assert RecoveryRecord.from_dict(one.to_dict()) == one
