"""Slots: several executors as one; a step is built once, and a lost executor costs nothing."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from optimizer.errors import TechniqueFailed
from optimizer.execution import Executor, ExecutorLost, Json, NoExecutor
from optimizer.execution.slots import MAX_LOST, Slots
from optimizer.measuring import Measurer
from optimizer.measuring.local import LocalMeasurer
from optimizer.turns import Relay, Turns, at_once

PATIENCE_S = 60.0
Act = Callable[[Json], Json]


@dataclass(eq=False)
class Acting:
    """An executor that does as it is told, and remembers what it was asked."""

    act: Act
    asked: list[Json] = field(default_factory=list)
    n_started: int = 0
    n_closed: int = 0
    measurer: Measurer = field(default_factory=LocalMeasurer)

    def start(self) -> None:
        self.n_started += 1

    def build(self, call: str, arguments: Json) -> Json:
        self.asked.append(arguments)
        return self.act(arguments)

    def close(self) -> None:
        self.n_closed += 1


def recipe(*names: str) -> Json:
    return {"recipe": [[name, {}] for name in names]}


def last(arguments: Json) -> str:
    return str(arguments["recipe"][-1][0])


def lost(_arguments: Json) -> Json:
    raise ExecutorLost("node 7 is gone")


def gone(_arguments: Json) -> Json:
    raise NoExecutor("no node has room")


def run(slots: Slots, turns: Turns, recipes: Sequence[Json]) -> list[Json]:
    jobs = [lambda one=one: slots.build("build", one) for one in recipes]  # type: ignore[misc]
    return at_once(jobs, turns, Relay(), slots.stop)


def test_calls_are_under_way_at_the_same_time_in_as_many_executors_as_there_are() -> None:
    together, turns = threading.Barrier(2), Turns()

    def act(arguments: Json) -> Json:
        together.wait(PATIENCE_S)
        return last(arguments)

    executors: list[Executor] = [Acting(act), Acting(act)]
    answers = run(Slots(executors, turns), turns, [recipe("a"), recipe("b")])
    assert answers == ["a", "b"]


def test_step_that_recipes_share_is_built_once_and_each_call_answers_for_its_last() -> None:
    turns = Turns()
    executors = [Acting(last) for _ in range(3)]
    recipes = [recipe("prune", "export", one) for one in ("x", "y", "z")]
    assert run(Slots(executors, turns), turns, recipes) == ["x", "y", "z"]
    n_steps = [len(one["recipe"]) for executor in executors for one in executor.asked]
    assert sorted(n_steps) == [1, 2, 3, 3, 3]


def test_step_that_failed_fails_for_all_that_begin_with_it_and_isnt_tried_again() -> None:
    turns = Turns()

    def act(arguments: Json) -> Json:
        raise TechniqueFailed(last(arguments), "no memory")

    executors = [Acting(act), Acting(act)]
    slots = Slots(executors, turns)
    for one in (recipe("prune", "export"), recipe("prune", "tune", "export")):
        with pytest.raises(TechniqueFailed, match="prune failed: no memory"):
            slots.build("build", one)
    assert sum(len(executor.asked) for executor in executors) == 1


def test_call_is_made_again_by_another_when_its_executor_is_lost() -> None:
    told: list[str] = []
    failing = iter([lost])
    first = Acting(lambda arguments: next(failing, last)(arguments))
    slots = Slots([first, Acting(last)], Turns(), told.append)
    assert slots.build("build", recipe("prune")) == "prune"
    assert told == ["node 7 is gone"]
    assert slots.build("option", {"technique": "prune", **recipe("export")}) == "export"


def test_call_is_taken_for_the_cause_when_it_loses_one_executor_after_the_other() -> None:
    executor = Acting(lost)
    with pytest.raises(TechniqueFailed, match=r"prune failed: 3 that built it .* node 7 is gone"):
        Slots([executor], Turns()).build("build", recipe("prune"))
    assert len(executor.asked) == MAX_LOST


def test_executor_that_cant_be_had_is_given_up_while_there_are_others() -> None:
    told: list[str] = []
    first, second = Acting(gone), Acting(last)
    slots = Slots([first, second], Turns(), told.append)
    assert [slots.build("build", recipe(one)) for one in "ab"] == ["a", "b"]
    assert (len(first.asked), first.n_closed, told) == (1, 1, ["no node has room"])


def test_study_cant_go_on_when_no_executor_can_be_had() -> None:
    slots = Slots([Acting(gone), Acting(gone)], Turns())
    for _ in range(2):
        with pytest.raises(NoExecutor):
            slots.build("build", recipe("prune"))


def test_calls_fail_after_stop_and_start_nothing() -> None:
    executor = Acting(last)
    slots = Slots([executor], Turns())
    slots.stop()
    with pytest.raises(NoExecutor, match="stopped"):
        slots.build("build", recipe("prune"))
    assert executor.asked == []
    assert executor.n_closed == 1


def test_only_the_first_is_started_before_it_is_needed() -> None:
    executors = [Acting(last), Acting(last)]
    Slots(executors, Turns()).start()
    assert [executor.n_started for executor in executors] == [1, 0]
