"""Who watches a study: the protocol, and an observer that looks away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from optimizer.result import BudgetUsed, Variant


@dataclass(frozen=True)
class Standing:
    """How a study stands after a trial. `front` are the variants that no other beats in accuracy,
    latency and cost; `dropped` counts variants by the constraint or rung that ended them."""

    budget: BudgetUsed
    best: Variant | None
    front: Sequence[Variant]
    dropped: Mapping[str, int]


class Observer(Protocol):
    """Called from the study's own thread; what it raises ends the study."""

    def phase(self, name: str) -> None:
        """Something else begins."""

    def trial_began(self, max_trials: int, label: str) -> None: ...

    def trial_climbed(self, rung: int, name: str) -> None:
        """The running trial came to the rung of the ladder."""

    def step_told(self, message: str) -> None:
        """How far a long step of the running trial is, once in a second at most."""

    def trial_ended(self, variant: Variant, standing: Standing) -> None:
        """`standing.best` is the best variant so far that is predicted to keep the SLO."""

    def verification_began(self, variant: Variant, window_s: float) -> None: ...

    def note(self, message: str) -> None:
        """What a reader of the answer should know."""


class Silent:
    def phase(self, name: str) -> None: ...

    def trial_began(self, max_trials: int, label: str) -> None: ...

    def trial_climbed(self, rung: int, name: str) -> None: ...

    def step_told(self, message: str) -> None: ...

    def trial_ended(self, variant: Variant, standing: Standing) -> None: ...

    def verification_began(self, variant: Variant, window_s: float) -> None: ...

    def note(self, message: str) -> None: ...
