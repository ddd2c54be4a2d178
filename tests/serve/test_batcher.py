"""The batcher: threads, answers and failures, with an engine that waits at gates."""

import math
import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from serve.batch_policy import BatchQueue, Entry, Limits, ServiceTimes
from serve.batcher import Batch, Batcher, Completion, Work
from serve.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    ServeError,
    ShuttingDown,
)
from serve.padding import CutOutput, PaddedInput, Padding
from tests.serve.fake_engine import PATIENCE_S, POISON, REFUSED, FakeEngine


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A batcher with its engines; `deliver` collects batches."""

    def __init__(
        self,
        limits: Limits,
        engines: list[FakeEngine],
        padding: Padding | None = None,
        fixed_shapes: bool = False,
    ) -> None:
        self.clock = Clock()
        self.padding = padding
        self.engines = engines
        self._batches: queue.Queue[Batch] = queue.Queue()
        times = ServiceTimes([1, limits.max_batch_size + 1], [0.010, 0.011])
        self.batcher = Batcher(
            ("fake", "1"),
            engines,
            BatchQueue(limits, times),
            self._batches.put,
            padding=padding,
            fixed_shapes=fixed_shapes,
            clock=self.clock,
        )
        self.batcher.start()

    def entry(self, values: list[list[float]], deadline_s: float = math.inf) -> Entry[Work]:
        x = np.array(values, np.float32)
        return Entry(
            Work({"x": x}, len(x), context=None, length=x.shape[1]),
            len(x),
            self.clock.now,
            deadline_s=deadline_s,
            lane=self.lane_of(x.shape[1]),
        )

    def lane_of(self, length: int) -> object:
        return self.padding.bucket_of(length) if self.padding else (length,)

    def submit(self, values: list[list[float]], deadline_s: float = math.inf) -> Entry[Work]:
        entry = self.entry(values, deadline_s)
        self.batcher.submit(entry)
        return entry

    def next_batch(self) -> Batch:
        return self._batches.get(timeout=PATIENCE_S)

    def completions(self, n: int) -> dict[int, Completion]:
        """The next `n` completions by the identity of their work."""
        done: dict[int, Completion] = {}
        while len(done) < n:
            for completion in self.next_batch().completions:
                assert id(completion.work) not in done
                done[id(completion.work)] = completion
        return done

    def occupy(self) -> Entry[Work]:
        """Make the (gated) engine busy with a request of its own."""
        entry = self.submit([[0.5]])
        self.engines[0].wait_until_running()
        return entry


@pytest.fixture
def bench() -> Iterator[Bench]:
    """One gated instance, batches of up to 4 rows, a queue of 6 requests."""
    made = Bench(Limits(max_batch_size=4, max_queue_size=6), [FakeEngine(gated=True)])
    yield made
    made.engines[0].open(100)
    made.batcher.close()


def test_batcher_answers_with_the_engines_numbers_when_one_request_comes(bench: Bench) -> None:
    entry = bench.submit([[1.0, 2.0]])
    bench.engines[0].open()
    batch = bench.next_batch()
    (completion,) = batch.completions
    assert completion.work is entry.item
    assert completion.error is None
    np.testing.assert_array_equal(completion.outputs["y"], [[2.0, 4.0]])
    assert (batch.n_rows, batch.reason) == (1, "drained")


def test_batcher_runs_requests_together_when_they_wait_behind_a_busy_engine(bench: Bench) -> None:
    bench.occupy()
    entries = [bench.submit([[float(n)], [float(n) + 0.5]]) for n in range(1, 3)]
    bench.engines[0].open(2)
    done = bench.completions(3)
    assert bench.engines[0].shapes == [(1, 1), (4, 1)]
    for n, entry in enumerate(entries, start=1):
        completion = done[id(entry.item)]
        assert completion.timing.batch_rows == 4
        np.testing.assert_array_equal(completion.outputs["y"], [[2.0 * n], [2.0 * n + 1]])


def test_batcher_never_exceeds_the_batch_size_when_more_rows_wait(bench: Bench) -> None:
    bench.occupy()
    for _ in range(6):
        bench.submit([[1.0], [2.0], [3.0]])
    bench.engines[0].open(7)
    bench.completions(7)
    assert bench.engines[0].shapes == [(1, 1)] + [(3, 1)] * 6


def test_batcher_groups_rows_by_shape_when_lengths_are_mixed(bench: Bench) -> None:
    bench.occupy()
    rows = [[1.0], [1.0, 2.0], [3.0], [4.0, 5.0]]
    entries = [bench.submit([row]) for row in rows]
    bench.engines[0].open(3)
    done = bench.completions(5)
    assert bench.engines[0].shapes == [(1, 1), (2, 1), (2, 2)]
    for row, entry in zip(rows, entries, strict=True):
        np.testing.assert_array_equal(done[id(entry.item)].outputs["y"], [np.array(row) * 2])


def test_batcher_pads_requests_into_one_run_when_their_lengths_differ() -> None:
    padding = Padding((PaddedInput("x", value=7),), (2, 4), (CutOutput("y"),))
    bench = Bench(Limits(max_batch_size=8), [FakeEngine(gated=True)], padding)
    bench.occupy()
    rows = [[1.0, 2.0, 3.0], [1.0], [4.0, 5.0, 6.0, 7.0], [2.0, 3.0]]
    entries = [bench.submit([row]) for row in rows]
    bench.engines[0].open(5)
    done = bench.completions(5)
    bench.batcher.close()
    assert bench.engines[0].shapes == [(1, 1), (4, 4)]  # both buckets take equally long here
    for row, entry in zip(rows, entries, strict=True):
        np.testing.assert_array_equal(done[id(entry.item)].outputs["y"], [np.array(row) * 2])


@pytest.mark.parametrize(
    ("fixed_shapes", "length"),
    [
        pytest.param(True, 4, id="the bucket where the engine has fixed shapes"),
        pytest.param(False, 3, id="the longest of the batch where it takes any"),
    ],
)
def test_batcher_pads_to(fixed_shapes: bool, length: int) -> None:
    padding = Padding((PaddedInput("x"),), (4,), (CutOutput("y"),))
    bench = Bench(Limits(max_batch_size=8), [FakeEngine(gated=True)], padding, fixed_shapes)
    bench.occupy()
    for row in ([1.0, 2.0, 3.0], [1.0]):
        bench.submit([row])
    bench.engines[0].open(5)
    bench.completions(3)
    bench.batcher.close()
    assert bench.engines[0].shapes[-1] == (2, length)


def test_batcher_halves_a_failing_batch_when_it_looks_for_the_culprit() -> None:
    """One bad request of eight costs its neighbours a few runs, not one each."""
    bench = Bench(Limits(max_batch_size=8, max_queue_size=20), [FakeEngine(gated=True)])
    bench.occupy()
    entries = [bench.submit([[POISON if n == 2 else float(n)]]) for n in range(8)]
    bench.engines[0].open(100)
    done = bench.completions(9)
    bench.batcher.close()
    assert [shape[0] for shape in bench.engines[0].shapes] == [1, 8, 4, 2, 2, 1, 1, 4]
    failed = [n for n, entry in enumerate(entries) if done[id(entry.item)].error is not None]
    assert failed == [2]


def test_batcher_says_where_the_time_went_when_a_batch_is_done(bench: Bench) -> None:
    entry = bench.submit([[1.0]])
    bench.engines[0].wait_until_running()
    bench.clock.now += 0.25
    bench.engines[0].open()
    timing = bench.completions(1)[id(entry.item)].timing
    assert (timing.phases.assemble_s, timing.phases.execute_s) == (0, 0.25)
    assert timing.phases.total_s == 0.25


def test_batcher_runs_each_request_alone_when_the_model_has_no_batch_axis() -> None:
    bench = Bench(Limits(max_batch_size=1), [FakeEngine(gated=True)])
    bench.occupy()
    for _ in range(3):
        bench.submit([[1.0], [2.0]])
    bench.engines[0].open(4)
    bench.completions(4)
    bench.batcher.close()
    assert bench.engines[0].shapes == [(1, 1), (2, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        pytest.param(POISON, EngineFailed, id="the engine fails on it"),
        pytest.param(REFUSED, InvalidRequest, id="the engine refuses its values"),
    ],
)
def test_batcher_fails_only_the_culprit_when_a_batch_raises(
    bench: Bench, value: float, error: type[ServeError]
) -> None:
    bench.occupy()
    good = [bench.submit([[1.0]]), bench.submit([[2.0]])]
    bad = bench.submit([[value]])
    bench.engines[0].open(100)
    done = bench.completions(4)
    assert type(done[id(bad.item)].error) is error
    assert "secret" not in str(done[id(bad.item)].error)
    for n, entry in enumerate(good, start=1):
        assert done[id(entry.item)].error is None
        np.testing.assert_array_equal(done[id(entry.item)].outputs["y"], [[2.0 * n]])


def test_batcher_serves_the_next_request_when_the_engine_has_failed(bench: Bench) -> None:
    bench.engines[0].open(100)
    bad = bench.submit([[POISON]])
    assert isinstance(bench.completions(1)[id(bad.item)].error, EngineFailed)
    good = bench.submit([[1.0]])
    assert bench.completions(1)[id(good.item)].error is None


def test_batcher_refuses_with_queue_full_when_the_queue_holds_its_limit(bench: Bench) -> None:
    bench.occupy()
    for _ in range(6):
        bench.submit([[1.0]])
    with pytest.raises(QueueFull) as caught:
        bench.submit([[1.0]])
    assert caught.value.limit == 6
    assert caught.value.retry_after_s > 0
    bench.engines[0].open(100)
    assert len(bench.completions(7)) == 7


def test_batcher_forgets_a_request_when_it_is_cancelled_in_the_queue(bench: Bench) -> None:
    running = bench.occupy()
    kept, cancelled = bench.submit([[1.0]]), bench.submit([[2.0]])
    assert bench.batcher.cancel(cancelled)
    assert not bench.batcher.cancel(cancelled)
    assert not bench.batcher.cancel(running)
    assert bench.batcher.n_queued == 1
    bench.engines[0].open(2)
    assert bench.completions(2).keys() == {id(running.item), id(kept.item)}


def test_batcher_expires_a_request_when_its_deadline_passes_in_the_queue(bench: Bench) -> None:
    bench.occupy()
    hopeless = bench.submit([[1.0]], deadline_s=bench.clock.now + 0.5)
    patient = bench.submit([[2.0]], deadline_s=bench.clock.now + 50)
    bench.clock.now += 1.0
    bench.engines[0].open(2)
    done = bench.completions(3)
    error = done[id(hopeless.item)].error
    assert isinstance(error, DeadlineExceeded)
    assert (error.phase, error.waited_s) == ("queue", 1.0)
    assert done[id(patient.item)].error is None


def test_batcher_evicts_with_the_true_reason_when_a_late_request_makes_room(bench: Bench) -> None:
    bench.occupy()
    late = bench.entry([[1.0]])
    late.target_s = bench.clock.now + 0.5
    bench.batcher.submit(late)
    for _ in range(5):
        bench.submit([[1.0]])
    bench.clock.now += 1.0
    bench.submit([[2.0]])
    (evicted,) = bench.next_batch().completions
    assert evicted.work is late.item
    assert isinstance(evicted.error, QueueFull)  # it never had a deadline


def test_batcher_says_that_the_queue_is_full_when_the_evicted_could_still_make_its_deadline(
    bench: Bench,
) -> None:
    bench.occupy()
    late = bench.entry([[1.0]], deadline_s=bench.clock.now + 3600)
    late.target_s = bench.clock.now + 0.5
    bench.batcher.submit(late)
    for _ in range(5):
        bench.submit([[1.0]])
    bench.clock.now += 1.0
    bench.submit([[2.0]])
    (evicted,) = bench.next_batch().completions
    assert isinstance(evicted.error, QueueFull)


def test_batcher_admits_all_pieces_or_none_when_there_are_several(bench: Bench) -> None:
    bench.occupy()
    for _ in range(4):
        bench.submit([[1.0]])
    with pytest.raises(QueueFull):
        bench.batcher.submit_all([bench.entry([[2.0]]) for _ in range(3)])
    assert bench.batcher.n_queued == 4
    bench.batcher.submit_all([bench.entry([[2.0]]) for _ in range(2)])
    assert bench.batcher.n_queued == 6
    bench.engines[0].open(100)
    assert len(bench.completions(7)) == 7


def test_batcher_finishes_what_was_admitted_when_it_closes(bench: Bench) -> None:
    bench.occupy()
    for _ in range(5):
        bench.submit([[1.0]])
    closer = threading.Thread(target=bench.batcher.close)
    closer.start()
    bench.engines[0].open(100)
    assert all(c.error is None for c in bench.completions(6).values())
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    with pytest.raises(ShuttingDown):
        bench.submit([[1.0]])


def test_batcher_gives_up_the_queue_when_it_closes_without_finishing(bench: Bench) -> None:
    running = bench.occupy()
    queued = [bench.submit([[1.0]]), bench.submit([[2.0]], deadline_s=bench.clock.now + 1)]
    closer = threading.Thread(target=bench.batcher.close, args=(False,))
    closer.start()
    given_up = bench.next_batch().completions
    assert {id(completion.work) for completion in given_up} == {id(e.item) for e in queued}
    assert all(isinstance(completion.error, ShuttingDown) for completion in given_up)
    bench.engines[0].open()
    assert bench.completions(1)[id(running.item)].error is None
    closer.join(PATIENCE_S)
    assert not closer.is_alive()


def test_batcher_closes_at_once_when_it_was_never_started() -> None:
    times = ServiceTimes([1], [0.01])
    batcher = Batcher(
        ("fake", "1"), [FakeEngine()], BatchQueue(Limits(1), times), lambda batch: None
    )
    batcher.close()


def test_batcher_uses_every_instance_when_all_are_free() -> None:
    engines = [FakeEngine(gated=True), FakeEngine(gated=True)]
    bench = Bench(Limits(max_batch_size=1, n_instances=2), engines)
    bench.submit([[1.0]])
    bench.submit([[2.0]])
    for engine in engines:
        engine.wait_until_running()
    for engine in engines:
        engine.open()
    bench.completions(2)
    bench.batcher.close()
    assert [engine.shapes for engine in engines] == [[(1, 1)], [(1, 1)]]


def test_batcher_answers_each_request_once_when_many_threads_submit() -> None:
    engines = [FakeEngine(), FakeEngine()]
    bench = Bench(Limits(max_batch_size=8, max_queue_size=10_000, n_instances=2), engines)
    entries: dict[int, tuple[Entry[Work], float]] = {}

    def submit(first: int) -> None:
        for n in range(first, first + 250):
            entry = bench.entry([[float(n)]])
            entries[id(entry.item)] = (entry, float(n))
            bench.batcher.submit(entry)

    threads = [threading.Thread(target=submit, args=(start * 250,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = bench.completions(1000)
    bench.batcher.close()
    assert done.keys() == entries.keys()
    for key, (_, value) in entries.items():
        assert done[key].outputs["y"].item() == 2 * value
    assert max(shape[0] for engine in engines for shape in engine.shapes) <= 8
