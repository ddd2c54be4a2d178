"""What the page of a job shows, gathered: while it runs from its events, then from its result."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from loadtest.slo import Slo
from optimizer.contribution import contributions, layer_rows, layers_summary, slowest_layers
from optimizer.fusion_rows import fusion_rows, fusion_summary
from optimizer.pareto import pareto_front
from optimizer.result import ResultInvalid, StudyResult, from_json
from optimizer.service.auth import Caller, Scope
from optimizer.service.jobs import ENDED, OPEN, Job, Kind, State
from optimizer.service.operations import Details, NotThere, Operations
from optimizer.service.page.findings import Finding, findings, ranked, winner
from optimizer.service.page.lineage import Branch, lineage
from optimizer.service.page.plot import Plot, plot
from optimizer.service.publishing import Publication
from optimizer.service.records import MAX_PAGE, Query
from optimizer.service.reporting import summary
from optimizer.wording import details, headline

MAX_TRIALS = 4 * MAX_PAGE
"""Ended trials of a running study that are shown, the first of them."""
MAX_LOAD_TESTS = 50
LOG_PIECES, LOG_CHARS = 40, 30_000
"""The end of the log that is shown."""


@dataclass(frozen=True)
class Budget:
    """Spent of what there is; limits that nobody has said are None."""

    wall_clock_s: float = 0.0
    max_wall_clock_s: float | None = None
    trials: int = 0
    max_trials: int | None = None


@dataclass(frozen=True)
class Published:
    """A version of the job's, and the load tests of it, the newest first."""

    publication: Publication
    load_tests: tuple[Job, ...]

    @property
    def once(self) -> str:
        """The key of the next load test: a form that is sent twice starts one."""
        after = self.load_tests[0].id if self.load_tests else "first"
        return f"page-{self.publication.id}-{after}"


@dataclass(frozen=True)
class Actions:
    """What the caller may do with the job now; buttons for the rest aren't shown."""

    cancel: bool
    retry: bool
    publish: bool
    load_test: bool


@dataclass(frozen=True)
class Study:
    """What a study found so far. `result` is there when it has ended."""

    slo: Slo | None
    objective: str
    found: list[Finding]
    front: frozenset[str]
    best_id: str | None
    baseline_id: str | None
    plot: Plot | None
    ranking: list[Finding]
    winner: Finding | None
    """At the SLO's own limit."""
    lineage: Branch
    result: StudyResult | None
    sections: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobView:
    job: Job
    spec: Mapping[str, Any]
    progress: Mapping[str, Any]
    budget: Budget
    study: Study | None
    published: tuple[Published, ...]
    repositories: tuple[str, ...]
    children: tuple[Job, ...]
    actions: Actions
    log: str
    log_is_cut: bool
    load_test: Mapping[str, Any] | None

    @property
    def is_open(self) -> bool:
        return self.job.state in OPEN


def job_view(ops: Operations, caller: Caller, job_id: str) -> JobView:
    """Raises JobNotFound, Forbidden."""
    told = ops.details(caller, job_id)
    job = told.job
    held = ops.jobs(caller, Query(parent_id=job_id, limit=MAX_LOAD_TESTS))
    log, is_cut = _log(ops, caller, job)
    found = study(ops, caller, told) if job.kind is Kind.OPTIMIZATION else None
    return JobView(
        job=job,
        spec=told.spec.get("spec", told.spec),
        progress=told.progress,
        budget=_budget(told, found.result if found is not None else None),
        study=found,
        published=_published(ops, told, held),
        repositories=tuple(sorted(ops.publisher.repositories)),
        children=tuple(one for one in held if one.kind is Kind.OPTIMIZATION),
        actions=_actions(caller, told, tuple(ops.publisher.repositories)),
        log=log,
        log_is_cut=is_cut,
        load_test=told.progress.get("load_test"),
    )


def study(ops: Operations, caller: Caller, told: Details) -> Study:
    """Of an optimization, whatever its state."""
    job, spec = told.job, told.spec.get("spec", {})
    result = _result(ops, caller, job)
    slo: Slo | None
    if result is not None:
        summaries = [summary(one) for one in result.variants]
        slo, objective = result.slo, str(result.objective)
        front, best_id = pareto_front(result.variants), result.chosen.id if result.chosen else None
        baseline_id = result.baseline_id
    else:
        ended = _ended_trials(ops, caller, job)
        summaries = [one["variant"] for one in ended]
        slo, objective = _slo(spec), str(spec.get("objective", "cost"))
        last = told.progress.get("trial_ended") or (ended[-1] if ended else {})
        front, best_id, baseline_id = frozenset(last.get("front", ())), last.get("best"), None
    found = findings(summaries, objective)
    ranking = ranked(found, objective)
    return Study(
        slo=slo,
        objective=objective,
        found=found,
        front=front,
        best_id=best_id,
        baseline_id=baseline_id,
        plot=plot(found, slo, objective, front, baseline_id) if slo is not None else None,
        ranking=ranking,
        winner=winner(ranking, slo.latency.threshold_s) if slo is not None else None,
        lineage=lineage(found, result.model if result is not None else job.name),
        result=result,
        sections=_sections(result) if result is not None else {},
    )


def _sections(result: StudyResult) -> dict[str, Any]:
    """What the report shows as well, and only an ended study knows."""
    return {
        "headline": headline(result),
        "details": details(result),
        "contributions": contributions(result),
        "layers": layer_rows(result.layers),
        "slowest": slowest_layers(result.layers),
        "layers_summary": layers_summary(result.layers),
        "fusions": fusion_rows(result.fusions)[:16],
        "fusion_summary": fusion_summary(result.fusions),
    }


def _result(ops: Operations, caller: Caller, job: Job) -> StudyResult | None:
    if job.state is not State.SUCCEEDED:
        return None
    try:
        return from_json(ops.result(caller, job.id), f"result of job {job.id}")
    except (NotThere, ResultInvalid):
        return None


def _ended_trials(ops: Operations, caller: Caller, job: Job) -> list[Mapping[str, Any]]:
    """Payloads; those of an earlier run count, since what it measured isn't measured again."""
    found: list[Mapping[str, Any]] = []
    after = 0
    while len(found) < MAX_TRIALS:
        events = ops.events(caller, job.id, after, MAX_PAGE, kind="trial_ended")
        found += [event.payload for event in events]
        if len(events) < MAX_PAGE:
            break
        after = events[-1].number
    return found


def _slo(spec: Mapping[str, Any]) -> Slo | None:
    try:
        return Slo.model_validate(spec.get("slo"))
    except ValidationError:
        return None


def _budget(told: Details, result: StudyResult | None) -> Budget:
    if result is not None:
        used = result.budget
        return Budget(used.wall_clock_s, used.max_wall_clock_s, used.trials, used.max_trials)
    spec = told.spec.get("spec", {})
    asked = spec.get("budget") if isinstance(spec, Mapping) else None
    asked = asked if isinstance(asked, Mapping) else {}
    limits = (told.spec.get("wall_clock_s"), asked.get("trials"))
    spent = told.progress.get("trial_ended", {}).get("budget")
    return budget_of(spent, *limits) if told.job.kind is Kind.OPTIMIZATION else Budget()


def budget_of(
    spent: Mapping[str, Any] | None,
    max_wall_clock_s: float | None = None,
    max_trials: int | None = None,
) -> Budget:
    """`spent` is that of an event `trial_ended`."""
    if spent is None:
        return Budget(0.0, max_wall_clock_s, 0, max_trials)
    return Budget(
        spent["wall_clock_s"], spent["max_wall_clock_s"], spent["trials"], spent["max_trials"]
    )


def _published(ops: Operations, told: Details, held: list[Job]) -> tuple[Published, ...]:
    tests: dict[str, list[Job]] = {}
    for one in held:
        if one.kind is Kind.LOAD_TEST:
            tests.setdefault(str(ops.ledger.spec(one.id).get("publication")), []).append(one)
    return tuple(Published(one, tuple(tests.get(one.id, ()))) for one in told.publications)


def _actions(caller: Caller, told: Details, repositories: tuple[str, ...]) -> Actions:
    job = told.job
    is_own = caller.may(Scope.SUBMIT) and (
        job.owner == caller.subject or Scope.ADMIN in caller.scopes
    )
    has_version = bool(told.progress.get("made", {}).get("has_version"))
    return Actions(
        cancel=is_own and job.state in OPEN and job.state is not State.CANCELLING,
        retry=is_own and job.state in ENDED,
        publish=caller.may(Scope.PUBLISH)
        and job.kind is Kind.OPTIMIZATION
        and job.state is State.SUCCEEDED
        and has_version
        and bool(repositories),
        load_test=caller.may(Scope.PUBLISH),
    )


def _log(ops: Operations, caller: Caller, job: Job) -> tuple[str, bool]:
    """Its end, and whether there is more."""
    start = max(0, job.n_logs - LOG_PIECES)
    text = "".join(one.text for one in ops.logs(caller, job.id, start, LOG_PIECES))
    return text[-LOG_CHARS:], start > 0 or len(text) > LOG_CHARS


def spec_text(spec: Mapping[str, Any]) -> str:
    return json.dumps(spec, indent=1, ensure_ascii=False)
