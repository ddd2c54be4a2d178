"""The life of a job: its states, and what may happen to it in each.

Pure: a job and what happens to it give the job afterwards. Whoever stores jobs calls these
functions inside of a transaction, and nothing else changes a job's state.

    queued ─claim─► running ─end─► succeeded | failed
      ▲  ▲            │ │
      │  └──release───┘ └─ask_cancel─► cancelling ─end─► cancelled
      └─retry── failed, cancelled, succeeded             (any of these three) ─delete─► deleted

A worker owns a running job by a lease: a token that is good until a moment. It renews it while it
lives; where it doesn't, the job goes back to the queue, and whatever the old worker still says is
refused by its token. So a job may be begun several times and is ended once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"


ACTIVE: Final = frozenset({State.RUNNING, State.CANCELLING})
"""A worker holds a lease."""
ENDED: Final = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
OPEN: Final = frozenset({State.QUEUED}) | ACTIVE
"""Counted by quotas."""
DEFAULT_ATTEMPTS: Final = 3
"""Workers that may be lost in a row with a job that gets no further, before it counts as failed."""
JOB_ID: Final = "trimserve.job.id"
"""The attribute of spans."""
MAX_CLAIMS: Final = 30
"""Of one run, however far each of them came; what a worker gave back isn't counted."""


class Kind(StrEnum):
    OPTIMIZATION = "optimization"
    """A study, and a published candidate where it found one."""
    LOAD_TEST = "load_test"
    """Of a version that a job has published: its own server under the SLO's load."""


class NotAllowed(Exception):
    """What was asked can't happen to a job in its state."""

    def __init__(self, action: str, state: State, allowed: frozenset[State]) -> None:
        names = ", ".join(sorted(allowed))
        super().__init__(f"can't {action} a job that is {state}, want one that is {names}")
        self.action = action
        self.state = state
        self.allowed = allowed


class LeaseLost(Exception):
    """The job isn't its old worker's any more: that worker stops, and what it says is void."""


@dataclass(frozen=True)
class Lease:
    """`worker` may run the job until `until_s`; `token` tells this claim from every other."""

    worker: str
    token: str
    until_s: float


@dataclass(frozen=True)
class Job:
    """A job as it stands. Times are seconds since 1970 by the database's clock.

    `run` counts the times that somebody asked for it (1, and 1 more for each retry), `attempt`
    the claims of this run. `reached` is the highest number of trials that the run has come to,
    `lost` the workers lost in a row since it got that far, of which `max_attempts` may be; `told`
    is the number of the last batch of events from the claim's worker. `outcome` is the study's,
    where one came to its end; `error` says why a job failed. `n_events` is the number of the last
    event, `n_logs` of the last piece of log.
    `revision` grows by every change. `traceparent` is the place in a trace that it was submitted at
    (W3C Trace Context), where its submission was traced; `stored_bytes` are those of the files that
    it keeps.
    """

    id: str
    owner: str
    name: str
    created_s: float
    updated_s: float
    kind: Kind = Kind.OPTIMIZATION
    state: State = State.QUEUED
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    parent_id: str | None = None
    run: int = 1
    attempt: int = 0
    max_attempts: int = DEFAULT_ATTEMPTS
    reached: int = 0
    lost: int = 0
    told: int = 0
    started_s: float | None = None
    ended_s: float | None = None
    lease: Lease | None = None
    outcome: str | None = None
    error: str | None = None
    n_events: int = 0
    n_logs: int = 0
    revision: int = 0
    traceparent: str | None = None
    stored_bytes: int = 0


def claim(job: Job, lease: Lease, now_s: float) -> Job:
    """A worker takes the job."""
    _check("claim", job, frozenset({State.QUEUED}))
    return replace(
        job,
        state=State.RUNNING,
        lease=lease,
        attempt=job.attempt + 1,
        told=0,
        started_s=job.started_s or now_s,
        updated_s=now_s,
    )


def renew(job: Job, token: str, until_s: float, now_s: float) -> Job:
    """Its worker lives. A lease that has run out can be renewed as long as nobody else took it."""
    lease = _held(job, token)
    return replace(job, lease=replace(lease, until_s=until_s), updated_s=now_s)


def release(job: Job, token: str, now_s: float) -> Job:
    """Its worker stops in good order, which is no attempt that failed: another one goes on."""
    _held(job, token)
    if job.state is State.CANCELLING:
        return _ended(job, State.CANCELLED, now_s)
    return replace(
        job, state=State.QUEUED, lease=None, attempt=max(0, job.attempt - 1), updated_s=now_s
    )


def told(job: Job, token: str, batch: int, reached: int) -> Job:
    """Its worker has told `batch`; the study is at `reached` trials. One that gets further than
    all before it shows that the job isn't what workers were lost of."""
    _held(job, token)
    further = reached > job.reached
    return replace(
        job,
        told=batch,
        reached=max(reached, job.reached),
        lost=0 if further else job.lost,
    )


def kept(job: Job, token: str, stored_bytes: int) -> Job:
    """Its worker is going to store its files."""
    _held(job, token)
    return replace(job, stored_bytes=stored_bytes)


def expire(job: Job, now_s: float, blameless: bool = False) -> Job:
    """The lease ran out: back to the queue, or failed where too many workers were lost in a row
    and it got no further. `blameless` where its worker couldn't renew, as when the database was
    away: that worker isn't counted. A job whose lease is good is returned as it is."""
    if job.state not in ACTIVE or job.lease is None or job.lease.until_s > now_s:
        return job
    if job.state is State.CANCELLING:
        return _ended(job, State.CANCELLED, now_s)
    lost = job.lost if blameless else job.lost + 1
    worker = job.lease.worker
    if lost >= job.max_attempts:
        error = f"{lost} workers were lost in a row while it got no further, the last was {worker}"
        return replace(_ended(job, State.FAILED, now_s), lost=lost, error=error)
    if job.attempt >= MAX_CLAIMS:
        error = f"{job.attempt} workers have begun it and were lost, the last was {worker}"
        return replace(_ended(job, State.FAILED, now_s), lost=lost, error=error)
    return replace(job, state=State.QUEUED, lease=None, lost=lost, updated_s=now_s)


def ask_cancel(job: Job, now_s: float) -> Job:
    """Somebody wants it stopped. Asking twice is asking once."""
    _check("cancel", job, OPEN)
    if job.state is State.QUEUED:
        return _ended(job, State.CANCELLED, now_s)
    return replace(job, state=State.CANCELLING, updated_s=now_s)


def succeed(job: Job, token: str, outcome: str, now_s: float) -> Job:
    """The study came to its end. It counts even if somebody asked to cancel meanwhile: the work
    is done, and its result is there."""
    _held(job, token)
    return replace(_ended(job, State.SUCCEEDED, now_s), outcome=outcome)


def fail(job: Job, token: str, error: str, now_s: float) -> Job:
    """The study can't come to its end: another attempt would fail as well."""
    _held(job, token)
    state = State.CANCELLED if job.state is State.CANCELLING else State.FAILED
    return replace(_ended(job, state, now_s), error=error if state is State.FAILED else None)


def stopped(job: Job, token: str, now_s: float) -> Job:
    """Its worker stopped it because that was asked."""
    _held(job, token)
    _check("end the cancelling of", job, frozenset({State.CANCELLING}))
    return _ended(job, State.CANCELLED, now_s)


def retry(job: Job, now_s: float) -> Job:
    """Run it again; what its study has measured is still in the store."""
    _check("retry", job, ENDED)
    return replace(
        job,
        state=State.QUEUED,
        run=job.run + 1,
        attempt=0,
        reached=0,
        lost=0,
        started_s=None,
        ended_s=None,
        outcome=None,
        error=None,
        updated_s=now_s,
    )


def delete(job: Job, now_s: float) -> Job:
    """It disappears; only the audit remembers."""
    _check("delete", job, ENDED)
    return replace(job, state=State.DELETED, stored_bytes=0, updated_s=now_s)


def _ended(job: Job, state: State, now_s: float) -> Job:
    return replace(job, state=state, lease=None, ended_s=now_s, updated_s=now_s)


def _held(job: Job, token: str) -> Lease:
    if job.state not in ACTIVE or job.lease is None or job.lease.token != token:
        raise LeaseLost(f"job {job.id} is {job.state} and not held by this claim")
    return job.lease


def _check(action: str, job: Job, allowed: frozenset[State]) -> None:
    if job.state not in allowed:
        raise NotAllowed(action, job.state, allowed)
