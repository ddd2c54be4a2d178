"""How a load test's arrivals may differ from the SLO's own: bursts, and a rate that moves.

A versioned YAML document given by `--profile`. Rates in it are multiples of the SLO's
`workload.rate_per_s`, so that one profile fits many objectives.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from loadtest.document import Strict, read_document
from loadtest.samples import FloatArray
from loadtest.slo import PositiveFloat

GRID_POINTS = 20_000
Level = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class Poisson(Strict):
    process: Literal["poisson"] = "poisson"


class Constant(Strict):
    process: Literal["constant"]


class Gamma(Strict):
    """Independent gaps with a gamma distribution: bursts above `cv` 1, a beat below it."""

    process: Literal["gamma"]
    cv: float = Field(gt=0, le=20, allow_inf_nan=False)
    """coefficient of variation of the gaps; 1 is a Poisson process"""


class Markov(Strict):
    """A Markov-modulated Poisson process: the rate jumps from level to level in turn.

    Levels hold for exponential times with the means `dwell_s`.
    """

    process: Literal["markov"]
    levels: Annotated[tuple[Level, ...], Field(min_length=2, max_length=32, strict=False)]
    dwell_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=2, max_length=32, strict=False)]

    @model_validator(mode="after")
    def _levels_have_times(self) -> Self:
        if len(self.levels) != len(self.dwell_s):
            raise ValueError(
                f"want one of dwell_s ({len(self.dwell_s)}) for each of levels ({len(self.levels)})"
            )
        if not any(self.levels):
            raise ValueError("want a level above 0 among levels")
        return self


class Replay(Strict):
    """The send times of a recorded trace, as they were or stretched to the SLO's rate."""

    process: Literal["replay"]
    file: str = Field(min_length=1)
    """text with one time in seconds a line, ascending; or .npz with an array `intended_s`"""
    rate: Literal["recorded", "objective"] = "recorded"


class Steady(Strict):
    shape: Literal["steady"] = "steady"


class Ramp(Strict):
    """From one level to another in a straight line over the whole window."""

    shape: Literal["ramp"]
    start: Level
    end: Level


class Steps(Strict):
    """Levels one after the other, each as long as the next."""

    shape: Literal["steps"]
    levels: Annotated[tuple[Level, ...], Field(min_length=2, max_length=1000, strict=False)]


class Spikes(Strict):
    """Level 1, and `height` for `length_s` at the end of every `every_s`."""

    shape: Literal["spikes"]
    height: float = Field(gt=0, le=1000, allow_inf_nan=False)
    every_s: PositiveFloat
    length_s: PositiveFloat

    @field_validator("length_s")
    @classmethod
    def _spike_is_shorter_than_its_period(cls, value: float, info: object) -> float:
        every_s = getattr(info, "data", {}).get("every_s")
        if every_s is not None and value >= every_s:
            raise ValueError(f"want less than every_s ({every_s:g})")
        return value


class Diurnal(Strict):
    """1 + amplitude · sin(2π t / period_s), as days go; give a period that the window holds."""

    shape: Literal["diurnal"]
    amplitude: float = Field(gt=0, le=1, allow_inf_nan=False)
    period_s: PositiveFloat


AnyProcess = Annotated[Poisson | Constant | Gamma | Markov | Replay, Field(discriminator="process")]
AnyShape = Annotated[Steady | Ramp | Steps | Spikes | Diurnal, Field(discriminator="shape")]


class LoadProfile(Strict):
    """Arrivals of a process whose rate follows a shape."""

    api_version: Literal["trimserve/v1"] = Field(alias="apiVersion")
    kind: Literal["LoadProfile"]
    arrivals: AnyProcess = Poisson()
    rate: AnyShape = Steady()

    @model_validator(mode="after")
    def _shape_fits_process(self) -> Self:
        if self.arrivals.process in ("replay", "markov") and self.rate.shape != "steady":
            raise ValueError(
                f"rate.shape: got {self.rate.shape} with arrivals.process "
                f"{self.arrivals.process}, which has a rate of its own: want steady"
            )
        shape = self.rate
        if (isinstance(shape, Ramp) and shape.start == shape.end == 0) or (
            isinstance(shape, Steps) and not any(shape.levels)
        ):
            raise ValueError("rate: got 0 throughout, want a level above 0")
        return self

    @property
    def label(self) -> str:
        """In a few words, for reports: "gamma, ramp"."""
        return ", ".join(
            dict.fromkeys(
                one for one in (self.arrivals.process, self.rate.shape) if one != "steady"
            )
        )


def simple_profile(process: Literal["poisson", "constant"]) -> LoadProfile:
    """The SLO's own arrivals, at its rate throughout."""
    arrivals = Constant(process="constant") if process == "constant" else Poisson()
    return LoadProfile(apiVersion="trimserve/v1", kind="LoadProfile", arrivals=arrivals)


def read_profile(path: Path) -> LoadProfile:
    """Read a profile; a trace's `file` is taken relative to it.

    Raises loadtest.document.DocumentInvalid.
    """
    profile = read_document(path, LoadProfile)
    if isinstance(profile.arrivals, Replay):
        file = str(path.parent / profile.arrivals.file)
        arrivals = profile.arrivals.model_copy(update={"file": file})
        return profile.model_copy(update={"arrivals": arrivals})
    return profile


def level_grid(shape: AnyShape, duration_s: float) -> tuple[FloatArray, FloatArray]:
    """Times and levels of a shape, [m] each, linear in between; times ascend, twice at a jump."""
    if isinstance(shape, Ramp):
        return np.array([0.0, duration_s]), np.array([shape.start, shape.end])
    if isinstance(shape, Steps):
        edges_s = np.linspace(0, duration_s, len(shape.levels) + 1)
        return np.repeat(edges_s, 2)[1:-1], np.repeat(np.array(shape.levels), 2)
    if isinstance(shape, Spikes):
        return _spikes(shape, duration_s)
    if isinstance(shape, Diurnal):
        times_s = np.linspace(0, duration_s, GRID_POINTS)
        return times_s, 1 + shape.amplitude * np.sin(2 * np.pi * times_s / shape.period_s)
    return np.array([0.0, duration_s]), np.ones(2)


def _spikes(shape: Spikes, duration_s: float) -> tuple[FloatArray, FloatArray]:
    ends_s = np.arange(1, int(duration_s / shape.every_s) + 2) * shape.every_s
    starts_s = ends_s - shape.length_s
    jumps_s = np.stack([starts_s, starts_s, ends_s, ends_s], axis=1).ravel()
    levels = np.tile([1.0, shape.height, shape.height, 1.0], len(ends_s))
    inside = jumps_s < duration_s
    # What holds at the last jump before the end holds until the end.
    last = levels[inside][-1] if inside.any() else 1.0
    times_s = np.concatenate([[0.0], jumps_s[inside], [duration_s]])
    return times_s, np.concatenate([[1.0], levels[inside], [last]])


def dwell_grid(
    markov: Markov, duration_s: float, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """One path of the levels of a Markov-modulated process, as `level_grid` gives a shape's."""
    times_s, levels, now_s, state = [0.0], [], 0.0, 0
    while now_s < duration_s:
        now_s = min(duration_s, now_s + float(rng.exponential(markov.dwell_s[state])))
        times_s.append(now_s)
        levels.append(markov.levels[state])
        state = (state + 1) % len(markov.levels)
    return np.repeat(np.array(times_s), 2)[1:-1], np.repeat(np.array(levels, dtype=float), 2)
