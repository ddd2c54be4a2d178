"""The study: from a spec to the cheapest variant that keeps the SLO.

Trials build, measure and judge variants; then the best are verified on the real server, and the
first that keeps its promise there meets the locked test split and is published. What fails is
reported by name and the rest goes on. Everything measured is in the store, so a study that is
started again continues, and the same records end in the same choice.
"""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from loadtest.slo import Slo
from optimizer.builder import Builder
from optimizer.choice import nearest_miss, ranked
from optimizer.data.splits import DataSplits, Samples, Split, load_splits
from optimizer.errors import SpecInvalid
from optimizer.evaluator import Evaluator
from optimizer.finals import Finals
from optimizer.kernels import n_quantized
from optimizer.model_source import check_model, read_signature, source_digest
from optimizer.observer import Observer, Silent, Standing
from optimizer.pareto import pareto_front
from optimizer.result import (
    BudgetUsed,
    NearestMiss,
    Outcome,
    StudyResult,
    Target,
    Variant,
)
from optimizer.search.coordinator import Coordinator
from optimizer.search.landscape import remembered
from optimizer.spec import OnnxSource, Spec, read_spec
from optimizer.store import DEFAULT_PATH, Store
from optimizer.techniques import TECHNIQUES, Context, Technique, load_technique
from optimizer.timing import Effort
from optimizer.trials import Trials
from optimizer.variant import source_model
from optimizer.verify import ServerVerifier, Verifier
from serve.artifact import check_model_name
from serve.machine import allowed_cores, this_machine
from serve.tensor import Array

MAX_BATCH_SIZE = 32
"""The largest batch that is measured and served. Throughput is flat beyond it on CPUs."""
N_GOLDEN = 3
N_TIMED_SAMPLES = 256
_N_CHECKED = 8
BATCH_SIZES = (1, 2, 4, 8, 16, MAX_BATCH_SIZE)
_PACKAGES = ("trimserve", "torch", "onnx", "onnxruntime", "openvino", "optuna", "numpy")
_ALWAYS = ("export",)
"""Techniques that are steps of every recipe and no optimization, so a spec can't leave them out."""


@dataclass(frozen=True)
class Options:
    """How a study is run, beside what the spec asks.

    `verifier` None means the real server and load test of this machine; `verify` False leaves
    the answer unverified. `techniques` are those of the table without it.
    """

    store: Path = DEFAULT_PATH
    verify: bool = True
    verifier: Verifier | None = None
    observer: Observer = field(default_factory=Silent)
    techniques: Mapping[str, Technique] | None = None
    effort: Effort = field(default_factory=Effort)
    command: tuple[str, ...] = ()
    clock: Callable[[], float] = time.monotonic


def optimize(
    spec: Path | str | Spec, repository: Path | str, options: Options | None = None
) -> StudyResult:
    """Find the cheapest variant that keeps the spec's SLO, and publish it to `repository`.

    Nothing is written there unless the outcome is met, or unverified where that was asked for.
    Raises SpecInvalid for what the spec's author has to change, StoreInvalid, and
    serve.errors.ArtifactInvalid where the repository can't take the version.
    """
    options = options or Options()
    spec = spec if isinstance(spec, Spec) else read_spec(Path(spec))
    with tempfile.TemporaryDirectory(prefix="trimserve-study-") as scratch:
        study = _Study(spec, Path(repository), options, Path(scratch))
        return study.run()


class _Study:
    """One run. What it holds is filled in from the top down by `run`."""

    def __init__(self, spec: Spec, repository: Path, options: Options, scratch: Path) -> None:
        self._spec = spec
        self._repository = repository
        self._options = options
        self._observer = options.observer
        self._scratch = scratch
        self._machine = this_machine()
        self._cores = spec.target.cores or allowed_cores()
        self._start_s = options.clock()
        self._notes: list[str] = []

    def run(self) -> StudyResult:
        self._check_surroundings()
        self._observer.phase("reading model and data")
        splits = self._read_data()
        too_few = _too_few_samples(self._spec, splits.validation)
        if not too_few and self._options.verify:
            too_few = _too_few_requests(self._spec.slo)
        if too_few:
            self._note(too_few)
            return self._result("inconclusive", splits, [])
        with Store(self._options.store) as store:
            trials = self._trials(store, splits)
            complete = self._search(trials)
            return self._conclude(trials, splits, complete)

    def _check_surroundings(self) -> None:
        """What would otherwise fail only after the budget was spent."""
        if self._cores > allowed_cores():
            raise SpecInvalid(
                str(self._spec.source),
                [f"target.cores: got {self._cores}, want at most {allowed_cores()}: variants are "
                 "timed on this machine"],
            )  # fmt: skip
        check_model_name(self._spec.name)
        if self._repository.exists() and not self._repository.is_dir():
            raise NotADirectoryError(f"{self._repository}: want a directory for the repository")

    def _read_data(self) -> DataSplits:
        spec = self._spec
        splits = load_splits(spec.data, read_signature(spec.model).input_names, spec.seed)
        check_model(spec.model, _first(splits.validation, _N_CHECKED), splits.n_classes)
        if spec.slo.accuracy is not None and splits.validation.labels is None:
            raise SpecInvalid(
                str(spec.source),
                ["data: has no labels, but the SLO has an accuracy objective: "
                 "want labels (data.columns.label), or an SLO without it"],
            )  # fmt: skip
        return splits

    def _trials(self, store: Store, splits: DataSplits) -> Trials:
        spec = self._spec
        inputs = _first(splits.validation, N_TIMED_SAMPLES).inputs
        techniques = self._options.techniques or _enabled_techniques(spec)
        context = Context(splits.calibration, self._machine, spec.seed, MAX_BATCH_SIZE)
        base = source_model(spec.model, source_digest(spec.model), _precision(spec))
        builder = Builder(store, base, techniques, context, inputs)
        evaluator = Evaluator(
            store=store,
            machine=self._machine,
            cores=self._cores,
            batch_sizes=BATCH_SIZES,
            inputs=inputs,
            validation=splits.validation,
            seed=spec.seed,
            effort=self._options.effort,
        )
        return Trials(spec, builder, evaluator)

    def _search(self, trials: Trials) -> bool:
        """Run trials until the budget or the space is exhausted; whether all baselines were
        tried."""
        budget, builder = self._spec.budget, trials.builder
        coordinator = Coordinator(
            remembered(builder.options), builder.base.kind, builder.variant_id, self._spec.seed
        )
        self._observer.phase("searching")
        for trial in coordinator.trials():
            if len(trials.rows) >= budget.trials or self._spent_s() >= budget.wall_clock_s:
                return not trial.is_baseline
            self._observer.trial_began(budget.trials, builder.label(trial.recipe))
            coordinator.tell(trial, trials.run(trial))
            self._observer.trial_ended(trials.rows[-1], self._standing(trials))
        return True

    def _standing(self, trials: Trials) -> Standing:
        rows = trials.rows
        best = ranked(rows, self._spec.objective)
        dropped = Counter[str](reason.constraint for row in rows for reason in row.reasons[:1])
        ids = pareto_front(rows)
        front = [row for row in rows if row.id in ids]
        return Standing(self._budget(len(rows)), best[0] if best else None, front, dropped)

    def _budget(self, n_trials: int) -> BudgetUsed:
        budget = self._spec.budget
        return BudgetUsed(self._spent_s(), budget.wall_clock_s, n_trials, budget.trials)

    def _conclude(self, trials: Trials, splits: DataSplits, complete: bool) -> StudyResult:
        rows = trials.rows
        if any(row.speedup is not None and row.speedup.noisy for row in rows):
            self._note("the machine was too noisy to rank some variants by their speed")
        for name, reason in trials.builder.refusals.items():
            self._note(f"{name} was left out: {reason}")
        if not complete:
            self._note("the budget ended before every baseline was tried")
        finals = Finals(
            spec=self._spec,
            trials=trials,
            test=splits.test,
            golden_inputs=_first(splits.validation, N_GOLDEN).inputs,
            repository=self._repository,
            scratch=self._scratch,
            verifier=self._verifier(trials.builder.inputs),
            observer=self._observer,
        )
        outcome = finals.run()
        self._notes += finals.notes
        if outcome == "infeasible" and not complete:
            outcome = "inconclusive"
        baseline_id = trials.baseline.id if trials.baseline else ""
        return self._result(outcome, splits, finals.rows, baseline_id, len(rows))

    def _verifier(self, inputs: Mapping[str, Array]) -> Verifier | None:
        options = self._options
        if not options.verify or options.verifier is not None:
            return options.verifier if options.verify else None
        path = self._scratch / "inputs.npz"
        np.savez(path, allow_pickle=False, **dict(inputs))
        return ServerVerifier(cores=self._cores, inputs=path, seed=self._spec.seed)

    def _result(
        self,
        outcome: Outcome,
        splits: DataSplits,
        rows: list[Variant],
        baseline_id: str = "",
        n_trials: int = 0,
    ) -> StudyResult:
        spec = self._spec
        miss: NearestMiss | None = None
        if outcome in ("infeasible", "inconclusive"):
            miss = nearest_miss(rows)
        return StudyResult(
            model=spec.name,
            slo=spec.slo,
            objective=spec.objective,
            outcome=outcome,
            variants=tuple(rows),
            baseline_id=baseline_id,
            target=Target(spec.target.device, self._cores, spec.target.price_per_core_hour),
            machine=self._machine,
            spec_digest=_spec_digest(spec),
            data_digests={
                split.name: split.digest
                for split in (splits.train, splits.calibration, splits.validation, splits.test)
            },
            seeds={"study": spec.seed},
            budget=self._budget(n_trials),
            versions={name: version for name in _PACKAGES if (version := _version(name))},
            command=self._options.command,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            nearest_miss=miss,
            notes=tuple(self._notes),
        )

    def _spent_s(self) -> float:
        return self._options.clock() - self._start_s

    def _note(self, message: str) -> None:
        self._notes.append(message)
        self._observer.note(message)


def _too_few_samples(spec: Spec, validation: Split) -> str:
    """Why no variant could be shown to keep its accuracy, however good; empty otherwise."""
    accuracy = spec.slo.accuracy
    if accuracy is None or len(validation) >= accuracy.min_samples():
        return ""
    drop = f"{accuracy.max_drop_points:g} points"
    return (
        f"data.validation has {len(validation)} samples, but a drop of at most {drop} "
        f"can't be shown by a bound at {accuracy.confidence:.0%} with fewer than "
        f"{accuracy.min_samples()}: give more, allow a larger drop, or set judged_by: estimate"
    )


def _too_few_requests(slo: Slo) -> str:
    """Why no load test could show the latency quantile; empty otherwise. With several replicas it
    takes more: then the load test says so."""
    if slo.planned_requests() >= slo.min_requests():
        return ""
    return (
        f"workload.rate_per_s x window_s of the SLO are {slo.planned_requests():.4g} requests, but "
        f"a quantile of {slo.latency.quantile:g} can't be shown with fewer than "
        f"{slo.min_requests()}: want a longer window_s"
    )


def _precision(spec: Spec) -> str:
    """Of the model as it is given: an ONNX file may be quantized already."""
    given = spec.model
    return "int8" if isinstance(given, OnnxSource) and n_quantized(given.path) else "fp32"


def _enabled_techniques(spec: Spec) -> dict[str, Technique]:
    """Those of the table that the spec enables, and those that every recipe needs."""
    names = [name for name in TECHNIQUES if name in (*_ALWAYS, *spec.techniques.enabled)]
    return {name: load_technique(name) for name in names}


def _first(split: Split, n: int) -> Samples:
    """The first `n` samples, over and over where there are fewer."""
    return split.read(np.arange(n) % len(split))


def _spec_digest(spec: Spec) -> str:
    digest = hashlib.sha256()
    for path in (spec.source, spec.slo_path):
        digest.update(path.read_bytes() if path.is_file() else repr(spec).encode())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
