"""The batching policy: tables of single decisions, properties over random traffic in simulated
time, and goodput under overload against a plain FIFO."""

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.batch_policy import BatchQueue, Decision, Entry, Limits, ServiceTimes
from tests.serve.simulation import Fifo, policy, simulate

MAX_ROWS = 8
# One row takes 10 ms, each further one 1 ms: batches pay.
TIMES = ServiceTimes([1, MAX_ROWS], [0.010, 0.017])
# Every row takes 10 ms: a batch of two costs as much as two.
PROPORTIONAL = ServiceTimes([1], [0.010])


def entry(
    item: int,
    arrival_s: float = 0.0,
    n_rows: int = 1,
    target_s: float = math.inf,
    deadline_s: float = math.inf,
) -> Entry[int]:
    return Entry(item, n_rows, arrival_s, target_s, deadline_s)


def filled(
    entries: Sequence[Entry[int]],
    limits: Limits | None = None,
    times: ServiceTimes = TIMES,
) -> BatchQueue[int]:
    queue: BatchQueue[int] = BatchQueue(limits or Limits(MAX_ROWS), times)
    for given_entry in entries:
        assert queue.offer(given_entry, given_entry.arrival_s) == (True, ())
    return queue


def items(entries: Sequence[Entry[int]]) -> list[int]:
    return [given_entry.item for given_entry in entries]


# --- single decisions


@pytest.mark.parametrize(
    ("entries", "now", "batch", "expired", "reason"),
    [
        pytest.param([], 0.0, [], [], "", id="an empty queue has nothing to run"),
        pytest.param([entry(1)], 0.0, [1], [], "drained", id="a lone request runs at once"),
        pytest.param(
            [entry(n) for n in range(10)], 0.0, list(range(8)), [], "full",
            id="a batch is closed at the largest size",
        ),
        pytest.param(
            [entry(1, n_rows=5), entry(2, n_rows=5)], 0.0, [1], [], "full",
            id="a request that doesn't fit waits for the next batch",
        ),
        pytest.param(
            [entry(1, target_s=0.3), entry(2, target_s=0.1), entry(3, target_s=0.2)], 0.0,
            [2, 3, 1], [], "drained", id="the earliest target goes first",
        ),
        pytest.param(
            [entry(1, target_s=0.3), entry(2, deadline_s=0.1)], 0.0, [2, 1], [], "drained",
            id="a deadline orders like a target",
        ),
        pytest.param(
            [entry(1, target_s=0.012), *[entry(n, target_s=1.0) for n in range(2, 4)]], 0.0,
            [1, 2, 3], [], "drained", id="all go where the first can afford them",
        ),
        pytest.param(
            [entry(1, target_s=0.0115), entry(2, target_s=0.025), entry(3, target_s=0.025)], 0.0,
            [1, 2], [], "target", id="the batch stops growing at what the first can afford",
        ),
        pytest.param(
            [entry(1, target_s=0.0101), *[entry(n, target_s=0.0175) for n in range(2, 10)]], 0.0,
            [2, 3, 4, 5, 6, 7, 8, 9], [], "target",
            id="the first is sacrificed where that answers more in time",
        ),
        pytest.param(
            [entry(1, target_s=0.005)], 0.0, [1], [], "late", id="a late request is still served"
        ),
        pytest.param(
            [entry(1, target_s=0.005), *[entry(n, target_s=0.5) for n in range(2, 10)]], 0.0,
            list(range(2, 10)), [], "full", id="a late request gives way to those in time",
        ),
        pytest.param(
            [entry(1, target_s=0.005), entry(2, target_s=0.5)], 0.0, [2, 1], [], "drained",
            id="a late request takes the room that is left",
        ),
        pytest.param(
            [entry(1, deadline_s=0.009)], 0.0, [], [1], "",
            id="what can't make its deadline is expired",
        ),
        pytest.param(
            [entry(1, deadline_s=0.010)], 0.0, [1], [], "drained",
            id="what just makes its deadline is served",
        ),
        pytest.param(
            [entry(1, target_s=0.005, deadline_s=0.5)], 0.0, [1], [], "late",
            id="a missed target before the deadline expires nothing",
        ),
        pytest.param(
            [entry(1, deadline_s=0.009), entry(2)], 0.0, [2], [1], "drained",
            id="expired requests leave room in the batch",
        ),
    ],
)  # fmt: skip
def test_decide_picks_the_batch_when_queue_holds(
    entries: list[Entry[int]], now: float, batch: list[int], expired: list[int], reason: str
) -> None:
    decision = filled(entries).decide(now)
    assert (items(decision.batch), items(decision.expired)) == (batch, expired)
    assert decision.reason == reason


def waiting(
    limits: Limits,
    times: ServiceTimes = TIMES,
    last: Entry[int] | None = None,
    gap_s: float = 0.002,
) -> tuple[BatchQueue[int], float]:
    """A queue of one request after a history of arrivals `gap_s` apart, and the instant."""
    queue: BatchQueue[int] = BatchQueue(limits, times)
    for n in range(5):
        queue.offer(entry(n, arrival_s=n * gap_s), n * gap_s)
    queue.drain()
    now = 5 * gap_s
    queue.offer(last or entry(9, arrival_s=now), now)
    return queue, now


DELAYED = Limits(MAX_ROWS, max_queue_delay_s=0.005)


def test_decide_waits_until_the_delay_is_over_when_company_is_expected() -> None:
    queue, now = waiting(DELAYED)
    decision = queue.decide(now)
    assert decision == Decision(wake_at_s=now + 0.005)
    assert items(queue.decide(decision.wake_at_s).batch) == [9]


def test_decide_counts_the_delay_from_the_oldest_when_others_have_come() -> None:
    queue, now = waiting(DELAYED)
    queue.offer(entry(10, arrival_s=now + 0.002), now + 0.002)
    assert queue.decide(now + 0.002).wake_at_s == pytest.approx(now + 0.005)


@pytest.mark.parametrize(
    ("queue", "now"),
    [
        pytest.param(*waiting(Limits(MAX_ROWS)), id="no delay is configured"),
        pytest.param(*waiting(DELAYED, gap_s=0.02), id="nobody is expected within the delay"),
        pytest.param(
            *waiting(DELAYED, times=PROPORTIONAL), id="a larger batch costs as much as two"
        ),
        pytest.param(
            *waiting(DELAYED, last=entry(9, arrival_s=0.01, target_s=0.0205)),
            id="the first can't afford it",
        ),
        pytest.param(
            *waiting(DELAYED, last=entry(9, arrival_s=0.01, target_s=0.015)),
            id="the first is late already",
        ),
        pytest.param(
            *waiting(DELAYED, last=entry(9, arrival_s=0.01, n_rows=MAX_ROWS)),
            id="the batch is full",
        ),
        pytest.param(
            *waiting(DELAYED, last=entry(9, arrival_s=0.001)), id="the delay is over"
        ),
    ],
)  # fmt: skip
def test_decide_runs_at_once_when(queue: BatchQueue[int], now: float) -> None:
    assert items(queue.decide(now).batch) == [9]


def test_decide_waits_no_longer_than_the_target_allows_when_the_delay_is_long() -> None:
    limits = Limits(MAX_ROWS, max_queue_delay_s=1.0)
    queue, now = waiting(limits, last=entry(9, arrival_s=0.01, target_s=0.05))
    wake_at_s = queue.decide(now).wake_at_s
    assert wake_at_s == pytest.approx(0.05 - TIMES.of(2))
    assert items(queue.decide(wake_at_s).batch) == [9]


def test_decide_runs_at_once_when_it_is_the_first_request_ever() -> None:
    assert items(filled([entry(1)], DELAYED).decide(0.0).batch) == [1]


# --- admission and leaving


def test_offer_refuses_when_the_queue_is_full_of_requests_in_time() -> None:
    queue = filled([entry(n) for n in range(3)], Limits(MAX_ROWS, max_queue_size=3))
    assert queue.offer(entry(9), 0.0) == (False, ())
    assert queue.n_requests == 3


def test_offer_evicts_the_longest_late_when_the_queue_is_full() -> None:
    late = [entry(n, target_s=0.001 * n) for n in (2, 1)]
    queue = filled([*late, entry(3)], Limits(MAX_ROWS, max_queue_size=3))
    admitted, evicted = queue.offer(entry(9, arrival_s=0.1), 0.1)
    assert admitted
    assert items(evicted) == [1]
    assert items(queue.decide(0.1).batch) == [3, 9, 2]


def test_offer_evicts_the_hopeless_when_the_queue_is_full() -> None:
    hopeless = [entry(n, deadline_s=0.02) for n in (1, 2)]
    queue = filled([*hopeless, entry(3)], Limits(MAX_ROWS, max_queue_size=3))
    admitted, evicted = queue.offer(entry(9), 0.1)
    assert admitted
    assert items(evicted) == [1, 2]
    assert queue.n_requests == 2


def test_cancel_removes_a_request_when_it_is_in_time() -> None:
    cancelled = entry(1, n_rows=3)
    queue = filled([cancelled, entry(2)])
    assert queue.cancel(cancelled)
    assert not queue.cancel(cancelled)
    assert (queue.n_requests, queue.n_rows) == (1, 1)


def test_cancel_removes_a_request_when_it_is_late_and_was_set_aside() -> None:
    cancelled = entry(1, n_rows=3, target_s=0.3)
    queue = filled([cancelled, entry(2, n_rows=6), entry(3, n_rows=6)])
    assert items(queue.decide(0.5).batch) == [2]  # no room for the late one beside it
    assert queue.cancel(cancelled)
    assert not queue.cancel(cancelled)
    assert items(queue.decide(0.5).batch) == [3]
    assert (queue.n_requests, queue.n_rows) == (0, 0)


def test_drain_returns_all_when_some_are_late() -> None:
    queue = filled([entry(1, target_s=0.01), *[entry(n, n_rows=MAX_ROWS) for n in (2, 3)]])
    assert items(queue.decide(0.5).batch) == [2]
    assert sorted(items(queue.drain())) == [1, 3]
    assert (queue.n_requests, queue.n_rows) == (0, 0)


def test_retry_after_grows_when_more_rows_wait() -> None:
    short, long = filled([entry(1)]), filled([entry(n) for n in range(40)])
    assert short.retry_after_s() == pytest.approx(TIMES.of(MAX_ROWS))
    assert long.retry_after_s() == pytest.approx(5 * TIMES.of(MAX_ROWS))


# --- properties over random traffic


@st.composite
def traffic(draw: st.DrawFn) -> list[Entry[int]]:
    """Requests with random gaps, rows, targets and deadlines, sorted by arrival."""
    seconds = st.floats(0.0, 0.05)
    slack = st.one_of(st.just(math.inf), st.floats(0.001, 0.2))
    shapes = draw(
        st.lists(
            st.tuples(seconds, st.integers(1, MAX_ROWS), slack, slack), min_size=1, max_size=60
        )
    )
    now, entries = 0.0, []
    for item, (gap_s, n_rows, target_s, deadline_s) in enumerate(shapes):
        now += gap_s
        entries.append(entry(item, now, n_rows, now + target_s, now + deadline_s))
    return entries


configurations = st.builds(
    Limits,
    max_batch_size=st.just(MAX_ROWS),
    max_queue_size=st.integers(1, 20),
    max_queue_delay_s=st.sampled_from([0.0, 0.0, 0.003, 0.05]),
    n_instances=st.integers(1, 3),
)
service_times = st.builds(
    ServiceTimes,
    sizes=st.just([1, 4, 8]),
    seconds=st.sampled_from([[0.01, 0.012, 0.02], [0.01, 0.04, 0.08], [0.001, 0.05, 0.05]]),
    padded=st.booleans(),
)


@settings(max_examples=300)
@given(traffic(), configurations, service_times)
def test_policy_keeps_its_promises_when_traffic_is_random(
    entries: list[Entry[int]], limits: Limits, times: ServiceTimes
) -> None:
    queue = policy(limits, times)
    outcome = simulate(entries, queue, times, limits.n_instances)
    # Nothing is lost, nothing answered twice.
    assert outcome.ends() == list(range(len(entries)))
    assert (queue.n_requests, queue.n_rows) == (0, 0)
    # Bounds.
    assert outcome.longest_queue <= limits.max_queue_size
    assert all(sum(e.n_rows for e in batch) <= MAX_ROWS for _, batch in outcome.batches)
    by_item = {e.item: e for e in entries}
    for now, decision in outcome.decisions:
        # Only what can't make its deadline is expired.
        assert all(now + times.of(e.n_rows) > e.deadline_s for e in decision.expired)
        # Waiting has an end in the future, is asked for, and nothing runs meanwhile.
        if decision.wake_at_s != math.inf:
            assert limits.max_queue_delay_s > 0
            assert decision.wake_at_s > now
            assert not decision.batch
    # A request is rejected or evicted only by a full queue.
    if outcome.longest_queue < limits.max_queue_size:
        assert not outcome.rejected
        assert not [n for n in outcome.evicted if by_item[n].deadline_s == math.inf]


@settings(max_examples=200)
@given(traffic(), service_times)
def test_policy_is_work_conserving_when_the_delay_is_zero(
    entries: list[Entry[int]], times: ServiceTimes
) -> None:
    queue = policy(Limits(MAX_ROWS), times)
    for given_entry in entries:
        queue.offer(given_entry, given_entry.arrival_s)
    now = entries[-1].arrival_s
    while queue.n_requests:
        before = queue.n_requests
        decision = queue.decide(now)
        assert decision.batch or decision.expired
        assert queue.n_requests == before - len(decision.batch) - len(decision.expired)
        now += 0.001


@settings(max_examples=200)
@given(traffic(), service_times)
def test_policy_runs_earliest_due_first_when_all_can_make_it(
    entries: list[Entry[int]], times: ServiceTimes
) -> None:
    for given_entry in entries:  # so far in the future that nothing is late
        given_entry.n_rows = 1
        given_entry.target_s += 1000.0
        given_entry.deadline_s += 1000.0
    queue = policy(Limits(MAX_ROWS), times)
    for given_entry in entries:
        queue.offer(given_entry, given_entry.arrival_s)
    served: list[Entry[int]] = []
    while queue.n_requests:
        served += queue.decide(entries[-1].arrival_s).batch
    dues = [min(e.target_s, e.deadline_s) for e in served]
    assert dues == sorted(dues)


# --- goodput


def poisson(rate_per_s: float, n: int, threshold_s: float, seed: int) -> list[Entry[int]]:
    source = random.Random(seed)
    now, entries = 0.0, []
    for item in range(n):
        now += source.expovariate(rate_per_s)
        entries.append(entry(item, now, target_s=now + threshold_s))
    return entries


@pytest.mark.parametrize("n_instances", [1, 2])
@pytest.mark.parametrize("threshold_s", [0.03, 0.06])
def test_policy_beats_fifo_on_goodput_when_overloaded_by_half(
    threshold_s: float, n_instances: int
) -> None:
    limits = Limits(MAX_ROWS, max_queue_size=256, n_instances=n_instances)
    capacity_per_s = n_instances * MAX_ROWS / TIMES.of(MAX_ROWS)
    entries = poisson(1.5 * capacity_per_s, 4000, threshold_s, seed=7)
    ours = simulate(entries, policy(limits, TIMES), TIMES, n_instances).n_in_time(entries)
    fifo = simulate(entries, Fifo(limits), TIMES, n_instances).n_in_time(entries)
    offered_s = entries[-1].arrival_s
    assert ours > 3 * fifo
    assert ours / offered_s > 0.75 * capacity_per_s  # most of what the engine can do is in time


def test_policy_answers_all_in_time_when_load_is_moderate() -> None:
    limits = Limits(MAX_ROWS)
    entries = poisson(0.5 * MAX_ROWS / TIMES.of(MAX_ROWS), 2000, 0.06, seed=3)
    outcome = simulate(entries, policy(limits, TIMES), TIMES)
    assert outcome.n_in_time(entries) > 0.99 * len(entries)


# --- service times


def test_service_times_interpolate_when_between_measured_sizes() -> None:
    times = ServiceTimes([1, 5, 9], [0.010, 0.018, 0.020])
    assert [times.of(n) for n in (1, 3, 5, 7, 9)] == pytest.approx(
        [0.010, 0.014, 0.018, 0.019, 0.020]
    )


def test_service_times_are_proportional_when_beyond_the_largest() -> None:
    assert ServiceTimes([2, 4], [0.01, 0.02]).of(12) == pytest.approx(0.06)


def test_service_times_take_the_smallest_measured_when_below_it() -> None:
    assert ServiceTimes([4, 8], [0.01, 0.02]).of(1) == 0.01


def test_service_times_round_up_when_padded() -> None:
    times = ServiceTimes([1, 4, 8], [0.01, 0.02, 0.03], padded=True)
    assert [times.of(n) for n in (1, 2, 4, 5, 8)] == [0.01, 0.02, 0.02, 0.03, 0.03]


def test_service_times_follow_what_is_observed_when_the_machine_is_slower() -> None:
    times = ServiceTimes([1, 8], [0.01, 0.02])
    for _ in range(300):
        times.observe(8, 0.04)
    assert times.of(8) == pytest.approx(0.04, rel=1e-3)
    assert times.of(1) == pytest.approx(0.02, rel=1e-3)


def test_service_times_bound_the_correction_when_one_batch_stalls() -> None:
    times = ServiceTimes([1], [0.01])
    times.observe(1, 1000.0)
    assert times.of(1) <= 0.01 * 1.5


@given(st.floats(0.0, 1.0), st.integers(1, 64), st.booleans())
def test_largest_within_is_the_last_that_fits_when_compared_with_a_scan(
    budget_s: float, limit: int, padded: bool
) -> None:
    times = ServiceTimes([1, 4, 16], [0.05, 0.1, 0.3], padded)
    fitting = [n for n in range(1, limit + 1) if times.of(n) <= budget_s]
    assert times.largest_within(budget_s, limit) == max(fitting, default=0)


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [
        pytest.param([], [], id="nothing is measured"),
        pytest.param([1, 2], [0.1], id="lengths differ"),
        pytest.param([2, 1], [0.1, 0.2], id="sizes fall"),
        pytest.param([1, 1], [0.1, 0.2], id="a size is repeated"),
        pytest.param([0, 1], [0.1, 0.2], id="a size is zero"),
        pytest.param([1], [0.0], id="a time is zero"),
    ],
)
def test_service_times_are_refused_when(sizes: list[int], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="want"):
        ServiceTimes(sizes, seconds)


# --- lanes: requests that can't share a run, and buckets that can


def in_lane(item: int, lane: object, arrival_s: float = 0.0, **changes: float) -> Entry[int]:
    made = entry(item, arrival_s, **changes)  # type: ignore[arg-type]
    made.lane = lane  # type: ignore[assignment]
    return made


# Short texts cost a fifth of long ones; a further row costs a tenth of the first.
SHORT = ServiceTimes([1, MAX_ROWS], [0.002, 0.0034])
LONG = ServiceTimes([1, MAX_ROWS], [0.010, 0.017])


def bucketed(entries: Sequence[Entry[int]], **limits: float) -> BatchQueue[int]:
    queue: BatchQueue[int] = BatchQueue(
        Limits(MAX_ROWS, **limits),  # type: ignore[arg-type]
        LONG,
        {32: SHORT, 128: LONG},
    )
    for one in entries:
        assert queue.offer(one, one.arrival_s) == (True, ())
    return queue


def test_policy_looks_past_other_shapes_when_it_fills_a_batch() -> None:
    """Interleaved shapes, the traffic that closes every batch at one request elsewhere."""
    queue = filled([in_lane(n, ("a", "b")[n % 2], n * 1e-6) for n in range(12)])
    first, second = queue.decide(0.001), queue.decide(0.002)
    assert (items(first.batch), first.lane) == ([0, 2, 4, 6, 8, 10], "a")
    assert (items(second.batch), second.lane) == ([1, 3, 5, 7, 9, 11], "b")
    assert queue.n_requests == 0


def test_policy_serves_the_most_urgent_shape_first_when_there_are_several() -> None:
    queue = filled([in_lane(1, "a", target_s=0.5), in_lane(2, "b", target_s=0.1), in_lane(3, "a")])
    assert items(queue.decide(0.0).batch) == [2]
    assert items(queue.decide(0.0).batch) == [1, 3]


def test_policy_never_mixes_shapes_when_they_are_no_buckets() -> None:
    queue = filled([in_lane(1, (3,)), in_lane(2, (4,))])
    assert items(queue.decide(0.0).batch) == [1]


def test_policy_takes_a_short_request_along_when_padding_it_is_cheaper_than_its_own_run() -> None:
    queue = bucketed([in_lane(1, 128), in_lane(2, 32)])
    decision = queue.decide(0.0)
    assert (items(decision.batch), decision.lane) == ([1, 2], 128)
    assert queue.n_requests == queue.n_rows == 0


def test_policy_leaves_short_requests_to_themselves_when_their_own_run_is_cheaper() -> None:
    """Six short rows cost 3 ms alone, and would make the long batch 6 ms longer."""
    queue = bucketed([in_lane(1, 128), *[in_lane(n, 32) for n in range(2, 8)]])
    assert items(queue.decide(0.0).batch) == [1]
    decision = queue.decide(0.0)
    assert (items(decision.batch), decision.lane) == (list(range(2, 8)), 32)


def test_policy_takes_nobody_along_when_they_would_be_late_by_it() -> None:
    queue = bucketed([in_lane(1, 128), in_lane(2, 32, target_s=0.0109)])
    assert items(queue.decide(0.0).batch) == [2]
    assert items(queue.decide(0.0).batch) == [1]
    queue = bucketed([in_lane(1, 128, target_s=0.0105), in_lane(2, 32, target_s=0.5)])
    assert items(queue.decide(0.0).batch) == [1]


def test_policy_runs_a_full_shape_when_a_more_urgent_one_waits_for_company() -> None:
    limits = Limits(2, max_queue_delay_s=0.1)
    queue = filled([in_lane(1, "a"), in_lane(2, "b", 0.001), in_lane(3, "b", 0.002)], limits)
    assert items(queue.decide(0.003).batch) == [2, 3]
    waiting = queue.decide(0.003)
    assert waiting.batch == ()
    assert waiting.wake_at_s == pytest.approx(0.1)


def test_policy_forgets_a_shape_when_its_last_request_has_left() -> None:
    """Clients choose shapes: what was must not stay."""
    queue = filled([])
    for n in range(1000):
        one = in_lane(n, (n,))
        queue.offer(one, 0.0)
        if n % 2:
            assert queue.cancel(one)
            assert not queue.cancel(one)
        else:
            assert items(queue.decide(0.0).batch) == [n]
    assert queue.n_requests == queue.n_rows == 0
    assert queue.retry_after_s() == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from([32, 128]),
            st.integers(1, MAX_ROWS),
            st.sampled_from([0.005, 0.02, 0.1, math.inf]),
        ),
        max_size=40,
    )
)
@settings(max_examples=200)
def test_policy_loses_and_doubles_no_request_when_buckets_mix(
    given_entries: list[tuple[int, int, float]],
) -> None:
    entries = [
        in_lane(n, lane, n_rows=rows, target_s=target)
        for n, (lane, rows, target) in enumerate(given_entries)
    ]
    queue = bucketed(entries)
    seen: list[int] = []
    now = 0.0
    while queue.n_requests:
        decision = queue.decide(now)
        assert decision.batch
        assert sum(one.n_rows for one in decision.batch) <= MAX_ROWS
        assert all(isinstance(one.lane, int) for one in decision.batch)
        assert max(one.lane for one in decision.batch) == decision.lane  # type: ignore[type-var]
        seen += items(decision.batch)
        now += 0.004
    assert sorted(seen) == list(range(len(entries)))
    assert queue.n_rows == 0


def test_policy_serves_every_shape_when_another_is_never_empty() -> None:
    """Without targets all are due at the same time: never."""
    queue = filled([in_lane(0, "a"), in_lane(1, "b", 0.001)])
    served: list[int] = []
    for turn in range(20):
        now = 0.002 + turn * 0.01
        queue.offer(in_lane(100 + turn, "a", now), now)
        served += items(queue.decide(now).batch)
        if 1 in served:
            break
    assert 1 in served[:3]


def test_policy_serves_a_shape_without_targets_when_one_with_targets_is_never_empty() -> None:
    queue = filled([in_lane(1, "b")])
    served: list[int] = []
    for turn in range(300):
        now = 0.01 * turn
        queue.offer(in_lane(100 + turn, "a", now, target_s=now + 0.2), now)
        served += items(queue.decide(now).batch)
        if 1 in served:
            break
    assert 1 in served
    assert now < 1.5
