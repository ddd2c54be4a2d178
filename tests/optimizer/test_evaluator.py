"""The evaluator: each step alone, through a measurer, kept in the store with what it took."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from optimizer.data.splits import Samples
from optimizer.errors import MeasurerUnavailable, ParityMismatch, TechniqueFailed
from optimizer.evaluator import Evaluator
from optimizer.measuring import Batch, ContenderFailed
from optimizer.measuring.local import LocalMeasurer
from optimizer.result import InstanceTimes
from optimizer.store import Store, StoredVariant
from optimizer.timing import Contender, Effort, Timing
from optimizer.variant import engine_model, onnx_model
from serve.artifact import ServiceTime, Step
from serve.engines import EngineSpec, KernelTime
from serve.machine import Machine
from serve.tensor import Array
from tests.serve.onnx_models import linear, linear_by_hand

X = np.random.default_rng(0).normal(size=(21, 4)).astype(np.float32)
LABELS = linear_by_hand(X).argmax(axis=1)
LABELS[:3] = (LABELS[:3] + 1) % 3  # three that it gets wrong
TIMES = InstanceTimes(1, 1, (ServiceTime(1, 0.001, 0.002, 3),))


class Rows:
    """A split of the rows of X."""

    name = "validation"
    digest = "the rows of X"
    labels = LABELS

    def __len__(self) -> int:
        return len(X)

    def read(self, indices: object = None) -> Samples:
        chosen = np.arange(len(X)) if indices is None else np.asarray(indices)
        return Samples({"x": X[chosen]}, LABELS[chosen], str(chosen.tolist()))


@dataclass
class Recorder:
    """Measures for real what an engine computes, and makes up all else; counts what it is asked.

    `wrong` is added to outputs; `failure` is raised instead of everything.
    """

    machine: Machine = Machine("a processor", (), 2, "Linux", {})  # noqa: RUF009 - frozen
    wrong: float = 0.0
    failure: Exception | None = None
    joules_of_a_run: float | None = None
    asked: list[str] = field(default_factory=list)

    def outputs(self, contender: Contender, batches: Iterable[Batch]) -> Iterator[Batch]:
        self._ask("outputs")
        for output in LocalMeasurer(takes_cores=False).outputs(contender, batches):
            yield {name: array + np.float32(self.wrong) for name, array in output.items()}

    def kernels(self, contender: Contender, batch: Batch, n_runs: int) -> Sequence[KernelTime]:
        self._ask(f"kernels of {len(batch['x'])} rows")
        return [KernelTime("z", "Gemm", "gemm", "fp32", 1.0)]

    def time(
        self,
        variant: Contender,
        baseline: Contender | None,
        inputs: Batch,
        batch_sizes: Sequence[int],
        *,
        effort: Effort,
        seed: int,
    ) -> Timing:
        against = "against another" if baseline else "alone"
        self._ask(f"time {variant.spec.instances} x {variant.spec.threads} {against}")
        return Timing(TIMES)

    def memory_bytes(self, contender: Contender, batch: Batch) -> int:
        self._ask(f"memory {contender.spec.instances} x {contender.spec.threads}")
        return 123

    def joules(self, contender: Contender, batch: Batch, seconds: float) -> float | None:
        self._ask("joules")
        return self.joules_of_a_run

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


@pytest.fixture
def variant(tmp_path: Path) -> StoredVariant:
    (tmp_path / "model").mkdir()
    linear(tmp_path / "model" / "model.onnx")
    model = engine_model(tmp_path / "model", EngineSpec("onnxruntime", "model.onnx"))
    return StoredVariant("v", "p", Step("compilation", "1", {}, 0), "", model, 0.0)


def evaluator(store: Store, measurer: Recorder) -> Evaluator:
    ticks = iter(range(10**6))
    inputs: dict[str, Array] = {"x": X}
    return Evaluator(store, measurer, 2, (1, 8), inputs, 0, clock=lambda: float(next(ticks)))


def test_evidence_is_measured_once_when_it_is_asked_for_twice(
    store: Store, variant: StoredVariant
) -> None:
    parent = onnx_model(variant.model.directory, "model.onnx")
    measurer = Recorder()
    first = evaluator(store, measurer)
    proof, timings = first.check(variant, parent), first.timings(variant, variant, 0.0)
    assert measurer.asked == [
        "outputs", "kernels of 8 rows", "time 2 x 1 against another", "time 1 x 1 alone",
        "time 1 x 2 alone",
    ]  # fmt: skip
    again = evaluator(store, Recorder(failure=RuntimeError("nothing is left to measure")))
    assert again.check(variant, parent) == proof
    assert again.timings(variant, variant, 0.0) == timings
    assert first.spent_s == {"parity": 1.0, "kernels": 1.0, "timing": 3.0}
    assert first.saved_s == {}
    assert again.saved_s == first.spent_s
    assert again.spent_s == {}


def test_outputs_come_with_their_samples_in_the_order_of_the_split(
    store: Store, variant: StoredVariant
) -> None:
    answered = list(evaluator(store, Recorder()).outputs(variant, Rows()))
    assert [len(outputs["y"]) for _, outputs in answered] == [8, 8, 5]
    for samples, outputs in answered:
        wanted = linear_by_hand(samples.inputs["x"])
        np.testing.assert_allclose(outputs["y"], wanted, rtol=1e-5)
    labels = [samples.labels for samples, _ in answered if samples.labels is not None]
    np.testing.assert_array_equal(np.concatenate(labels), LABELS)


def test_check_raises_the_same_mismatch_when_it_is_known(
    store: Store, variant: StoredVariant
) -> None:
    parent = onnx_model(variant.model.directory, "model.onnx")
    for measurer in (Recorder(wrong=0.5), Recorder()):
        with pytest.raises(ParityMismatch) as caught:
            evaluator(store, measurer).check(variant, parent)
        assert caught.value.batch_size == 1
    assert measurer.asked == []


def test_failure_of_an_engine_is_its_techniques_when_it_is_in_another_process(
    store: Store, variant: StoredVariant
) -> None:
    failing = evaluator(store, Recorder(failure=ContenderFailed("ended by SIGSEGV")))
    steps = (
        lambda: failing.timings(variant, variant, 0.0),
        lambda: list(failing.outputs(variant, Rows())),
        lambda: failing.memory_bytes(variant, 1, 1),
        lambda: failing.joules(variant, 1, 1),
    )
    for step in steps:
        with pytest.raises(TechniqueFailed, match=r"compilation failed: .* SIGSEGV"):
            step()
    assert failing.spent_s["timing"] == 1.0


def test_unreachable_target_is_nobodys_fault_when_it_is_measured_on(
    store: Store, variant: StoredVariant
) -> None:
    gone = evaluator(store, Recorder(failure=MeasurerUnavailable("agent", "gone")))
    with pytest.raises(MeasurerUnavailable):
        gone.timings(variant, variant, 0.0)


def test_memory_is_kept_by_configuration(store: Store, variant: StoredVariant) -> None:
    measurer = Recorder()
    measured = evaluator(store, measurer)
    assert [measured.memory_bytes(variant, *one) for one in ((1, 1), (2, 1), (1, 1))] == [123] * 3
    assert measurer.asked == ["memory 1 x 1", "memory 2 x 1"]


@pytest.mark.parametrize(("of_a_run", "of_a_row"), [(4.0, 0.5), (None, None)])
def test_energy_is_of_one_row_or_known_to_be_unknown(
    of_a_run: float | None, of_a_row: float | None, store: Store, variant: StoredVariant
) -> None:
    measurer = Recorder(joules_of_a_run=of_a_run)
    measured = evaluator(store, measurer)
    assert [measured.joules(variant, 1, 1) for _ in range(2)] == [of_a_row] * 2
    assert measurer.asked == ["joules"]
