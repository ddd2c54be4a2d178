"""What a study's progress looks like."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from rich.console import Console

from optimizer.observer import Standing
from optimizer.progress import Panel, Progress
from optimizer.result import BudgetUsed, Variant
from tests.optimizer.study_result import met

ROWS = met().variants


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def standing(
    n_trials: int = 12, spent_s: float = 60.0, front: Sequence[Variant] = ROWS[:5]
) -> Standing:
    budget = BudgetUsed(spent_s, 3600.0, n_trials, 50)
    return Standing(budget, ROWS[4], front, {"latency": 2, "accuracy_drop": 5})


def console(width: int = 100, height: int = 30, is_terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=is_terminal)


def drawn(panel: Panel, on: Console) -> list[str]:
    on.print(panel)
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue().splitlines()


def searching(clock: Clock, told: Standing | None) -> Panel:
    panel = Panel(clock)
    panel.phase("searching")
    panel.trial_began(50, "openvino int8")
    panel.trial_climbed(1, "timing")
    if told is not None:
        panel.trial_ended(told)
    return panel


def test_panel_shows_phase_rung_budget_reasons_best_and_front() -> None:
    clock = Clock()
    panel = searching(clock, standing())
    clock.now_s += 42

    head, step, budget, out, best, *front = drawn(panel, console())

    assert "searching  42 s  trial 13 of 50: openvino int8  (rung 1, timing)" in head
    assert not step.strip()
    assert "24% of trials, 12 of 50  (time, 102 s of 60 min)" in budget
    assert "12 trials done, 7 out: accuracy drop 5, latency 2" in out
    assert "best so far: openvino int8 (percentile), 0.0546 per million, 13.4 ms" in best
    assert front[1].split() == ["★", "openvino", "int8", "(percentile)", "93.86%", "13.4", "0.0546"]


def test_bar_is_of_what_is_nearer_its_end() -> None:
    clock = Clock()
    panel = searching(clock, standing(n_trials=1, spent_s=1800.0))
    clock.now_s += 7200

    assert "100% of time, 2.5 h of 60 min  (trials, 1 of 50)" in drawn(panel, console())[2]


def test_panel_says_so_when_nothing_is_feasible_yet() -> None:
    panel = searching(Clock(), Standing(BudgetUsed(1.0, 10.0, 1, 50), None, (), {}))

    _, _, _, out, best, *_ = drawn(panel, console())

    assert out.strip() == "1 trials done, 0 out"
    assert "none is feasible yet" in best


def test_panel_shows_how_far_a_step_is_until_another_begins() -> None:
    panel = searching(Clock(), None)
    panel.step_told("epoch 3.4 of 20, loss 0.52")
    assert "epoch 3.4 of 20, loss 0.52" in drawn(panel, console())[1]
    panel.trial_climbed(2, "building")
    assert not drawn(panel, console())[1].strip()


def test_step_has_a_line_in_half_a_minute_when_there_is_no_terminal() -> None:
    clock, plain = Clock(), console()
    with Progress(plain, clock) as progress:
        for epoch in range(90):
            progress.step_told(f"epoch {epoch} [of] 90")
            clock.now_s += 1.0

    assert isinstance(plain.file, io.StringIO)
    assert plain.file.getvalue().splitlines() == [
        f"    epoch {epoch} [of] 90" for epoch in (0, 30, 60)
    ]


@pytest.mark.parametrize(("height", "n_rows"), [(30, 5), (13, 2), (10, 0)])
def test_front_is_as_long_as_the_terminal_allows(height: int, n_rows: int) -> None:
    lines = drawn(searching(Clock(), standing()), console(height=height))

    assert sum("%" in line for line in lines[5:]) == n_rows
    assert len(lines) < height


def test_panel_keeps_its_height_when_the_front_grows() -> None:
    few, many = standing(front=ROWS[:1]), standing(front=ROWS[:7])

    heights = {len(drawn(searching(Clock(), told), console())) for told in (None, few, many)}

    assert len(heights) == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal(width: int) -> None:
    lines = drawn(searching(Clock(), standing()), console(width=width))

    assert all(len(line) <= width for line in lines)


def test_progress_writes_lines_only_when_there_is_no_terminal() -> None:
    plain = console()
    with Progress(plain, Clock()) as progress:
        progress.phase("searching")
        progress.trial_began(50, "openvino int8")
        progress.trial_climbed(1, "timing")
        progress.trial_ended(ROWS[4], standing())
        progress.trial_ended(ROWS[2], standing())
        progress.verification_began(ROWS[4], 30.0)
        progress.note("noisy [here]")

    assert isinstance(plain.file, io.StringIO)
    assert plain.file.getvalue().splitlines() == [
        "searching …",
        "  ✓ openvino int8 (percentile)  2.94x  93.86%",
        "  ✗ onnxruntime int8 (minmax): accuracy may be 2.13 points lower, allowed are 1.00 "
        "(by its upper bound at 95%)",
        "  load test of openvino int8 (percentile), 30 s and its warm-up",
        "note: noisy [here]",
    ]


def test_progress_draws_the_panel_below_the_lines_when_there_is_a_terminal() -> None:
    terminal = console(is_terminal=True)
    with Progress(terminal, Clock()) as progress:
        progress.phase("searching")
        progress.trial_began(50, "openvino int8")
        progress.trial_ended(ROWS[4], standing())

    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    assert "12 trials done, 7 out" in text
    assert text.index("2.94x") < text.rindex("best so far")
