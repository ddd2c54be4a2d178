"""What is done to a server while it is measured, and what it may lose by that.

A versioned YAML document given by `--chaos`. Knows what may be written, not how it is done.
"""

from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from loadtest.document import Strict, read_document
from loadtest.slo import PositiveFloat

MAX_ACTIONS = 100
MAX_LATE_S = 1.0
"""An action that begins later than that after its time has failed."""

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
LimitSeconds = Annotated[float, Field(gt=0, le=600, allow_inf_nan=False)]
Argv = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(min_length=1, max_length=100, strict=False),
]


class Objectives(Strict):
    """Judged for each action by itself."""

    max_recovery_s: PositiveFloat
    max_lost: int | None = Field(default=None, ge=0)
    """none: lost requests are shown, not judged"""
    hold_s: PositiveFloat = 5.0
    """how long the objective's quantile must be kept for the server to have recovered"""


class Timed(Strict):
    at_s: float = Field(ge=0, le=86_400, allow_inf_nan=False)
    """from the window's start"""

    @property
    def lasts_s(self) -> float:
        return 0.0


class OnProcess(Timed):
    """Done to one process of this machine and this user."""

    pid: int | None = Field(default=None, ge=2)
    pid_file: str | None = Field(default=None, min_length=1)
    """read when the action begins, so that it may name another process each time"""
    any_process: bool = False
    """also one that doesn't listen on a target's address"""

    @model_validator(mode="after")
    def _process_is_named_once(self) -> Self:
        if (self.pid is None) == (self.pid_file is None):
            given = "neither" if self.pid is None else "both"
            raise ValueError(f"want one of pid and pid_file, not {given}")
        return self

    @property
    def process(self) -> str:
        """For people: "process 17", "server.pid"."""
        return f"process {self.pid}" if self.pid_file is None else self.pid_file


class Kill(OnProcess):
    """SIGKILL: what the process was doing is lost."""

    kind: Literal["kill"]


class Stop(OnProcess):
    """SIGTERM: the process may finish what it has."""

    kind: Literal["stop"]
    within_s: LimitSeconds = 30.0
    """a process that takes longer to end fails the action"""


class Pause(OnProcess):
    """SIGSTOP, and SIGCONT after `for_s`."""

    kind: Literal["pause"]
    for_s: Seconds

    @property
    def lasts_s(self) -> float:
        return self.for_s


class Slow(OnProcess):
    """Paused and resumed many times a second, so that the process gets `share` of its time."""

    kind: Literal["slow"]
    for_s: Seconds
    share: float = Field(ge=0.05, le=0.95)

    @property
    def lasts_s(self) -> float:
        return self.for_s


class Command(Timed):
    """A program is run, for servers elsewhere; and after `for_s` the one that undoes it."""

    kind: Literal["command"]
    command: Argv
    """program and arguments; no shell reads them"""
    undo: Argv | None = None
    for_s: Seconds | None = None
    """between the starts of both"""
    timeout_s: LimitSeconds = 30.0
    """of each"""

    @model_validator(mode="after")
    def _undo_has_its_time(self) -> Self:
        if (self.undo is None) != (self.for_s is None):
            raise ValueError("want both undo and for_s, or neither")
        return self

    @property
    def process(self) -> str:
        return " ".join(self.command)

    @property
    def lasts_s(self) -> float:
        return self.for_s or 0.0


AnyAction = Annotated[Kill | Stop | Pause | Slow | Command, Field(discriminator="kind")]


class ChaosProfile(Strict):
    api_version: Literal["trimserve/v1"] = Field(alias="apiVersion")
    kind: Literal["ChaosProfile"]
    objectives: Objectives
    actions: Annotated[
        tuple[AnyAction, ...], Field(min_length=1, max_length=MAX_ACTIONS, strict=False)
    ]

    @model_validator(mode="after")
    def _one_pause_at_a_time(self) -> Self:
        """The first to end would resume the process that the other holds."""
        lasting = [
            (index, one) for index, one in enumerate(self.actions) if isinstance(one, Pause | Slow)
        ]
        for (index, one), (later, other) in combinations(lasting, 2):
            same = (one.pid, one.pid_file) == (other.pid, other.pid_file)
            apart = one.at_s + one.for_s <= other.at_s or other.at_s + other.for_s <= one.at_s
            if same and not apart:
                raise ValueError(
                    f"actions.{index} and actions.{later} hold {one.process} at the same time, "
                    "want one after the other"
                )
        return self


def read_chaos(path: Path) -> ChaosProfile:
    """Read a profile; a `pid_file` is taken relative to it.

    Raises loadtest.document.DocumentInvalid.
    """
    profile = read_document(path, ChaosProfile)
    actions = tuple(_placed(one, path.parent) for one in profile.actions)
    return profile.model_copy(update={"actions": actions})


def _placed(action: AnyAction, folder: Path) -> AnyAction:
    if isinstance(action, Command) or action.pid_file is None:
        return action
    return action.model_copy(update={"pid_file": str(folder / action.pid_file)})


def misfit(profile: ChaosProfile, window_s: float) -> str | None:
    """Why the profile can't be played and judged in a window so long; none where it can."""
    objectives = profile.objectives
    to_judge_s = objectives.max_recovery_s + objectives.hold_s + MAX_LATE_S
    for index, action in enumerate(profile.actions):
        needed_s = max(action.lasts_s + MAX_LATE_S, to_judge_s)
        if action.at_s + needed_s > window_s:
            return (
                f"actions.{index}.at_s: got {action.at_s:g} in a window of {window_s:g} s, want at "
                f"most {window_s - needed_s:g}: it takes {needed_s:g} s to see it end and the "
                "server recover (max_recovery_s, hold_s and a second to begin)"
                if needed_s < window_s
                else f"actions.{index}: takes {needed_s:g} s to be judged (for_s, or "
                f"max_recovery_s and hold_s, and a second to begin), want a window longer than "
                f"{window_s:g} s"
            )
    return None


def label_of(action: AnyAction) -> str:
    """For people: "kill at 10 s"."""
    return f"{action.kind} at {action.at_s:g} s"
