"""Timing: what is measured and how it is judged, by a clock that the tests wind."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizer.surroundings import Surroundings, observe
from optimizer.timing import Contender, Effort, Instances, Timing, is_steady, measure
from serve.engines import EngineSpec
from serve.machine import allowed_cpus

SIZES = (1, 2, 4)
INPUTS = {"x": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
EFFORT = Effort(min_passes=4, max_passes=4, seconds=0.0, max_warmup_passes=2, max_retries=1)


class Clock:
    """Every look takes `step_ns`, so that each call seems to take as long."""

    def __init__(self, step_ns: int = 1_000_000) -> None:
        self.now = 0
        self.step_ns = step_ns

    def __call__(self) -> int:
        self.now += self.step_ns
        return self.now


@pytest.fixture
def contender(tmp_path: Path) -> Contender:
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [tensor("x", onnx.TensorProto.FLOAT, ["n", 8])],
        [tensor("y", onnx.TensorProto.FLOAT, ["n", 8])],
    )
    proto = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.save(proto, tmp_path / "model.onnx")
    return Contender(tmp_path, EngineSpec("onnxruntime", "model.onnx"))


def test_measure_gives_service_times_of_every_size(contender: Contender) -> None:
    timing = measure(contender, None, INPUTS, SIZES, effort=EFFORT, clock=Clock())
    assert [time.batch_size for time in timing.times.times] == [1, 2, 4]
    assert [time.p50_s for time in timing.times.times] == [0.001] * 3
    assert {time.n_samples for time in timing.times.times} == {EFFORT.min_passes}
    assert timing.speedup is None


def test_measure_compares_with_the_baseline_in_pairs(contender: Contender) -> None:
    timing = measure(contender, contender, INPUTS, SIZES, effort=EFFORT, clock=Clock())
    assert timing.speedup is not None
    assert timing.speedup.estimate == 1.0
    assert timing.speedup.n_pairs == 4
    assert timing.speedup.batch_size == 4
    assert not timing.speedup.noisy


def test_measure_retries_a_bounded_number_of_times_and_says_noisy(contender: Contender) -> None:
    class Erratic(Clock):
        def __call__(self) -> int:
            self.step_ns = self.step_ns * 7 % 1_000_003
            return super().__call__()

    timing = measure(contender, contender, INPUTS, SIZES, effort=EFFORT, clock=Erratic())
    assert timing.speedup is not None
    assert timing.speedup.noisy
    assert timing.speedup.n_pairs == 8


def test_measure_keeps_all_instances_busy(contender: Contender) -> None:
    spec = EngineSpec("onnxruntime", "model.onnx", instances=2)
    both = Contender(contender.directory, spec)
    timing = measure(both, None, INPUTS, SIZES, effort=EFFORT)
    assert timing.times.instances == 2
    assert {time.n_samples for time in timing.times.times} == {2 * EFFORT.min_passes}


def test_measure_raises_what_an_engine_raises(contender: Contender) -> None:
    wrong = {"x": INPUTS["x"][:, :3].astype(np.float64)}
    with pytest.raises(Exception, match="Unexpected input data type"):
        measure(contender, None, wrong, SIZES, effort=EFFORT)


def test_measure_refuses_fewer_samples_than_the_largest_batch(contender: Contender) -> None:
    with pytest.raises(ValueError, match="want at least 32"):
        measure(contender, None, INPUTS, (32,), effort=EFFORT)


@pytest.mark.parametrize(
    ("seconds", "steady"),
    [
        pytest.param([1.0] * 9, False, id="too few passes"),
        pytest.param([1.0] * 10, True, id="no change"),
        pytest.param([2.0] * 5 + [1.0] * 5, False, id="still getting faster"),
        pytest.param([1.0] * 7 + [9.0] + [1.0] * 2, True, id="one outlier"),
    ],
)
def test_warmup_is_over_when_the_rolling_median_is_steady(
    seconds: list[float], steady: bool
) -> None:
    assert is_steady(seconds) is steady


def test_timing_survives_a_round_trip(contender: Contender) -> None:
    timing = measure(contender, contender, INPUTS, SIZES, effort=EFFORT)
    assert Timing.from_dict(timing.to_dict()) == timing


def test_timing_is_read_when_it_was_stored_without_its_surroundings(contender: Contender) -> None:
    timing = measure(contender, None, INPUTS, SIZES, effort=EFFORT)
    stored = timing.to_dict()
    del stored["surroundings"]
    assert Timing.from_dict(stored).surroundings == Surroundings()


def test_instances_keep_to_their_places_when_they_have_some(contender: Contender) -> None:
    place = frozenset(allowed_cpus()[-1:])
    with Instances(contender, [place]) as instances:
        assert instances.each(lambda _: frozenset(os.sched_getaffinity(0))) == [place]


def test_instances_are_refused_when_they_have_too_few_places(contender: Contender) -> None:
    spec = EngineSpec("onnxruntime", "model.onnx", instances=2)
    with pytest.raises(ValueError, match="got 1 places, want one for each of 2"):
        Instances(Contender(contender.directory, spec), [frozenset({0})])


def test_steal_is_its_share_of_the_time_between_when_the_system_counts_it(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 0 0 0 50 7 7\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    ended = observe(stat)
    stat.write_text("cpu  150 0 60 820 0 0 0 70 9 9\n")
    assert ended().steal_share == 20 / 100


@pytest.mark.parametrize("text", ["", "intr 1 2 3\n", "cpu 1 2\n", "cpu 1 2 3 4 5 6 7 8\n"])
def test_steal_is_unknown_when_the_system_does_not_count_it(text: str, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text(text)
    assert observe(stat)().steal_share is None
    assert observe(tmp_path / "none")().steal_share is None
