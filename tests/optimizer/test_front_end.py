"""The front end of a study: measured once, or corrected by a load test of a version."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from optimizer.capacity import predict
from optimizer.errors import SpecInvalid
from optimizer.evidence import Evidence, EvidenceInvalid
from optimizer.front_end import front_end_from, measured_front_end, read_lesson
from optimizer.overheads import Cost, Overheads
from optimizer.simulation import FrontEnd, Replica, Spread
from optimizer.spec import Spec, read_spec
from optimizer.store import Store
from optimizer.verify import ProcessFailed
from serve.artifact import Batching, Manifest, Profile, write_version
from serve.engines import EngineSpec, Signature
from serve.machine import Machine
from serve.tensor import TensorSpec
from tests.optimizer.replicas import affine, times
from tests.optimizer.test_evidence import MACHINE, report, written
from tests.optimizer.tiny_study import write_study

OTHER = replace(MACHINE, processor="another")


@dataclass
class Meter:
    """Stands for `measure_overheads`: gives known costs, or raises."""

    failure: Exception | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, cores: int, **given: Any) -> Overheads:
        self.asked.append({"cores": cores, **given})
        if self.failure is not None:
            raise self.failure
        cost = Cost(0.002, 0.0003, 0.0001, Spread.constant(0.001))
        wake = Spread.constant(0.004)
        return Overheads(given["n_values"], given["encoding"], False, {"rest": cost}, wake)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return read_spec(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def test_overheads_are_measured_once_when_studies_send_requests_of_about_the_same_size(
    spec: Spec, store: Store
) -> None:
    meter = Meter()
    found = [measured_front_end(store, MACHINE, 2, spec, n, print, meter) for n in (60, 64, 100)]
    assert found[0] == found[1] == found[2]
    assert found[0].serial_s == pytest.approx(0.002)
    assert found[0].wake == Spread.constant(0.004)
    assert meter.asked == [{"cores": 2, "n_values": 64, "encoding": "binary", "seed": 0}]


def test_overheads_are_measured_anew_when_cores_sizes_or_the_machine_differ(
    spec: Spec, store: Store
) -> None:
    meter = Meter()
    for machine, cores, n_values in (
        (MACHINE, 2, 64), (MACHINE, 1, 64), (MACHINE, 2, 64_000), (OTHER, 2, 64),
    ):  # fmt: skip
        measured_front_end(store, machine, cores, spec, n_values, print, meter)
    assert len(meter.asked) == 4


def test_overheads_are_of_a_bounded_size_when_inputs_are_huge(spec: Spec, store: Store) -> None:
    meter = Meter()
    measured_front_end(store, MACHINE, 2, spec, 10**9, print, meter)
    assert meter.asked[0]["n_values"] == 1_000_000


@pytest.mark.parametrize(
    "failure",
    [
        ProcessFailed("serve", "ended with exit code 1", ""),
        subprocess.TimeoutExpired("loadtest", 60),
        ConnectionRefusedError("metrics"),
    ],
    ids=["it ends", "it hangs", "it is gone"],
)
def test_front_end_is_the_default_and_tried_again_when_the_server_cannot_be_measured(
    failure: Exception, spec: Spec, store: Store
) -> None:
    notes: list[str] = []
    found = measured_front_end(store, MACHINE, 2, spec, 64, notes.append, Meter(failure))
    assert found == FrontEnd()
    assert "couldn't be measured" in notes[0]
    meter = Meter()
    assert measured_front_end(store, MACHINE, 2, spec, 64, notes.append, meter) != FrontEnd()
    assert len(meter.asked) == 1


SERVED = times(affine(0.002, 0.0005), spread=1.3)
RATE_PER_S = 100.0


def publish(repository: Path, version: str, source: Path) -> None:
    """A version of the model `digits` that takes `SERVED`."""
    tensor = TensorSpec("image", "FP32", (-1, 4))
    manifest = Manifest(
        "digits",
        version,
        Signature((tensor,), (tensor,)),
        EngineSpec("onnxruntime", "model.onnx"),
        Batching(8),
        profile=Profile(SERVED.times, MACHINE),
    )
    source.write_bytes(b"weights")
    write_version(repository, manifest, {"model.onnx": source})


def loaded(front_end: FrontEnd, version: str = "") -> dict[str, Any]:
    """What a load test would report of that version behind such a front end."""
    blank = Evidence("r.json", "digits", version, RATE_PER_S, 5_000, 0.99, 1.0, 1.0, 0.02)
    seen = predict(Replica(SERVED, 1, 8, front_end=front_end), blank.load, n_requests=5_000)
    document = report(
        requests={"n": 5_000, "n_ok": 5_000, "achieved_per_s": RATE_PER_S, "goodput_per_s": 90.0},
        latency=[
            {"quantile": 0.5, "latency_s": seen.p50_s},
            {"quantile": 0.99, "latency_s": seen.slo_latency_s},
        ],
        run={"model": "digits", "version": version},
    )
    document["slo"]["workload"]["rate_per_s"] = RATE_PER_S
    return document


def test_front_end_explains_a_slower_server_when_a_load_test_saw_one(tmp_path: Path) -> None:
    repository, given = tmp_path / "models", FrontEnd()
    for version in ("9", "10"):
        publish(repository, version, tmp_path / "model.onnx")
    slower = replace(
        given, receive_s=2 * given.receive_s, answer_s=2 * given.answer_s,
        wakeup_s=2 * given.wakeup_s, batch_s=2 * given.batch_s,
        way=Spread(tuple(2 * seconds for seconds in given.way.seconds)),
    )  # fmt: skip
    path = written(tmp_path, loaded(slower))

    found = front_end_from(read_lesson(path, repository, MACHINE), 1, given)

    assert found.serial_s == pytest.approx(slower.serial_s, rel=0.2)


def test_front_end_is_refused_when_the_version_is_not_in_the_repository(tmp_path: Path) -> None:
    publish(tmp_path / "models", "1", tmp_path / "model.onnx")
    path = written(tmp_path, loaded(FrontEnd(), version="7"))
    with pytest.raises(SpecInvalid) as caught:
        read_lesson(path, tmp_path / "models", MACHINE)
    assert str(caught.value) == (
        f"{path}: is of digits/7, which isn't in {tmp_path / 'models'}: "
        "name its repository by --repository"
    )


@pytest.mark.parametrize(
    ("changes", "machine", "problem"),
    [
        pytest.param({"verdict": "inconclusive"}, MACHINE, "got inconclusive", id="no verdict"),
        pytest.param({}, replace(MACHINE, cores=8), "another machine", id="another machine"),
    ],
)
def test_front_end_is_refused_when_the_report_says_nothing(
    changes: dict[str, Any], machine: Machine, problem: str, tmp_path: Path
) -> None:
    publish(tmp_path / "models", "1", tmp_path / "model.onnx")
    path = written(tmp_path, loaded(FrontEnd()) | changes)
    with pytest.raises(EvidenceInvalid, match=problem):
        read_lesson(path, tmp_path / "models", machine)
