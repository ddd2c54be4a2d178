"""Progress of a study on a terminal: an observer that draws with rich."""

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console
from rich.text import Text

from optimizer.choice import value_of
from optimizer.observer import Standing
from optimizer.report import explain
from optimizer.result import Variant


class Progress:
    """Bars for the phases and a line for each variant; without a terminal the lines only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
        )
        self._task: progress.TaskID | None = None
        self._n_dropped = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def phase(self, name: str) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=None, detail="")
        if not self._console.is_terminal:
            self._console.print(f"{name} …")

    def trial_began(self, max_trials: int, label: str) -> None:
        assert self._task is not None
        self._bars.update(self._task, total=max_trials, detail=label)

    def trial_climbed(self, rung: int, name: str) -> None: ...

    def trial_ended(self, variant: Variant, standing: Standing) -> None:
        assert self._task is not None
        best = standing.best
        self._n_dropped += variant.status == "dropped"
        self._console.print(_line(variant), soft_wrap=True)
        detail = f"dropped {self._n_dropped}"
        if best is not None:
            detail += f", best {best.label} at {value_of(best, 'cost'):.3g} per million"
        self._bars.update(self._task, advance=1, detail=detail)

    def verification_began(self, variant: Variant, window_s: float) -> None:
        self._console.print(f"  load test of {variant.label}, {window_s:g} s and its warm-up")

    def note(self, message: str) -> None:
        self._console.print(Text(f"note: {message}", style="yellow"), soft_wrap=True)


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
