"""Turns: one thread at a time, others while it waits, and an end for all when one fails."""

import threading
from collections.abc import Callable

import pytest

from optimizer.turns import Relay, Turns, at_once

PATIENCE_S = 60.0


def nothing() -> None: ...


def run(jobs: list[Callable[[], int]], turns: Turns, relay: Relay | None = None) -> list[int]:
    return at_once(jobs, turns, relay or Relay(), nothing)


def test_jobs_give_their_results_in_their_own_order_whichever_ends_first() -> None:
    turns, is_done = Turns(), threading.Event()

    def slow() -> int:
        with turns.lent():
            assert is_done.wait(PATIENCE_S)
        return 1

    def quick() -> int:
        is_done.set()
        return 2

    assert run([slow, quick], turns) == [1, 2]


def test_one_thread_is_at_work_at_a_time_but_for_what_it_lends_its_turn_for() -> None:
    turns = Turns()
    together = threading.Barrier(3)
    n_inside = highest = 0

    def job() -> int:
        nonlocal n_inside, highest
        for _ in range(200):
            n_inside += 1
            highest = max(highest, n_inside)
            n_inside -= 1
        with turns.lent():  # all of them, or the barrier breaks
            together.wait(PATIENCE_S)
        n_inside += 1
        highest = max(highest, n_inside)
        n_inside -= 1
        return 0

    run([job] * 3, turns)
    assert highest == 1


def test_thread_without_a_turn_has_none_after_it_lent_it() -> None:
    turns, n_taken = Turns(), 0

    def take() -> None:
        nonlocal n_taken
        with turns.taken():
            n_taken += 1

    with turns.lent(), turns.lent(), turns.taken(), turns.lent(), turns.taken():
        pass
    other = threading.Thread(target=take, daemon=True)
    other.start()
    other.join(timeout=10)
    assert n_taken == 1


def test_what_threads_tell_is_heard_in_the_thread_that_listens() -> None:
    relay, heard = Relay(), []

    def job() -> int:
        relay(lambda: heard.append(threading.get_ident()))
        return threading.get_ident()

    [ours] = run([job], Turns(), relay)
    assert ours != threading.get_ident()
    assert heard == [threading.get_ident()]


def test_others_are_stopped_and_waited_for_when_one_fails() -> None:
    turns, stopped, ended = Turns(), threading.Event(), threading.Event()

    def fails() -> int:
        raise ValueError("no store")

    def waits() -> int:
        with turns.lent():
            assert stopped.wait(PATIENCE_S)
        ended.set()
        raise RuntimeError("stopped")

    with pytest.raises(ValueError, match="no store"):
        at_once([waits, fails], turns, Relay(), stopped.set)
    assert ended.is_set()


def test_all_is_stopped_when_whoever_listens_raises() -> None:
    turns, relay, stopped = Turns(), Relay(), threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def tells() -> int:
        relay(interrupt)
        with turns.lent():
            assert stopped.wait(PATIENCE_S)
        return 0

    with pytest.raises(KeyboardInterrupt):
        at_once([tells], turns, relay, stopped.set)
