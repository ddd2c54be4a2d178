"""Progress of a study on a terminal: an observer that draws with rich.

It shows what it is told and decides nothing. Without a terminal it writes lines only.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from optimizer.observer import Standing
from optimizer.quantities import duration, milliseconds, number, percent
from optimizer.result import BudgetUsed, Variant
from optimizer.telling import Seldom
from optimizer.wording import explain, slo_latency_s

MAX_FRONT = 6
"""Rows of the front that are shown, where the terminal is high enough."""
_FIXED_LINES = 5
"""Of the panel, without the front: phase, step, budget, what is out, best."""
_LINE_EVERY_S = 30.0
"""How often a step has a line, where there is no terminal."""
_OTHER_LINES = _FIXED_LINES + 6
"""And the front's heading, and what of the log should stay in sight."""
_BAR_WIDTH = 20
_FRONT_WIDTH = 72
_REFRESHES_PER_S = 4


class Progress:
    """A line for each variant, and below them a panel: phase and rung, budget, what was dropped
    and why, the best so far, and the front. Without a terminal the lines only."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic, in seconds."""
        self._console = console
        self._panel = Panel(clock)
        self._seldom = Seldom(self._line_of_step, _LINE_EVERY_S, clock)
        self._live = Live(
            self._panel,
            console=console,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def phase(self, name: str) -> None:
        self._panel.phase(name)
        if not self._console.is_terminal:
            self._console.print(f"{name} …")

    def trial_began(self, max_trials: int, label: str) -> None:
        self._panel.trial_began(max_trials, label)

    def trial_climbed(self, rung: int, name: str) -> None:
        self._panel.trial_climbed(rung, name)

    def step_told(self, message: str) -> None:
        self._panel.step_told(message)
        if not self._console.is_terminal:
            self._seldom(message)

    def _line_of_step(self, message: str) -> None:
        self._console.print(Text(f"    {message}", style="dim"), soft_wrap=True)

    def trial_ended(self, variant: Variant, standing: Standing) -> None:
        self._panel.trial_ended(standing)
        self._console.print(_line(variant), soft_wrap=True)

    def verification_began(self, variant: Variant, window_s: float) -> None:
        message = f"  load test of {variant.label}, {window_s:g} s and its warm-up"
        self._console.print(Text(message), soft_wrap=True)

    def note(self, message: str) -> None:
        self._console.print(Text(f"note: {message}", style="yellow"), soft_wrap=True)


class Panel:
    """How the study stands, as rich draws it anew several times a second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase, self._phase_start_s = "", clock()
        self._trial, self._rung, self._step = "", "", ""
        self._max_trials = 0
        self._standing: Standing | None = None
        self._told_s = clock()
        """When the standing was told: the budget's time goes on since."""
        self._spinner = Spinner("dots")

    def phase(self, name: str) -> None:
        self._phase, self._phase_start_s = name, self._clock()
        self._trial, self._rung, self._step = "", "", ""

    def trial_began(self, max_trials: int, label: str) -> None:
        self._max_trials, self._trial, self._rung, self._step = max_trials, label, "", ""

    def trial_climbed(self, rung: int, name: str) -> None:
        self._rung, self._step = f"rung {rung}, {name}", ""

    def step_told(self, message: str) -> None:
        self._step = message

    def trial_ended(self, standing: Standing) -> None:
        self._standing, self._told_s, self._step = standing, self._clock(), ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Always of the same height for a terminal: while rich prints a line above, its other
        thread may draw the panel, and would leave a line behind if that had grown."""
        n_rows = max(0, min(MAX_FRONT, options.size.height - _OTHER_LINES))
        step = Text(f"  {self._step}", style="cyan", no_wrap=True, overflow="ellipsis")
        parts: list[RenderableType] = [self._head(), step]
        if self._standing is not None:
            standing = self._standing
            parts += [self._budget(standing.budget), _dropped(standing), _best(standing.best)]
            if n_rows and standing.front:
                parts.append(_front(standing, n_rows, options.max_width))
        lines = console.render_lines(Group(*parts), options, pad=False)
        height = _FIXED_LINES + (n_rows + 1 if n_rows else 0)
        for line in (lines + [[]] * height)[:height]:
            yield from line
            yield Segment.line()

    def _head(self) -> RenderableType:
        told = Text(self._phase, style="bold")
        told.append(f"  {duration(self._clock() - self._phase_start_s)}", style="dim not bold")
        if self._trial:
            trial = f"trial {self._n_trials() + 1} of {self._max_trials}"
            told.append(f"  {trial}: {self._trial}", style="not bold")
        if self._rung:
            told.append(f"  ({self._rung})", style="cyan not bold")
        grid = _line_of(2)
        grid.add_row(self._spinner, told)
        return grid

    def _n_trials(self) -> int:
        return self._standing.budget.trials if self._standing is not None else 0

    def _budget(self, budget: BudgetUsed) -> RenderableType:
        """The bar is of time or trials, whichever is nearer its end."""
        spent_s = budget.wall_clock_s + self._clock() - self._told_s
        shares = {
            f"trials, {budget.trials} of {budget.max_trials}": budget.trials / budget.max_trials,
            f"time, {duration(spent_s)} of {duration(budget.max_wall_clock_s)}": spent_s
            / budget.max_wall_clock_s,
        }
        nearer, further = sorted(shares, key=lambda name: -shares[name])
        share = min(1.0, shares[nearer])
        grid = _line_of(8, _BAR_WIDTH)
        told = Text(f"{share:4.0%} of {nearer}")
        told.append(f"  ({further})", style="dim")
        grid.add_row("  budget", ProgressBar(total=1.0, completed=share, width=_BAR_WIDTH), told)
        return grid


def _line_of(*widths: int) -> Table:
    """Cells of these widths, and one that takes what is left and is cut."""
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    for width in widths:
        grid.add_column(width=width, no_wrap=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    return grid


def _dropped(standing: Standing) -> Text:
    counts: Mapping[str, int] = standing.dropped
    n = sum(counts.values())
    line = Text(
        f"  {standing.budget.trials} trials done, {n} out", no_wrap=True, overflow="ellipsis"
    )
    if n:
        most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in most)
        line.append(f": {told}", style="dim")
    return line


def _best(best: Variant | None) -> Text:
    line = Text("  best so far: ", no_wrap=True, overflow="ellipsis")
    if best is None:
        return line.append("none is feasible yet", style="yellow")
    line.append(best.label, style="bold green")
    cost = best.serving.cost_per_million if best.serving else None
    return line.append(f", {number(cost)} per million, {milliseconds(slo_latency_s(best))} ms")


def _front(standing: Standing, n_rows: int, width: int) -> Table:
    """The cheapest of the front; what else there is, is counted."""
    ordered = sorted(standing.front, key=_cost)
    more = len(ordered) - n_rows
    title = f"  front, {n_rows} of {len(ordered)}" if more > 0 else "  front"
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.width = min(_FRONT_WIDTH, width)
    table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ("accuracy", "ms", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for variant in ordered[:n_rows]:
        is_best = standing.best is not None and variant.id == standing.best.id
        quality, serving = variant.quality, variant.serving
        table.add_row(
            Text(f"  {'★' if is_best else '·'} {variant.label}"),
            percent(quality.value) if quality else "–",
            milliseconds(slo_latency_s(variant)),
            number(serving.cost_per_million) if serving else "–",
            style="green" if is_best else "dim" if variant.reasons else "",
        )
    return table


def _cost(variant: Variant) -> tuple[float, str]:
    return (variant.serving.cost_per_million if variant.serving else float("inf"), variant.id)


def _line(variant: Variant) -> Text:
    line = Text("  ")
    if variant.reasons:
        line.append("✗ ", style="red")
        line.append(f"{variant.label}: ")
        line.append("; ".join(explain(reason) for reason in variant.reasons), style="dim")
        return line
    line.append("✓ ", style="green")
    line.append(variant.label)
    if variant.speedup is not None:
        line.append(f"  {variant.speedup.estimate:.2f}x", style="bold")
    if variant.quality is not None:
        line.append(f"  {variant.quality.value:.2%}", style="dim")
    return line
