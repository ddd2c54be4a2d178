"""What the ledger is asked and what it answers: submissions, queries, claims, and its refusals."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimizer.service import jobs as life
from optimizer.service.jobs import Job, Kind, Lease, State

MAX_PAGE = 500


class JobNotFound(Exception):
    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id}")
        self.job_id = job_id


class QuotaExceeded(Exception):
    """The owner has as many open jobs as are allowed."""

    def __init__(self, n_open: int, limit: int) -> None:
        super().__init__(f"{n_open} jobs are queued or running, want fewer than {limit}")
        self.limit = limit


class StorageExceeded(Exception):
    """The owner's jobs keep as many bytes of files as are allowed."""

    def __init__(self, used: int, more: int, limit: int) -> None:
        asked = f"{more} bytes beside the {used}" if more else f"{used} bytes, which is all"
        super().__init__(
            f"stored files: got {asked} that the owner's jobs keep, want at most {limit} together: "
            "delete jobs"
        )
        self.used, self.limit = used, limit


@dataclass(frozen=True)
class Submission:
    """What a job is made of. `spec` is JSON that `Job.spec` gives back as it is."""

    owner: str
    name: str
    spec: Mapping[str, Any]
    kind: Kind = Kind.OPTIMIZATION
    labels: Mapping[str, str] | None = None
    priority: int = 0
    max_attempts: int = life.DEFAULT_ATTEMPTS
    parent_id: str | None = None
    traceparent: str | None = None

    @property
    def digest(self) -> str:
        """Of all that was asked for: the same request has the same, whatever trace it is in."""
        asked = [self.name, self.spec, self.kind, dict(self.labels or {}), self.priority,
                 self.max_attempts, self.parent_id]  # fmt: skip
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Query:
    """Which jobs to list, the newest first: those of an owner, in states, of a kind, with all of
    the labels, made from the job `parent_id`; from after `after` (a job's id) on, at most
    `limit`."""

    owner: str | None = None
    states: tuple[State, ...] = ()
    kind: Kind | None = None
    labels: Mapping[str, str] | None = None
    after: str | None = None
    limit: int = 50
    parent_id: str | None = None


@dataclass(frozen=True)
class Claim:
    """A job, what it is to do, and the lease on it."""

    job: Job
    spec: Mapping[str, Any]
    lease: Lease
