from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from loadtest.arrivals import TraceInvalid, draw_profile, mean_level, peak_level
from loadtest.document import DocumentInvalid, parse_document
from loadtest.profile import LoadProfile, read_profile
from loadtest.samples import FloatArray

HEAD = {"apiVersion": "trimserve/v1", "kind": "LoadProfile"}


def profile_of(**parts: object) -> LoadProfile:
    return parse_document(yaml.safe_dump({**HEAD, **parts}), LoadProfile, "profile.yaml")


def times(
    profile: LoadProfile, rate_per_s: float = 200, duration_s: float = 60, seed: int = 1
) -> FloatArray:
    rng = np.random.default_rng(seed)
    return draw_profile(profile, rate_per_s, duration_s, 1, 1, rng).intended_s


def rates(intended_s: FloatArray, duration_s: float, n_bins: int) -> FloatArray:
    counts = np.histogram(intended_s, n_bins, (0, duration_s))[0]
    return np.asarray(counts / (duration_s / n_bins), np.float64)


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma_gaps_have_the_distribution_and_spread_asked_for_when_drawn(cv: float) -> None:
    gaps_s = np.diff(times(profile_of(arrivals={"process": "gamma", "cv": cv})))
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)
    gamma = stats.gamma(cv**-2, scale=gaps_s.mean() * cv**2)
    # Not below a microsecond: the times themselves have no finer steps than 1e-14.
    for gap_s in (1e-6, 1e-4, 1e-3, 5e-3, 2e-2):
        assert np.mean(gaps_s <= gap_s) == pytest.approx(gamma.cdf(gap_s), abs=0.015)


def test_markov_arrivals_have_the_dispersion_of_theory_when_levels_switch() -> None:
    """Fischer and Meier-Hellstern (1993), The MMPP cookbook: the index of dispersion of counts
    of two states with rates a, b and dwell times 1/r, 1/s grows towards
    1 + 2 r s (a - b)² / ((r + s)² (a s + b r))."""
    profile = profile_of(arrivals={"process": "markov", "levels": [0.5, 2.5], "dwell_s": [3, 1]})
    a, b, r, s = 100.0, 500.0, 1 / 3, 1.0
    wanted = 1 + 2 * r * s * (a - b) ** 2 / ((r + s) ** 2 * (a * s + b * r))
    counts = np.histogram(times(profile, 200, 20_000), 500, (0, 20_000))[0]
    assert counts.var() / counts.mean() == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize(
    ("rate", "n_bins", "wanted"),
    [
        pytest.param(
            {"shape": "ramp", "start": 0.5, "end": 1.5}, 4, [0.625, 0.875, 1.125, 1.375], id="ramp"
        ),
        pytest.param(
            {"shape": "steps", "levels": [0.5, 2, 1]}, 6, [0.5, 0.5, 2, 2, 1, 1], id="steps"
        ),
        pytest.param(
            {"shape": "spikes", "height": 5, "every_s": 20, "length_s": 5},
            12,
            [1, 1, 1, 5] * 3,
            id="spikes",
        ),
        pytest.param(
            {"shape": "diurnal", "amplitude": 0.8, "period_s": 60},
            2,
            [1 + 0.8 * 2 / np.pi, 1 - 0.8 * 2 / np.pi],
            id="diurnal",
        ),
    ],
)
@pytest.mark.parametrize("process", ["constant", "poisson"])
def test_rate_follows_the_shape_when_drawn(
    rate: dict[str, object], n_bins: int, wanted: list[float], process: str
) -> None:
    profile = profile_of(arrivals={"process": process}, rate=rate)
    intended_s = times(profile, 400)
    assert len(intended_s) == round(400 * 60 * float(np.mean(wanted)))
    assert (np.diff(intended_s) >= 0).all()
    assert 0 <= intended_s[0] <= intended_s[-1] < 60
    tolerance = 0.01 if process == "constant" else 0.08
    np.testing.assert_allclose(rates(intended_s, 60, n_bins) / 400, wanted, rtol=tolerance)


def test_poisson_arrivals_are_poisson_in_the_rates_own_time_when_it_ramps() -> None:
    intended_s = times(profile_of(rate={"shape": "ramp", "start": 0.2, "end": 1.8}), 300)
    passed = 0.2 * intended_s + 0.5 * 1.6 / 60 * intended_s**2
    assert stats.kstest(passed / 60, "uniform").pvalue > 0.01


def test_profiles_levels_tell_mean_and_peak_when_asked() -> None:
    spikes = profile_of(rate={"shape": "spikes", "height": 3, "every_s": 10, "length_s": 2})
    assert mean_level(spikes, 60) == pytest.approx(1.4)
    assert peak_level(spikes, 60) == 3
    markov = profile_of(arrivals={"process": "markov", "levels": [1, 3], "dwell_s": [1, 1]})
    assert (mean_level(markov, 60), peak_level(markov, 60)) == (1, 1.5)


def test_arrivals_are_the_same_when_the_seed_is_and_others_when_not() -> None:
    profile = profile_of(arrivals={"process": "markov", "levels": [1, 3], "dwell_s": [1, 1]})
    np.testing.assert_array_equal(times(profile, seed=5), times(profile, seed=5))
    assert not np.array_equal(times(profile, seed=5), times(profile, seed=6))


def replay(folder: Path, text: str, rate: str = "recorded") -> LoadProfile:
    (folder / "trace.txt").write_text(text, "utf-8")
    path = folder / "profile.yaml"
    arrivals = {"process": "replay", "file": "trace.txt", "rate": rate}
    path.write_text(yaml.safe_dump({**HEAD, "arrivals": arrivals}), "utf-8")
    return read_profile(path)


def test_replay_sends_at_the_recorded_times_when_they_are_kept(tmp_path: Path) -> None:
    profile = replay(tmp_path, "100.0\n100.5\n102.25\n103\n")
    np.testing.assert_allclose(times(profile, 50, 3), [0, 0.5, 2.25])


def test_replay_has_the_objectives_rate_when_stretched(tmp_path: Path) -> None:
    recorded_s = np.cumsum(np.random.default_rng(1).exponential(1.0, 3001))
    profile = replay(tmp_path, "\n".join(map(str, recorded_s)), "objective")
    intended_s = times(profile, 100, 29.9)
    assert len(intended_s) == pytest.approx(2990, rel=0.03)
    gaps_s = np.diff(recorded_s)[: len(intended_s) - 1]
    np.testing.assert_allclose(np.diff(intended_s) / gaps_s, np.diff(intended_s)[0] / gaps_s[0])


def test_replay_reads_samples_when_an_earlier_run_wrote_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", intended_s=np.array([0.0, 1.0, 4.0]))
    profile = replay(tmp_path, "")
    arrivals = profile.arrivals.model_copy(update={"file": str(tmp_path / "trace.npz")})
    profile = profile.model_copy(update={"arrivals": arrivals})
    np.testing.assert_array_equal(times(profile, 50, 4), [0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("0\n1\n0.5\n", "time 3 is before the one above it", id="falling"),
        pytest.param("0\nhello\n", "one time in seconds a line", id="words"),
        pytest.param("7\n", "at least two", id="a single one"),
        pytest.param("0\n1\n", "want a longer trace", id="shorter than the window"),
        pytest.param("0\ninf\n", "finite", id="infinite"),
        pytest.param("3\n3\n", "all are equal", id="without time"),
    ],
)
def test_replay_is_refused_when_the_trace_does_not_fit(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(TraceInvalid, match=message):
        times(replay(tmp_path, text), 50, 30)


def test_replay_names_the_file_when_it_is_missing(tmp_path: Path) -> None:
    profile = replay(tmp_path, "0\n1\n")
    (tmp_path / "trace.txt").unlink()
    with pytest.raises(TraceInvalid, match=r"trace\.txt"):
        times(profile)


@pytest.mark.parametrize(
    ("parts", "messages"),
    [
        pytest.param(
            {"arrivals": {"process": "gamma", "cw": 2}},
            ["cw: unknown key, did you mean 'cv'?", "cv: missing"],
            id="a misspelt key of one of several",
        ),
        pytest.param(
            {"arrivals": {"process": "weibull"}},
            ["arrivals.process: got 'weibull', want poisson, constant, gamma, markov or replay"],
            id="an unknown process",
        ),
        pytest.param(
            {"arrivals": {"process": "gama", "cv": 2}},
            ["arrivals.process: got 'gama', did you mean 'gamma'? want poisson, constant, gamma"],
            id="a misspelt process",
        ),
        pytest.param(
            {"rate": {"height": 2}},
            ["rate.shape: missing, want steady, ramp, steps, spikes or diurnal"],
            id="a rate without its shape",
        ),
        pytest.param(
            {"arrivals": 5},
            ["arrivals: got 5, want a mapping of keys to values"],
            id="a number for a mapping",
        ),
        pytest.param(
            {"arrivals": {"process": "markov", "levels": [1, 2], "dwell_s": [1, 2, 3]}},
            ["dwell_s (3) for each of levels (2)"],
            id="levels without times",
        ),
        pytest.param(
            {"rate": {"shape": "spikes", "height": 2, "every_s": 5, "length_s": 5}},
            ["less than every_s (5)"],
            id="a spike without an end",
        ),
        pytest.param(
            {
                "arrivals": {"process": "replay", "file": "x"},
                "rate": {"shape": "ramp", "start": 0, "end": 1},
            },
            ["want steady"],
            id="two rates at once",
        ),
        pytest.param(
            {"rate": {"shape": "steps", "levels": [0, 0]}}, ["above 0"], id="no load at all"
        ),
    ],
)
def test_profile_is_refused_when_it_makes_no_sense(
    parts: dict[str, object], messages: list[str]
) -> None:
    with pytest.raises(DocumentInvalid) as caught:
        profile_of(**parts)
    for message in messages:
        assert message in str(caught.value)
