"""When each request is meant to be sent, where to and with which payload.

Everything is drawn before the first request is sent, from a seed; nothing here knows a clock.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from loadtest.profile import (
    GRID_POINTS,
    Constant,
    Gamma,
    LoadProfile,
    Markov,
    Replay,
    dwell_grid,
    level_grid,
    simple_profile,
)
from loadtest.samples import FloatArray

MAX_TRACE_BYTES = 500_000_000
MIN_TRACE_SHARE = 0.99
"""A trace must hold this much of the window."""
Process = Literal["poisson", "constant"]


class TraceInvalid(ValueError):
    """A recorded trace that can't be replayed; `str()` says why and what is wanted."""


@dataclass(frozen=True)
class Arrivals:
    """A schedule of n requests, in the order of sending."""

    intended_s: npt.NDArray[np.float64]
    """[n] seconds from the start, ascending"""
    target: npt.NDArray[np.int32]
    """[n] index of the target"""
    payload: npt.NDArray[np.int32]
    """[n] index of the payload"""

    def __len__(self) -> int:
        return len(self.intended_s)


def draw_arrivals(
    process: Process,
    rate_per_s: float,
    duration_s: float,
    n_targets: int,
    n_payloads: int,
    rng: np.random.Generator,
) -> Arrivals:
    """Draw a schedule at the SLO's own rate; see `draw_profile`."""
    return draw_profile(simple_profile(process), rate_per_s, duration_s, n_targets, n_payloads, rng)


def draw_profile(
    profile: LoadProfile,
    rate_per_s: float,
    duration_s: float,
    n_targets: int,
    n_payloads: int,
    rng: np.random.Generator,
) -> Arrivals:
    """Draw a schedule with exactly the expected number of arrivals.

    That number is the area under the rate: `rate_per_s * duration_s` for a steady one. Arrivals
    are drawn at an even rate in a time of their own, which passes as fast as the rate is high
    (the time change of Cinlar, Introduction to Stochastic Processes, section 4.7). A Poisson
    process, given its number of arrivals, is that many independent uniform times (Ross,
    Introduction to Probability Models, theorem 5.2). Fixing the number offers exactly the rate
    that the objective names, where a free one would miss it by 1/sqrt(n): 2 % at 3,000
    requests. Gamma gaps are stretched to the same end, and the path of a Markov-modulated
    process is taken at the height that gives the objective's rate over the window.

    Raises TraceInvalid for a recorded trace that doesn't fit.
    """
    if isinstance(profile.arrivals, Replay):
        intended_s = _replayed(profile.arrivals, rate_per_s, duration_s)
    else:
        intended_s = _drawn(profile, rate_per_s, duration_s, rng)
    n = len(intended_s)
    return Arrivals(
        intended_s=intended_s,
        target=rng.integers(0, n_targets, n, dtype=np.int32),
        payload=rng.integers(0, n_payloads, n, dtype=np.int32),
    )


def peak_level(profile: LoadProfile, duration_s: float) -> float:
    """The highest rate of a profile as a multiple of the objective's; of a trace, 1."""
    if isinstance(profile.arrivals, Markov):
        mean = np.average(profile.arrivals.levels, weights=profile.arrivals.dwell_s)
        return float(max(profile.arrivals.levels) / mean)
    return float(level_grid(profile.rate, duration_s)[1].max())


def mean_level(profile: LoadProfile, duration_s: float) -> float:
    """The mean rate of a profile as a multiple of the objective's; of a trace, 1."""
    if duration_s <= 0 or isinstance(profile.arrivals, Markov):
        return 1.0
    times_s, levels = level_grid(profile.rate, duration_s)
    return float(np.trapezoid(levels, times_s) / duration_s)


def _drawn(
    profile: LoadProfile, rate_per_s: float, duration_s: float, rng: np.random.Generator
) -> FloatArray:
    n = round(rate_per_s * duration_s * mean_level(profile, duration_s))
    if n == 0:
        return np.zeros(0)
    process = profile.arrivals
    grid = (
        dwell_grid(process, duration_s, rng)
        if isinstance(process, Markov)
        else level_grid(profile.rate, duration_s)
    )
    if isinstance(process, Constant):
        steps = np.arange(n) / n
    elif isinstance(process, Gamma):
        gaps = rng.gamma(process.cv**-2, size=n + 1)
        steps = np.cumsum(gaps)[:n] / gaps.sum()
    else:
        steps = np.sort(rng.uniform(0.0, 1.0, n))
    return _at_shares(steps, *grid)


def _at_shares(shares: FloatArray, times_s: FloatArray, levels: FloatArray) -> FloatArray:
    """When each share, 0 to 1, of the area under the levels has passed."""
    if (levels == levels[0]).all():
        return np.asarray(shares * times_s[-1], np.float64)
    fine_s = np.unique(np.concatenate([np.linspace(0, times_s[-1], GRID_POINTS), times_s]))
    middles_s = (fine_s[1:] + fine_s[:-1]) / 2
    # Levels are linear between the points, so the middle times the width is the area there.
    area = np.concatenate(
        [[0.0], np.cumsum(np.interp(middles_s, times_s, levels) * np.diff(fine_s))]
    )
    if area[-1] == 0:
        raise TraceInvalid("the profile's levels are 0 throughout this window, want a longer one")
    return np.asarray(np.interp(shares * area[-1], area, fine_s), np.float64)


def _replayed(replay: Replay, rate_per_s: float, duration_s: float) -> FloatArray:
    times_s = read_trace(Path(replay.file))
    times_s = times_s - times_s[0]
    if replay.rate == "objective":
        times_s = times_s * ((len(times_s) - 1) / times_s[-1] / rate_per_s)
    if times_s[-1] < duration_s * MIN_TRACE_SHARE:
        raise TraceInvalid(
            f"{replay.file}: holds {times_s[-1]:.4g} s at this rate, of {duration_s:g} s to be "
            "measured: want a longer trace, or a shorter --duration-s"
        )
    return np.asarray(times_s[times_s < duration_s], np.float64)


def read_trace(path: Path) -> FloatArray:
    """The send times of a trace, [n] in seconds, at least two. Raises TraceInvalid."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise TraceInvalid(f"{path}: over {MAX_TRACE_BYTES} bytes, want a shorter trace")
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                times_s = np.asarray(arrays["intended_s"], np.float64)
        else:
            times_s = np.array(path.read_text("utf-8").split(), np.float64)
    except TraceInvalid:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise TraceInvalid(
            f"{path}: can't be read as a trace ({error}), want one time in seconds a line, or "
            ".npz with an array intended_s"
        ) from error
    if times_s.ndim != 1 or len(times_s) < 2 or not np.isfinite(times_s).all():
        raise TraceInvalid(f"{path}: want at least two finite times in seconds, one a line")
    falls = np.flatnonzero(np.diff(times_s) < 0)
    if len(falls) or times_s[-1] == times_s[0]:
        where = f"time {falls[0] + 2} is before the one above it" if len(falls) else "all are equal"
        raise TraceInvalid(f"{path}: {where}, want ascending times")
    return times_s
