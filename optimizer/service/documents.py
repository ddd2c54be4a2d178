"""Jobs, events and the rest as JSON: the same for REST and the command line."""

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from optimizer.service.audit import Entry
from optimizer.service.jobs import Job, Kind, State
from optimizer.service.journal import Event, Piece
from optimizer.service.operations import Details
from optimizer.service.publishing import Publication
from optimizer.service.uploads import Upload


def _when(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


class JobDocument(BaseModel):
    """A job. Times are ISO 8601, UTC."""

    id: str
    kind: Kind
    name: str
    owner: str
    state: State
    outcome: str | None = Field(description="Of the study: met, unverified, infeasible or "
                                "inconclusive. Of a load test: its verdict.")  # fmt: skip
    error: str | None
    labels: dict[str, str]
    priority: int
    parent_id: str | None
    run: int = Field(description="1, and 1 more for each retry.")
    attempt: int = Field(description="Workers that have begun this run.")
    max_attempts: int
    lost: int = Field(description="Workers lost in a row while it got no further; it fails when "
                      "they are max_attempts.")  # fmt: skip
    worker: str | None
    created_at: str
    updated_at: str
    started_at: str | None
    ended_at: str | None
    stored_bytes: int = Field(description="Of the files that it keeps.")
    n_events: int


class EventDocument(BaseModel):
    """What happened to a job. Numbers count from 1 without a gap."""

    number: int
    at: str
    kind: str
    payload: dict[str, Any]


class LogDocument(BaseModel):
    number: int
    at: str
    text: str


class UploadDocument(BaseModel):
    id: str
    reference: str = Field(description="What a spec names it by.")
    name: str
    size_bytes: int
    sha256: str
    received_bytes: int
    complete: bool
    created_at: str


class PublicationDocument(BaseModel):
    id: str
    job_id: str
    repository: str
    model: str
    version: str
    state: str = Field(description="writing, done or failed")
    subject: str
    error: str | None
    created_at: str


class DetailsDocument(BaseModel):
    job: JobDocument
    spec: dict[str, Any]
    progress: dict[str, Any] = Field(description="The last event of each kind.")
    publications: list[PublicationDocument]


class AuditDocument(BaseModel):
    id: int
    at: str
    subject: str
    action: str
    target: str
    detail: dict[str, Any]


class Page(BaseModel):
    jobs: list[JobDocument]
    next: str | None = Field(description="`after` for the next page, null on the last.")


def job_document(job: Job) -> JobDocument:
    return JobDocument(
        id=job.id,
        kind=job.kind,
        name=job.name,
        owner=job.owner,
        state=job.state,
        outcome=job.outcome,
        error=job.error,
        labels=dict(job.labels),
        priority=job.priority,
        parent_id=job.parent_id,
        run=job.run,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        lost=job.lost,
        worker=job.lease.worker if job.lease is not None else None,
        created_at=_when(job.created_s) or "",
        updated_at=_when(job.updated_s) or "",
        started_at=_when(job.started_s),
        ended_at=_when(job.ended_s),
        stored_bytes=job.stored_bytes,
        n_events=job.n_events,
    )


def event_document(event: Event) -> EventDocument:
    return EventDocument(
        number=event.number,
        at=_when(event.at_s) or "",
        kind=event.kind,
        payload=dict(event.payload),
    )


def log_document(piece: Piece) -> LogDocument:
    return LogDocument(number=piece.number, at=_when(piece.at_s) or "", text=piece.text)


def upload_document(upload: Upload) -> UploadDocument:
    return UploadDocument(
        id=upload.id,
        reference=f"upload:{upload.id}",
        name=upload.name,
        size_bytes=upload.size_bytes,
        sha256=upload.sha256,
        received_bytes=upload.received_bytes,
        complete=upload.complete,
        created_at=_when(upload.created_s) or "",
    )


def publication_document(one: Publication) -> PublicationDocument:
    return PublicationDocument(
        id=one.id,
        job_id=one.job_id,
        repository=one.repository,
        model=one.model,
        version=one.version,
        state=one.state,
        subject=one.subject,
        error=one.error,
        created_at=_when(one.created_s) or "",
    )


def details_document(details: Details) -> DetailsDocument:
    spec = details.spec.get("spec", details.spec)
    return DetailsDocument(
        job=job_document(details.job),
        spec=dict(spec),
        progress=dict(details.progress),
        publications=[publication_document(one) for one in details.publications],
    )


def audit_document(entry: Entry) -> AuditDocument:
    return AuditDocument(
        id=entry.id,
        at=_when(entry.at_s) or "",
        subject=entry.subject,
        action=entry.action,
        target=entry.target,
        detail=dict(entry.detail),
    )
