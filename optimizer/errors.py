"""What can go wrong in the optimizer: one leaf for each decision of the caller.

How a study ends (feasible, infeasible, out of budget) is an outcome and no error.
"""

from collections.abc import Sequence


class OptimizerError(Exception):
    """Base of every error that the optimizer raises on purpose."""


class SpecInvalid(OptimizerError):
    """The spec, or a file that it names, can't be used: its author has to change it.

    `problems` are complete messages, one each, in the form `file:line: key: got …, want …` where
    there is a line to name; `str()` joins them by newlines.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.source = source
        self.problems = tuple(problems)


class TechniqueNotApplicable(OptimizerError):
    """A technique can't work on this model or target; `reason` is shown to the user."""

    def __init__(self, technique: str, reason: str) -> None:
        super().__init__(f"{technique} is not applicable: {reason}")
        self.technique = technique
        self.reason = reason


class TechniqueFailed(OptimizerError):
    """A technique accepted the model and then failed: the trial is lost, the study goes on."""

    def __init__(self, technique: str, cause: BaseException | str) -> None:
        shown = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"{technique} failed: {shown}")
        self.technique = technique
        self.cause = cause


class ParityMismatch(OptimizerError):
    """Two forms of a model that must compute the same don't: neither may be served.

    `what` names the two forms, `max_difference` is the largest absolute difference of outputs.
    """

    def __init__(self, what: str, batch_size: int, max_difference: float, tolerance: float) -> None:
        super().__init__(
            f"{what}: outputs differ by {max_difference:.3g} at batch size {batch_size}, "
            f"want at most {tolerance:.3g}"
        )
        self.what = what
        self.batch_size = batch_size
        self.max_difference = max_difference
        self.tolerance = tolerance


class MeasurerUnavailable(OptimizerError):
    """The target that measures can't be reached or refused: the study can't go on."""

    def __init__(self, target: str, problem: str) -> None:
        super().__init__(f"{target}: {problem}")
        self.target = target
        self.problem = problem
