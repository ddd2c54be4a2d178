"""The study: from a spec to the cheapest variant that keeps the SLO.

Trials build, measure and judge variants; then the best are verified on the real server, and the
first that keeps its promise there meets the locked test split and is published. What fails is
reported by name and the rest goes on. Everything measured is in the store, so a study that is
started again continues, and the same records end in the same choice.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.architectures import architectures
from optimizer.ascent import Surroundings as Met
from optimizer.blocks import Block
from optimizer.choice import nearest_miss, ranked
from optimizer.data.generated import NOTE as GENERATED
from optimizer.data.splits import DataSplits
from optimizer.errors import TechniqueFailed
from optimizer.estimates import Estimates
from optimizer.evaluator import Evaluator
from optimizer.execution.cluster import Cluster
from optimizer.execution.delegation import DelegatingBuilder
from optimizer.execution.setup import (
    MAX_BATCH_SIZE,
    Surroundings,
    enabled_techniques,
    first,
    read_data,
)
from optimizer.finals import Finals
from optimizer.findings import Findings
from optimizer.front_end import front_end_from, measured_front_end, read_lesson
from optimizer.identity import package_versions, spec_digest, study_id
from optimizer.judgement import Judgement
from optimizer.observer import Observer, Silent, Standing
from optimizer.pareto import pareto_front
from optimizer.places import Places
from optimizer.preflight import (
    refuse_contradictions,
    refuse_lost_output,
    why_left_out,
    why_undecidable,
)
from optimizer.result import BudgetUsed, Outcome, StudyResult, Target, Variant
from optimizer.search.coordinator import Answer, Coordinator, Trial
from optimizer.search.ladder import Rung, rung_records
from optimizer.search.landscape import remembered
from optimizer.serving import Serving
from optimizer.simulation import FrontEnd
from optimizer.spec import NOT_RESUMABLE, ModuleSource, Spec, read_spec
from optimizer.store import DEFAULT_PATH, Store
from optimizer.tasks import make_task
from optimizer.techniques import Sampled, Technique
from optimizer.timing import Effort
from optimizer.trials import Trials
from optimizer.turns import Relay, Turns, at_once
from optimizer.variant import STRUCTURAL
from optimizer.verify import ServerVerifier, Verifier
from optimizer.warm_start import first_decisions
from serve.tensor import Array

N_GOLDEN = 3
DEFAULT_CONFIDENCE = 0.95
"""Of the drop's interval, where the SLO has no accuracy objective."""
BATCH_SIZES = (1, 2, 4, 8, 16, MAX_BATCH_SIZE)
MAX_RULED_OUT = 2_000
"""Recipes in a row that are ruled out by estimate, after which the space counts as exhausted."""
TABLE_SHARE = 0.2
"""Of the budget's time, for the layers that techniques want to know the times of."""
WRITING_SHARE = 0.7
"""Of the time left for a table, to write the networks that are timed whole; the rest times them."""


@dataclass(frozen=True)
class Options:
    """How a study is run, beside what the spec asks.

    `store` is a SQLite file or a URL, `artifacts` the folder of its artifacts where that isn't
    beside it. `verifier` None means the real server and load test of this machine; `verify` False
    leaves the answer unverified. `techniques` are those of the table without it. With `isolate`,
    building and measuring are done in processes of their own, which a study can have that was
    given as a file, with techniques that the spec names. `trials_at_once` goes before the spec's.
    With a `cluster` both are done on its nodes.
    """

    store: Path | str = DEFAULT_PATH
    artifacts: Path | None = None
    verify: bool = True
    verifier: Verifier | None = None
    observer: Observer = field(default_factory=Silent)
    techniques: Mapping[str, Technique] | None = None
    effort: Effort = field(default_factory=Effort)
    command: tuple[str, ...] = ()
    clock: Callable[[], float] = time.monotonic
    isolate: bool = True
    trials_at_once: int | None = None
    cluster: Cluster | None = None
    from_report: Path | None = None
    """A load test's violated report, from which the model of the overheads is corrected."""


def optimize(
    spec: Path | str | Spec,
    repository: Path | str,
    options: Options | None = None,
    model: ModuleSource | None = None,
) -> StudyResult:
    """Find the cheapest variant that keeps the spec's SLO, and publish it to `repository`.

    `model` is an object that stands in for the spec's; such a study can't be resumed elsewhere.
    Nothing is written there unless the outcome is met, or unverified where that was asked for.
    Raises SpecInvalid for what the spec's author has to change, StoreInvalid,
    MeasurerUnavailable where the target's agent can't be used, NoExecutor where the cluster can't,
    serve.errors.ArtifactInvalid where the repository can't take the version, and ValueError for a
    cluster that can't be one, or with spec, model or techniques that only this process has.
    """
    options = options or Options()
    if isinstance(spec, Spec) or model is not None or options.techniques is not None:
        options = replace(options, isolate=False)
    if options.cluster is not None:
        if not options.isolate:
            raise ValueError("cluster: want a spec that is a file, and nothing given as an object")
        if problems := options.cluster.problems():
            raise ValueError("; ".join(f"cluster.{problem}" for problem in problems))
    spec = spec if isinstance(spec, Spec) else read_spec(Path(spec), model=model)
    if model is not None:
        spec = replace(spec, model=model)
    with tempfile.TemporaryDirectory(prefix="trimserve-study-") as scratch:
        return _Study(spec, Path(repository), options, Path(scratch)).run()


class _Study:
    """One run. What it holds is filled in from the top down by `run`."""

    def __init__(self, spec: Spec, repository: Path, options: Options, scratch: Path) -> None:
        self._spec = spec
        self._repository = repository
        self._options = options
        self._observer = options.observer
        self._scratch = scratch
        self._start_s = options.clock()
        self._notes: list[str] = []
        self._n_at_once = options.trials_at_once or spec.budget.trials_at_once
        self._turns, self._relay = Turns(), Relay()
        self._is_stopped = threading.Event()
        self._places = Places(
            spec=spec,
            store=options.store,
            artifacts=options.artifacts,
            isolate=options.isolate,
            cluster=options.cluster,
            n_at_once=self._n_at_once,
            turns=self._turns,
            told=self._step_told,
            lost=self._executor_lost,
        )

    def run(self) -> StudyResult:
        if self._options.cluster is not None:
            self._observer.phase("joining the Ray cluster")
        with self._places.opened() as measurer:
            self._measurer = measurer
            self._machine = measurer.machine
            self._cores = self._spec.target.cores or self._machine.cores
            refuse_contradictions(self._spec, self._repository, self._measurer)
            report = self._options.from_report
            self._lesson = (
                read_lesson(report, self._repository, self._machine) if report is not None else None
            )
            self._observer.phase("reading model and data")
            splits = read_data(self._spec)
            if splits.train is None:
                self._note(GENERATED)
            has_labels = splits.validation.labels is not None
            self._task = make_task(self._spec.task, has_labels=has_labels)
            refuse_lost_output(self._spec, self._task)
            undecidable = why_undecidable(self._spec, self._task, splits, self._options.verify)
            if undecidable:
                self._note(undecidable)
                return self._result("inconclusive", splits, [], None)
            if isinstance(self._spec.model, ModuleSource):
                self._note(NOT_RESUMABLE)
            if self._options.verify and not self._places.serves_here(self._machine):
                measures = "on target.agent" if self._spec.target.agent else "where it was measured"
                self._note(
                    f"the load test runs on this machine, not {measures}: a verdict says nothing "
                    "of the target"
                )
            with Store(self._options.store, self._options.artifacts) as store:
                return self._led(store, splits)

    def _led(self, store: Store, splits: DataSplits) -> StudyResult:
        with self._builder(store, splits) as builder:
            named = self._spec.techniques.named
            left_out = why_left_out(builder.techniques, named, builder.base.kind)
            for name, reason in left_out.items():
                self._note(f"{name} was left out: {reason}")
            trials = self._trials(store, splits, builder)
            complete = self._search(trials)
            return self._conclude(trials, splits, complete)

    @contextmanager
    def _builder(self, store: Store, splits: DataSplits) -> Iterator[DelegatingBuilder]:
        spec, options = self._spec, self._options
        techniques = options.techniques or enabled_techniques(spec)
        shared = Surroundings(spec, splits, self._machine, techniques)
        executor = self._places.executor(shared, store, self._measurer)
        try:
            executor.start()
            yield DelegatingBuilder(
                store, shared.base, techniques, shared.context, shared.inputs, executor=executor
            )
        finally:
            executor.close()

    def _step_told(self, message: str) -> None:
        self._relay(lambda: self._observer.step_told(message))

    def _executor_lost(self, message: str) -> None:
        self._relay(lambda: self._note(f"{message}; its work went elsewhere"))

    def _trials(self, store: Store, splits: DataSplits, builder: DelegatingBuilder) -> Trials:
        spec = self._spec
        evaluator = Evaluator(
            store=store,
            measurer=self._measurer,
            cores=self._cores,
            batch_sizes=BATCH_SIZES,
            inputs=builder.inputs,
            seed=spec.seed,
            effort=self._options.effort,
        )
        serving = Serving(spec, self._cores, self._front_end(store, builder.inputs))
        name = study_id(spec, builder, splits, self._machine, serving)
        base_id = builder.base.digest
        stages = {technique.traits.stage for technique in builder.techniques.values()}
        estimates = (
            Estimates(spec, store, self._measurer, base_id, self._cores, builder.blocks)
            if stages & set(STRUCTURAL)
            else None
        )
        if estimates is not None:
            self._time_layers(estimates, builder)
        accuracy = spec.slo.accuracy
        judgement = Judgement(
            evaluator,
            self._task,
            accuracy.confidence if accuracy else DEFAULT_CONFIDENCE,
            spec.seed,
        )
        trials = Trials(
            spec, builder, evaluator, judgement, serving, splits.validation, name, estimates,
            self._options.clock,
        )  # fmt: skip
        trials.recall()
        return trials

    def _time_layers(self, estimates: Estimates, builder: DelegatingBuilder) -> None:
        """For techniques that are shaped by the target's times; one that fails here is told when
        its space is asked for. Each has an equal share of what the others have left."""
        clock = self._options.clock
        end_s = clock() + TABLE_SHARE * self._spec.budget.wall_clock_s
        wanted: dict[str, Sequence[Block]] = {}
        for name in builder.techniques:
            with suppress(TechniqueFailed):
                wanted[name] = builder.timed_blocks(name)
        wanted = {name: blocks for name, blocks in wanted.items() if blocks}
        for n_left, name in zip(range(len(wanted), 0, -1), wanted, strict=True):
            now_s = clock()
            with suppress(TechniqueFailed):
                own_end_s = now_s + (end_s - now_s) / n_left
                self._time_table(name, wanted[name], estimates, builder, own_end_s)

    def _time_table(
        self,
        name: str,
        wanted: Sequence[Block],
        estimates: Estimates,
        builder: DelegatingBuilder,
        end_s: float,
    ) -> None:
        """The layers that a technique wants, then its networks, until then."""
        clock = self._options.clock
        self._observer.phase(f"timing {len(wanted)} layers for {name}")
        n_known = estimates.measure(wanted, lambda: clock() < end_s)
        if n_known < len(wanted):
            self._note(
                f"{name}: {n_known} of {len(wanted)} layers could be timed in its share of "
                f"{TABLE_SHARE:.0%} of budget.wall_clock_s, so it goes without the table"
            )
        elif isinstance(builder.techniques[name], Sampled):
            self._observer.phase(f"timing whole networks for {name}")
            networks = builder.timed_networks(name, WRITING_SHARE * (end_s - clock()))
            estimates.measure_networks(networks, builder.inputs, lambda: clock() < end_s)

    def _front_end(self, store: Store, inputs: Mapping[str, Array]) -> FrontEnd:
        """The model of what serving costs beside the engine."""
        options, front_end = self._options, FrontEnd()
        is_here = self._places.serves_here(self._machine)
        if options.verify and options.verifier is None and is_here:
            self._observer.phase("measuring the server's own cost")
            n_values = sum(array[0].size for array in inputs.values())
            front_end = measured_front_end(
                store, self._machine, self._cores, self._spec, n_values, self._note
            )
        if self._lesson is None:
            return front_end
        self._observer.phase("learning from the load test")
        return front_end_from(self._lesson, self._cores, front_end)

    def _search(self, trials: Trials) -> bool:
        """Run trials until the budget or the space is exhausted; whether all baselines were
        tried."""
        builder, budget = trials.builder, self._spec.budget
        coordinator = Coordinator(
            remembered(builder.options),
            builder.base.kind,
            builder.ids,
            self._spec.seed,
            self._spec.search.sampler,
            first=first_decisions(builder.store, trials.study_id, builder.base.digest, self._spec),
        )
        self._observer.phase("searching")
        n_ruled_out = 0

        def has_budget() -> bool:
            return len(trials.rows) < budget.trials and self._spent_s() < budget.wall_clock_s

        def size() -> int:
            if trials.baseline is None:  # nothing can be compared yet
                return 1
            return min(self._n_at_once, budget.trials - len(trials.rows))

        for batch in coordinator.batches(size, has_budget):
            if not has_budget():
                return not batch[0].is_baseline
            n_before = len(trials.rows)
            for trial, answer in self._answers(batch, trials):
                coordinator.tell(trial, answer)
                n_ruled_out = 0 if len(trials.rows) > n_before else n_ruled_out + 1
                n_before = len(trials.rows)
            if n_ruled_out >= MAX_RULED_OUT:
                self._note(f"the last {n_ruled_out} recipes were ruled out by estimate")
                return True
        return True

    def _answers(self, batch: Sequence[Trial], trials: Trials) -> Iterator[tuple[Trial, Answer]]:
        """Of the log where it has the trials, else by running them; in their order."""
        entries = {one.number: trials.logged(one) for one in batch}
        ended: Iterator[Answer]
        if len(batch) == 1:
            ended = (self._answer(one, entries[one.number], trials) for one in batch)
        else:
            ended = self._answers_at_once(batch, entries, trials)
        n_before = len(trials.rows)
        for trial, answer in zip(batch, ended, strict=True):
            if len(trials.rows) > n_before:
                self._observer.trial_ended(trials.rows[-1], self._standing(trials))
            n_before = len(trials.rows)
            yield trial, answer

    def _answer(self, trial: Trial, entry: Mapping[str, Any] | None, trials: Trials) -> Answer:
        if entry is not None:
            answer = trials.replay(entry)
            self._go_on_at(entry["spent_s"])
            return answer
        self._began(trial, trials)
        return trials.run(trial, self._climbed, self._spent_s)

    def _answers_at_once(
        self,
        batch: Sequence[Trial],
        entries: dict[int, Mapping[str, Any] | None],
        trials: Trials,
    ) -> Iterator[Answer]:
        spent_s = [entry["spent_s"] for entry in entries.values() if entry is not None]
        if spent_s:
            self._go_on_at(max(spent_s))
        given = trials.surroundings_of(batch, self._climbed)
        todo = [
            (one, met) for one, met in zip(batch, given, strict=True) if not entries[one.number]
        ]

        def run(trial: Trial, met: Met) -> Mapping[str, Any]:
            self._relay(lambda: self._began(trial, trials))
            ascent = trials.ascent(trial, met)
            ended = ascent.run()
            if self._is_stopped.is_set():
                raise InterruptedError("the study is ending, and the trial failed of that perhaps")
            return trials.log_end(trial, ascent, ended, self._spent_s())

        # In threads of their own, in which they are parts of what this one is in.
        jobs = [partial(copy_context().run, run, trial, met) for trial, met in todo]
        if self._places.n == 1:
            made = [job() for job in jobs]
        else:
            made = at_once(jobs, self._turns, self._relay, self._stop)
        entries |= {trial.number: entry for (trial, _), entry in zip(todo, made, strict=True)}
        for trial in batch:
            entry = entries[trial.number]
            assert entry is not None
            yield trials.conclude(trial, entry, batch[-1].number)

    def _began(self, trial: Trial, trials: Trials) -> None:
        self._observer.trial_began(self._spec.budget.trials, trials.builder.label(trial.recipe))

    def _climbed(self, rung: Rung) -> None:
        self._relay(lambda: self._observer.trial_climbed(rung.number, rung.title))

    def _stop(self) -> None:
        self._is_stopped.set()
        for stop in self._places.stops:
            stop()

    def _go_on_at(self, spent_s: float) -> None:
        self._start_s = self._options.clock() - spent_s

    def _standing(self, trials: Trials) -> Standing:
        rows = trials.rows
        best = ranked(rows, self._spec.objective)
        dropped = Counter[str](reason.constraint for row in rows for reason in row.reasons[:1])
        ids = pareto_front(rows)
        front = [row for row in rows if row.id in ids]
        return Standing(self._budget(trials), best[0] if best else None, front, dropped)

    def _budget(self, trials: Trials | None) -> BudgetUsed:
        budget = self._spec.budget
        return BudgetUsed(
            self._spent_s(),
            budget.wall_clock_s,
            len(trials.rows) if trials else 0,
            budget.trials,
            trials.epochs if trials else 0.0,
            budget.training_epochs,
            trials.n_screened if trials else 0,
        )

    def _conclude(self, trials: Trials, splits: DataSplits, complete: bool) -> StudyResult:
        if any(row.speedup is not None and row.speedup.noisy for row in trials.rows):
            self._note("the machine was too noisy to rank some variants by their speed")
        if trials.estimates is not None:
            for family, one in trials.estimates.trusts().items():
                self._note(
                    f"{family}: the table of layers ranks {one.n_networks} networks with a "
                    f"correlation of {one.rank_correlation:.2f} to their measured times, and is "
                    f"{one.relative_error:.0%} off on average"
                )
        for name, reason in trials.builder.refusals.items():
            self._note(f"{name} was left out: {reason}")
        if not complete:
            self._note("the budget ended before every baseline was tried")
        if trials.rows and trials.baseline is None:
            self._note(f"no variant could be built: {trials.rows[0].reasons[0].detail}")
        finals = Finals(
            spec=self._spec,
            trials=trials,
            test=splits.test,
            golden_inputs=first(splits.validation, N_GOLDEN).inputs,
            repository=self._repository,
            scratch=self._scratch,
            verifier=self._verifier(trials.builder.inputs),
            observer=self._observer,
            command=self._options.command,
        )
        outcome = finals.run()
        self._notes += finals.notes
        if outcome == "infeasible" and not complete:
            outcome = "inconclusive"
        self._observer.phase("what each step contributed")
        has_time = self._spent_s() < self._spec.budget.wall_clock_s
        findings = Findings(self._spec, trials, finals.rows, self._measurer)
        found = findings.found(outcome, has_time)
        result = self._result(outcome, splits, found.rows, trials)
        return replace(
            result,
            rungs=(*result.rungs, *finals.rungs),
            relaxations=found.relaxations,
            ablations=found.ablations,
            layers=found.layers,
            fusions=found.fusions,
            architectures=architectures((row.id for row in found.rows), trials.builder),
        )

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
        trials: Trials | None,
    ) -> StudyResult:
        spec = self._spec
        missed = outcome in ("infeasible", "inconclusive")
        return StudyResult(
            model=spec.name,
            slo=spec.slo,
            objective=spec.objective,
            outcome=outcome,
            variants=tuple(rows),
            baseline_id=trials.baseline.id if trials and trials.baseline else "",
            target=Target(spec.target.device, self._cores, spec.target.price_per_core_hour),
            machine=self._machine,
            spec_digest=spec_digest(spec),
            data_digests={
                split.name: split.digest
                for split in (splits.train, splits.calibration, splits.validation, splits.test)
                if split is not None
            },
            seeds={"study": spec.seed},
            budget=self._budget(trials),
            rungs=rung_records(trials.climbs) if trials else (),
            versions=package_versions(),
            command=self._options.command,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            nearest_miss=nearest_miss(rows) if missed else None,
            notes=tuple(self._notes),
        )

    def _spent_s(self) -> float:
        return self._options.clock() - self._start_s

    def _note(self, message: str) -> None:
        self._notes.append(message)
        self._observer.note(message)
