"""Recovery and losses by arrays against the definition, request by request."""

import math

import numpy as np
import pytest

from loadtest.chaos.recovery import Recovery, recovery_of, undisturbed
from loadtest.samples import CONNECTION_FAILED, DROPPED, HTTP_OK, UNFINISHED, Samples
from loadtest.slo import LatencyObjective

OBJECTIVE = LatencyObjective(quantile=0.9, threshold_ms=100)
WINDOW_S = 20.0


def samples_of(intended_s: list[float], bad: dict[int, int], latency_s: float = 0.01) -> Samples:
    """Good ones, but for those in `bad`, which have that status and end as fast."""
    intended = np.array(intended_s, dtype=float)
    status = np.full(len(intended), HTTP_OK, np.int32)
    for index, one in bad.items():
        status[index] = one
    never = np.isin(status, (DROPPED, UNFINISHED))
    return Samples(
        intended_s=intended,
        sent_s=np.where(status == DROPPED, np.nan, intended),
        done_s=np.where(never, np.nan, intended + latency_s),
        target=np.zeros(len(intended), np.int32),
        status=status,
    )


def is_good(samples: Samples, index: int) -> bool:
    latency_s = samples.done_s[index] - samples.intended_s[index]
    return samples.status[index] == HTTP_OK and latency_s <= OBJECTIVE.threshold_s


def ended_s(samples: Samples, index: int) -> float:
    if samples.status[index] == DROPPED:
        return float(samples.intended_s[index])
    return math.inf if math.isnan(samples.done_s[index]) else float(samples.done_s[index])


def slow_recovery_of(samples: Samples, start_s: float, hold_s: float) -> Recovery:
    """The definition, read aloud."""
    intended_s, moment_s = samples.intended_s.tolist(), math.inf
    for index, time_s in enumerate(intended_s):
        if time_s < start_s or time_s + hold_s > WINDOW_S or not is_good(samples, index):
            continue
        next_ones = [i for i, t in enumerate(intended_s) if time_s <= t < time_s + hold_s]
        n_good = sum(is_good(samples, i) for i in next_ones)
        if n_good / len(next_ones) >= OBJECTIVE.quantile:
            moment_s = time_s
            break
    n_lost = sum(
        not is_good(samples, i) and time_s < moment_s and ended_s(samples, i) > start_s
        for i, time_s in enumerate(intended_s)
    )
    if math.isinf(moment_s):
        return Recovery(None, n_lost)
    return Recovery(moment_s - start_s if n_lost else 0.0, n_lost)


@pytest.mark.parametrize("seed", range(60))
def test_recovery_is_the_definitions_when_samples_are_random(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 120))
    intended_s = np.sort(rng.uniform(0, WINDOW_S, n)).round(int(rng.integers(1, 6)))
    start_s, length_s = float(rng.uniform(0, WINDOW_S)), float(rng.uniform(0, 8))
    hit = (intended_s >= start_s) & (intended_s < start_s + length_s)
    hit |= rng.uniform(size=n) < rng.choice([0.0, 0.02, 0.3])
    statuses = rng.choice([CONNECTION_FAILED, DROPPED, UNFINISHED, 503], n)
    bad = {int(i): int(statuses[i]) for i in np.flatnonzero(hit)}
    samples = samples_of(intended_s.tolist(), bad, float(rng.choice([0.01, 0.1])))
    slow = rng.uniform(size=n) < 0.05
    samples.done_s[slow] += 0.2
    hold_s = float(rng.choice([0.5, 2.0, 5.0]))
    found = recovery_of(samples, OBJECTIVE, WINDOW_S, start_s, hold_s)
    assert found == slow_recovery_of(samples, start_s, hold_s)


EVERY_TENTH = [index / 10 for index in range(200)]


@pytest.mark.parametrize(
    ("bad", "start_s", "wanted"),
    [
        pytest.param({}, 4.95, Recovery(0.0, 0), id="nothing is lost"),
        pytest.param(
            dict.fromkeys(range(50, 70), 503), 5.0, Recovery(2.0, 20), id="two seconds are lost"
        ),
        pytest.param(
            dict.fromkeys(range(50, 200), 503), 5.0, Recovery(None, 150), id="it never comes back"
        ),
        pytest.param(
            dict.fromkeys(range(190, 200), 503), 16.0, Recovery(None, 10),
            id="too little of the window is left",
        ),
        pytest.param(dict.fromkeys(range(20), 503), 5.0, Recovery(0.0, 0), id="bad ones before"),
        pytest.param({49: 503}, 4.905, Recovery(0.095, 1), id="one in flight at the start"),
        pytest.param(
            {49: DROPPED, 60: 503}, 4.905, Recovery(0.0, 0), id="one that was never in flight"
        ),
    ],
)  # fmt: skip
def test_recovery_counts_what_was_lost_when(
    bad: dict[int, int], start_s: float, wanted: Recovery
) -> None:
    found = recovery_of(samples_of(EVERY_TENTH, bad), OBJECTIVE, WINDOW_S, start_s, hold_s=5.0)
    assert found.n_lost == wanted.n_lost
    assert found.recovery_s == (
        None if wanted.recovery_s is None else pytest.approx(wanted.recovery_s)
    )


@pytest.mark.parametrize(
    "disturbances",
    [
        pytest.param([], id="none"),
        pytest.param([(4.905, Recovery(0.095, 1)), (9.0, Recovery(2.0, 20))], id="two"),
        pytest.param([(9.0, Recovery(2.0, 20)), (10.0, Recovery(None, 90))], id="one for ever"),
    ],
)
def test_requests_are_undisturbed_when_they_are_under_way_at_other_times(
    disturbances: list[tuple[float, Recovery]],
) -> None:
    samples = samples_of(EVERY_TENTH, {3: UNFINISHED, 70: DROPPED})
    found = undisturbed(samples, disturbances)
    for index, time_s in enumerate(EVERY_TENTH):
        touched = [
            time_s < (math.inf if one.recovery_s is None else start_s + one.recovery_s)
            and ended_s(samples, index) > start_s
            for start_s, one in disturbances
        ]
        assert found[index] == (not any(touched))
    assert found[3] == (not disturbances)
