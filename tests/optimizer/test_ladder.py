"""The ladder's rules, and the account of what each rung did."""

import pytest

from loadtest.slo import AccuracyObjective
from optimizer.result import RungRecord
from optimizer.search.ladder import (
    Bound,
    Climb,
    Rung,
    epochs_reason,
    estimate_reason,
    outclassed_reason,
    recovery_reason,
    rung_records,
)
from optimizer.search.recovery import Recovered

ACCURACY = AccuracyObjective(max_drop_points=2)


def test_estimate_rules_out_a_shape_when_even_its_fastest_is_too_slow() -> None:
    reason = estimate_reason(Bound(seconds=0.06, value=1.0), limit_s=0.05, best=None)
    assert reason is not None
    assert (reason.constraint, reason.value, reason.limit) == ("latency", 0.06, 0.05)


def test_estimate_rules_out_a_shape_when_it_would_cost_more_than_the_best_at_its_best() -> None:
    reason = estimate_reason(Bound(seconds=0.01, value=1.2), limit_s=0.05, best=1.0)
    assert reason is not None
    assert reason.constraint == "outclassed"


@pytest.mark.parametrize(
    ("bound", "best"),
    [
        pytest.param(None, 1.0, id="blocks tell nothing"),
        pytest.param(Bound(0.01, 5.0), None, id="there is no candidate to be behind"),
        pytest.param(Bound(0.01, 1.09), 1.0, id="within the margin of the best"),
    ],
)
def test_estimate_lets_a_shape_pass_when_it_may_be_good(
    bound: Bound | None, best: float | None
) -> None:
    assert estimate_reason(bound, limit_s=0.05, best=best) is None


def test_trial_is_outclassed_when_it_is_behind_by_more_than_the_margin() -> None:
    assert outclassed_reason(1.11, 1.0) is not None
    assert outclassed_reason(1.09, 1.0) is None
    assert outclassed_reason(5.0, None) is None


def test_training_ends_when_even_the_optimistic_drop_is_too_large() -> None:
    reason = recovery_reason(Recovered(low=0.021, estimate=0.05, n=9), ACCURACY)
    assert reason is not None
    assert reason.constraint == "accuracy_drop"
    assert "9 trained variants" in reason.detail
    assert recovery_reason(Recovered(low=0.019, estimate=0.05, n=9), ACCURACY) is None


def test_training_goes_on_when_nothing_is_known_or_asked() -> None:
    assert recovery_reason(None, ACCURACY) is None
    assert recovery_reason(Recovered(0.5, 0.6, 9), None) is None


def test_training_is_not_begun_when_it_would_exceed_the_budget_of_epochs() -> None:
    assert epochs_reason(spent=8, wanted=3, limit=10) is not None
    assert epochs_reason(spent=8, wanted=2, limit=10) is None
    assert epochs_reason(spent=8, wanted=900, limit=None) is None


def test_rung_records_count_what_was_dropped_and_the_seconds_that_saved() -> None:
    through = ((Rung.BUILT, 2.0), (Rung.TIMED, 4.0), (Rung.UNTRAINED, 6.0))
    trained = (*through, (Rung.SHORT, 30.0), (Rung.FULL, 100.0))
    climbs = [
        Climb(trained, dropped=False, trains=True),
        Climb(((Rung.BUILT, 2.0), (Rung.TIMED, 4.0)), dropped=True, trains=True),
        Climb(((Rung.ESTIMATED, 0.5),), dropped=True, trains=True),
        Climb(((Rung.BUILT, 1.0), (Rung.TIMED, 3.0)), dropped=True, trains=False),
        Climb(((Rung.BUILT, 1.0), (Rung.TIMED, 3.0), (Rung.UNTRAINED, 5.0)), False, False),
    ]
    assert rung_records(climbs) == (
        RungRecord(1, Rung.ESTIMATED.title, 1, 1, 0.5, 2.0 + 4.0 + 6.0 + 30.0 + 100.0),
        RungRecord(0, Rung.BUILT.title, 4, 0, 6.0, 0.0),
        RungRecord(1, Rung.TIMED.title, 4, 2, 14.0, 6.0 + 30.0 + 100.0 + 5.0),
        RungRecord(2, Rung.UNTRAINED.title, 2, 0, 11.0, 0.0),
        RungRecord(3, Rung.SHORT.title, 1, 0, 30.0, 0.0),
        RungRecord(4, Rung.FULL.title, 1, 0, 100.0, 0.0),
    )
