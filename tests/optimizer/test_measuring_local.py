"""Measuring in this process and in a child, with real engines; both keep the same contract."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from optimizer.measuring import ContenderFailed, Measurer
from optimizer.measuring.calls import CHUNK_BYTES
from optimizer.measuring.child import ChildMeasurer
from optimizer.measuring.energy import Counter, read_counters, spent_joules
from optimizer.measuring.local import LocalMeasurer, places
from optimizer.measuring.memory import resident_bytes
from optimizer.timing import Contender, Effort
from serve.engines import EngineSpec
from serve.machine import this_machine
from tests.serve.onnx_models import linear, linear_by_hand, work

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
QUICK = Effort(
    min_passes=3, max_passes=3, seconds=0.0, max_warmup_passes=1, max_warmup_s=0.1, max_retries=0
)
FOREVER = {"n": np.array(10**12, np.int64)}


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else measures on this machine now is none of these tests' business."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.fixture(params=[LocalMeasurer, ChildMeasurer])
def measurer(request: pytest.FixtureRequest) -> Iterator[Measurer]:
    made = request.param()
    yield made
    if isinstance(made, ChildMeasurer):
        made.close()


@pytest.fixture
def contender(tmp_path: Path) -> Contender:
    linear(tmp_path / "model.onnx")
    return Contender(tmp_path, EngineSpec("onnxruntime", "model.onnx"))


@pytest.fixture
def endless(tmp_path: Path) -> Contender:
    (tmp_path / "endless").mkdir()
    work(tmp_path / "endless" / "model.onnx")
    return Contender(tmp_path / "endless", EngineSpec("onnxruntime", "model.onnx"))


# --- the contract


def test_outputs_are_the_engines_when_batches_are_given(
    measurer: Measurer, contender: Contender
) -> None:
    batches = [{"x": X[:3]}, {"x": X[3:4]}]
    outputs = list(measurer.outputs(contender, iter(batches)))
    assert [list(output) for output in outputs] == [["y"], ["y"]]
    for batch, output in zip(batches, outputs, strict=True):
        np.testing.assert_allclose(output["y"], linear_by_hand(batch["x"]), rtol=1e-5)


def test_outputs_are_none_when_there_is_no_batch(measurer: Measurer, contender: Contender) -> None:
    assert list(measurer.outputs(contender, [])) == []


def test_kernels_are_those_of_the_graph_when_profiled(
    measurer: Measurer, contender: Contender
) -> None:
    times = measurer.kernels(contender, {"x": X}, 3)
    assert any("Gemm" in time.operator for time in times)
    assert all(time.duration_s >= 0 for time in times)


def test_time_gives_service_times_and_the_speedup_when_there_is_a_baseline(
    measurer: Measurer, contender: Contender
) -> None:
    timing = measurer.time(contender, contender, {"x": X}, (1, 8), effort=QUICK, seed=0)
    assert [time.batch_size for time in timing.times.times] == [1, 8]
    assert all(0 < time.p50_s < 10 for time in timing.times.times)
    assert timing.speedup is not None
    assert timing.speedup.n_pairs == 3
    load = timing.surroundings.load
    assert load is None or load >= 0


def test_memory_is_at_least_the_runtimes_when_measured(
    measurer: Measurer, contender: Contender
) -> None:
    assert 1e6 < measurer.memory_bytes(contender, {"x": X}) < 1e9


def test_joules_are_none_exactly_when_there_is_no_counter(
    measurer: Measurer, contender: Contender
) -> None:
    joules = measurer.joules(contender, {"x": X}, 0.01)
    assert (joules is None) == (not read_counters())


def test_failure_of_the_engine_is_raised_when_it_takes_no_such_input(
    measurer: Measurer, contender: Contender
) -> None:
    with pytest.raises(Exception, match="Unexpected input data type"):
        list(measurer.outputs(contender, [{"x": X.astype(np.float64)}]))
    assert len(list(measurer.outputs(contender, [{"x": X}]))) == 1


def test_machine_is_this_one_when_it_measures_here(measurer: Measurer) -> None:
    assert measurer.machine == this_machine()


# --- the child


def test_outputs_come_in_their_order_when_they_need_several_frames(contender: Contender) -> None:
    rows = CHUNK_BYTES // (4 * 4) // 2 + 1  # two such batches are more than a frame's
    large = np.random.default_rng(1).normal(size=(rows, 4)).astype(np.float32)
    with ChildMeasurer() as child:
        outputs = list(child.outputs(contender, ({"x": large + n} for n in range(3))))
    for n, output in enumerate(outputs):
        np.testing.assert_allclose(output["y"][:5], linear_by_hand(large[:5] + n), rtol=1e-4)
    assert len(outputs) == 3


def test_next_call_works_when_the_child_was_killed_between_calls(contender: Contender) -> None:
    with ChildMeasurer() as child:
        list(child.outputs(contender, [{"x": X}]))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ContenderFailed, match="SIGKILL, for want of memory perhaps"):
            list(child.outputs(contender, [{"x": X}]))
        assert len(list(child.outputs(contender, [{"x": X}]))) == 1


def test_failure_names_the_signal_when_the_engine_crashes(
    contender: Contender, endless: Contender
) -> None:
    with ChildMeasurer() as child:
        list(child.outputs(contender, [{"x": X}]))
        pid = child.pid
        assert pid is not None
        crash = threading.Timer(0.2, os.kill, (pid, signal.SIGSEGV))
        crash.start()
        with pytest.raises(ContenderFailed, match="SIGSEGV"):
            list(child.outputs(endless, [FOREVER]))
        crash.join()
        assert len(list(child.outputs(contender, [{"x": X}]))) == 1
        assert child.pid != pid


def test_failure_says_how_long_when_the_engine_hangs(
    contender: Contender, endless: Contender
) -> None:
    with ChildMeasurer(max_call_s=3.0) as child:
        with pytest.raises(ContenderFailed, match="no answer within 3 s"):
            list(child.outputs(endless, [FOREVER]))
        assert child.pid is None


def test_call_fails_at_once_when_the_child_is_stopped(endless: Contender) -> None:
    with ChildMeasurer() as child:
        threading.Timer(1.0, child.stop).start()
        with pytest.raises(Exception, match=r"SIGKILL|stopped"):
            list(child.outputs(endless, [FOREVER]))


ORPHANS = """
import os, sys, threading
from pathlib import Path
import numpy as np
from optimizer.measuring.child import ChildMeasurer
from optimizer.timing import Contender
from serve.engines import EngineSpec
child = ChildMeasurer()
first, endless = (Contender(Path(d), EngineSpec("onnxruntime", "model.onnx")) for d in sys.argv[1:])
list(child.outputs(first, [{"x": np.zeros((1, 4), np.float32)}]))
print(child.pid, flush=True)
list(child.outputs(endless, [{"n": np.array(10**12)}]))
"""


def test_child_ends_when_its_parent_was_killed_in_the_middle_of_a_call(
    contender: Contender, endless: Contender
) -> None:
    command = [sys.executable, "-c", ORPHANS, str(contender.directory), str(endless.directory)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        watched = os.pidfd_open(pid)
        parent.kill()
    try:
        assert select.select([watched], [], [], 30)[0]
    finally:
        os.close(watched)


WITHOUT_EXTRAS = """
import sys
for name in ("torch", "onnx", "optuna", "plotly", "jinja2", "pyarrow", "safetensors"):
    sys.modules[name] = None
from pathlib import Path
import numpy as np
import optimizer.measuring.agent, optimizer.measuring.agent_server, optimizer.measuring.cli
import optimizer.measuring.remote
from optimizer.measuring.local import LocalMeasurer
from optimizer.timing import Contender, Effort
from serve.engines import EngineSpec
contender = Contender(Path(sys.argv[1]), EngineSpec("onnxruntime", "model.onnx"))
quick = Effort(min_passes=2, max_passes=2, seconds=0.0, max_warmup_passes=1, max_retries=0)
inputs = {"x": np.zeros((2, 4), np.float32)}
timing = LocalMeasurer().time(contender, None, inputs, (1, 2), effort=quick, seed=0)
print(len(timing.times.times))
"""


def test_measuring_works_when_torch_onnx_and_optuna_cannot_be_imported(
    contender: Contender,
) -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS, str(contender.directory)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"


# --- places, memory, energy


@pytest.mark.parametrize(
    ("instances", "threads", "cpus", "expected"),
    [
        pytest.param(2, 1, (3, 5), [{3}, {5}], id="one each"),
        pytest.param(1, 2, (3, 5, 7), [{3, 5}], id="several for one"),
        pytest.param(2, 2, (1, 2, 3), [], id="too few"),
    ],
)
def test_places_are_apart_when_there_are_enough(
    instances: int, threads: int, cpus: tuple[int, ...], expected: list[set[int]]
) -> None:
    spec = EngineSpec("onnxruntime", "m", instances=instances, threads=threads)
    assert [set(place) for place in places(spec, cpus)] == expected


def test_resident_memory_is_read_in_bytes(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t    2048 kB\nThreads:\t1\n")
    assert resident_bytes(status) == 2048 * 1024
    status.write_text("Name:\tpython\n")
    with pytest.raises(OSError, match="VmRSS"):
        resident_bytes(status)


def write_zone(root: Path, zone: str, name: str, energy_uj: int) -> None:
    (root / zone).mkdir()
    (root / zone / "name").write_text(name + "\n")
    (root / zone / "energy_uj").write_text(f"{energy_uj}\n")
    (root / zone / "max_energy_range_uj").write_text("999\n")


def test_counters_are_those_of_packages_when_zones_lie_in_each_other(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 6)
    write_zone(tmp_path, "intel-rapl:2", "psys", 7)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 8)
    counters = read_counters(tmp_path)
    assert counters == {"intel-rapl:0": Counter(5, 999), "intel-rapl:1": Counter(6, 999)}


def test_counters_are_none_when_they_cannot_be_read(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert read_counters(tmp_path) == {}
    assert read_counters(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        pytest.param(100, 600, 500e-6, id="in one go"),
        pytest.param(900, 100, 200e-6, id="past the end"),
        pytest.param(7, 7, 0.0, id="nothing"),
    ],
)
def test_spent_energy_counts_on_when_the_counter_starts_again(
    before: int, after: int, joules: float
) -> None:
    spent = spent_joules({"p": Counter(before, 999)}, {"p": Counter(after, 999)})
    assert spent == pytest.approx(joules)


def test_spent_energy_is_unknown_when_counters_are_missing() -> None:
    assert spent_joules({}, {}) is None
    assert spent_joules({"p": Counter(1, 9)}, {}) is None
