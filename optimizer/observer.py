"""Who watches a study: the protocol, and an observer that looks away."""

from typing import Protocol

from optimizer.result import Variant


class Observer(Protocol):
    """Called from the study's own thread; what it raises ends the study."""

    def phase(self, name: str) -> None:
        """Something else begins."""

    def trial_began(self, max_trials: int, label: str) -> None: ...

    def trial_ended(self, variant: Variant, best: Variant | None) -> None:
        """`best` is the best variant so far that is predicted to keep the SLO."""

    def verification_began(self, variant: Variant, window_s: float) -> None: ...

    def note(self, message: str) -> None:
        """What a reader of the answer should know."""


class Silent:
    def phase(self, name: str) -> None: ...

    def trial_began(self, max_trials: int, label: str) -> None: ...

    def trial_ended(self, variant: Variant, best: Variant | None) -> None: ...

    def verification_began(self, variant: Variant, window_s: float) -> None: ...

    def note(self, message: str) -> None: ...
