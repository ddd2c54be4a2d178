"""What can be done with the service: the one object that REST and gRPC call.

Each operation checks what its caller may do, does it, and leaves a line in the audit where it
changed something. It knows neither HTTP nor gRPC, and runs no job.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from optimizer import tracing
from optimizer.service.audit import Audit, Entry, Note
from optimizer.service.auth import Caller, Scope
from optimizer.service.blobs import Blobs
from optimizer.service.child import LOAD_TEST_HTML, LOAD_TEST_JSON, REPORT, RESULT
from optimizer.service.jobs import ENDED, JOB_ID, Job, Kind, State
from optimizer.service.journal import Event, Piece
from optimizer.service.ledger import Ledger
from optimizer.service.publishing import NothingToPublish, Publication, Publisher, Wish
from optimizer.service.records import JobNotFound, Query, Submission
from optimizer.service.submitted import Policy, read_submitted
from optimizer.service.uploads import Upload, UploadNotFound, Uploads

MAX_DOCUMENT_BYTES = 64_000_000
MAX_LABELS = 16
_LABEL_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@ ")


class RequestInvalid(Exception):
    """A request that says something that isn't allowed: `field: got …, want …`."""

    def __init__(self, name: str, got: object, want: str) -> None:
        shown = repr(got)
        super().__init__(
            f"{name}: got {shown if len(shown) <= 80 else shown[:77] + '...'}, want {want}"
        )


class NotThere(Exception):
    """The job hasn't made this (yet)."""


@dataclass(frozen=True)
class Quotas:
    """Of one owner: jobs that are queued or running, and bytes of files that jobs keep. How many of
    them run, and that one doesn't store too much, workers see to."""

    open_jobs: int = 100
    stored_bytes: int | None = None


@dataclass(frozen=True)
class Details:
    """A job with what is read for one at a time."""

    job: Job
    spec: Mapping[str, Any]
    progress: Mapping[str, Any]
    publications: tuple[Publication, ...] = field(default=())


class Operations:
    def __init__(
        self,
        ledger: Ledger,
        uploads: Uploads,
        blobs: Blobs,
        publisher: Publisher,
        audit: Audit,
        policy: Policy,
        quotas: Quotas,
    ) -> None:
        self.ledger = ledger
        self.uploads = uploads
        self.publisher = publisher
        self.policy = policy
        self._blobs = blobs
        self._audit = audit
        self.quotas = quotas

    # --- jobs

    def submit(
        self,
        caller: Caller,
        spec: str | Mapping[str, Any],
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        verify: bool = True,
        key: str | None = None,
        parent_id: str | None = None,
    ) -> tuple[Job, bool]:
        """A new job, or with an idempotency `key` that came before the job of then; and whether it
        is new. Raises DocumentInvalid, RequestInvalid, KeyReused, QuotaExceeded,
        StorageExceeded, Forbidden."""
        caller.check(Scope.SUBMIT)
        _check_labels(labels or {})
        if not -100 <= priority <= 100:
            raise RequestInvalid("priority", priority, "-100 to 100")
        if priority > 0:
            caller.check(Scope.ADMIN)
        _check_key(key)
        submitted = read_submitted(spec, self.policy, lambda one: self._upload_name(caller, one))
        submission = Submission(
            owner=caller.subject,
            name=submitted.name,
            spec={
                "spec": submitted.document,
                "references": list(submitted.references),
                "wall_clock_s": submitted.wall_clock_s,
                "verify": verify,
            },
            labels=labels,
            priority=priority,
            parent_id=parent_id,
        )
        note = Note(caller.subject, "submit", {"name": submitted.name, "parent": parent_id})
        job, is_new = self._queued(submission, key, note)
        if is_new:
            used = [one.removeprefix("upload:") for one in submitted.references]
            self.uploads.touch(used)
        return job, is_new

    def jobs(self, caller: Caller, query: Query) -> list[Job]:
        caller.check(Scope.READ)
        return self.ledger.find(query)

    def job(self, caller: Caller, job_id: str) -> Job:
        """Raises JobNotFound."""
        caller.check(Scope.READ)
        return self.ledger.job(job_id)

    def details(self, caller: Caller, job_id: str) -> Details:
        caller.check(Scope.READ)
        job = self.ledger.job(job_id)
        publications = self.publisher.of_job(job_id)
        return Details(
            job, self.ledger.spec(job_id), self.ledger.progress(job_id), tuple(publications)
        )

    def events(
        self, caller: Caller, job_id: str, after: int, limit: int, kind: str | None = None
    ) -> list[Event]:
        self.job(caller, job_id)
        return self.ledger.journal.events(job_id, after, limit, kind)

    def last_event(self, caller: Caller, job_id: str, kind: str) -> Event | None:
        self.job(caller, job_id)
        return self.ledger.journal.last_event(job_id, kind)

    def counts(self, caller: Caller) -> dict[State, int]:
        """Jobs by state."""
        caller.check(Scope.READ)
        return self.ledger.counts()

    def logs(self, caller: Caller, job_id: str, after: int, limit: int) -> list[Piece]:
        self.job(caller, job_id)
        return self.ledger.journal.logs(job_id, after, limit)

    def cancel(self, caller: Caller, job_id: str) -> Job:
        """Raises JobNotFound, NotAllowed, Forbidden; so do those that follow."""
        self._own(caller, job_id)
        return self.ledger.cancel(job_id, Note(caller.subject, "cancel"))

    def retry(self, caller: Caller, job_id: str) -> Job:
        self._own(caller, job_id)
        note = Note(caller.subject, "retry")
        return self.ledger.retry(job_id, self.quotas.open_jobs, note)

    def clone(
        self,
        caller: Caller,
        job_id: str,
        changes: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> tuple[Job, bool]:
        """A new job with the spec of another, changed as a JSON merge patch says (RFC 7396). What
        both measure is measured once, since they share the store."""
        caller.check(Scope.SUBMIT)
        job = self.ledger.job(job_id)
        if job.kind is not Kind.OPTIMIZATION:
            raise RequestInvalid("id", job_id, f"a job of the kind optimization, it is {job.kind}")
        held = self.ledger.spec(job_id)
        spec = _patched(held["spec"], changes or {})
        if not isinstance(spec, Mapping):
            raise RequestInvalid("changes", changes, "a mapping")
        return self.submit(
            caller,
            spec,
            labels=labels if labels is not None else job.labels,
            verify=bool(held.get("verify", True)),
            key=key,
            parent_id=job_id,
        )

    def delete(self, caller: Caller, job_id: str) -> None:
        """What was published from it stays."""
        self._own(caller, job_id)
        self.ledger.delete(job_id, Note(caller.subject, "delete"))
        self._blobs.delete_job(job_id)

    # --- what a job made

    def result(self, caller: Caller, job_id: str) -> bytes:
        """The study's result as JSON, or the load test's report. Raises NotThere."""
        job = self.job(caller, job_id)
        return self._made(job, RESULT if job.kind is Kind.OPTIMIZATION else LOAD_TEST_JSON)

    def report(self, caller: Caller, job_id: str) -> bytes:
        """The same as an HTML page."""
        job = self.job(caller, job_id)
        return self._made(job, REPORT if job.kind is Kind.OPTIMIZATION else LOAD_TEST_HTML)

    def publish(
        self,
        caller: Caller,
        job_id: str,
        repository: str,
        model: str | None = None,
        key: str | None = None,
    ) -> Publication:
        """The publication; with an idempotency `key` that came before the one of then, which may
        be `writing` still. Raises KeyReused, NothingToPublish where the job found nothing."""
        caller.check(Scope.PUBLISH)
        _check_key(key)
        job = self.ledger.job(job_id)
        claim = self._claim(job)
        if claim is None or job.kind is not Kind.OPTIMIZATION:
            raise NothingToPublish(f"job {job_id} has found nothing that could be published")
        wish = Wish(job_id, claim, repository, model, caller.subject, key)
        about = {JOB_ID: job_id, "trimserve.repository": repository}
        # In the job's trace, which the request that asks for it is linked with.
        with tracing.span("publish version", about, parent=job.traceparent) as span:
            publication = self.publisher.publish(wish)
            span.set("trimserve.model", publication.model)
            span.set("trimserve.version", publication.version)
        return publication

    def load_test(
        self, caller: Caller, publication_id: str, key: str | None = None
    ) -> tuple[Job, bool]:
        """A job that puts the version's own server under the load of its SLO.

        Raises PublicationNotFound, NothingToPublish where it isn't (yet) there."""
        caller.check(Scope.PUBLISH)
        publication = self.publisher.get(publication_id)
        if publication.state != "done":
            raise NothingToPublish(f"the publication is {publication.state}")
        submission = Submission(
            owner=caller.subject,
            name=publication.model,
            spec={
                "publication": publication.id,
                "repository": publication.repository,
                "model": publication.model,
                "version": publication.version,
                "digest": publication.digest,
                "slo": dict(self.publisher.slo(publication)),
            },
            kind=Kind.LOAD_TEST,
            parent_id=publication.job_id,
        )
        note = Note(caller.subject, "load_test", {"publication": publication.id})
        return self._queued(submission, key, note)

    def publications(self, caller: Caller, job_id: str) -> list[Publication]:
        self.job(caller, job_id)
        return self.publisher.of_job(job_id)

    # --- uploads

    def begin_upload(self, caller: Caller, name: str, size_bytes: int, sha256: str) -> Upload:
        caller.check(Scope.SUBMIT)
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise RequestInvalid("sha256", sha256, "64 lower-case hexadecimal digits")
        upload = self.uploads.begin(caller.subject, name, size_bytes, sha256)
        self._audit.note(caller.subject, "upload", upload.id, name=name, size_bytes=size_bytes)
        return upload

    def append_upload(self, caller: Caller, upload_id: str, offset: int, content: bytes) -> Upload:
        caller.check(Scope.SUBMIT)
        return self.uploads.append(upload_id, caller.subject, offset, content)

    def upload(self, caller: Caller, upload_id: str) -> Upload:
        caller.check(Scope.READ)
        return self.uploads.get(upload_id, self._owner(caller))

    def uploads_of(self, caller: Caller) -> list[Upload]:
        caller.check(Scope.READ)
        return self.uploads.of(self._owner(caller))

    def delete_upload(self, caller: Caller, upload_id: str) -> None:
        caller.check(Scope.SUBMIT)
        self.uploads.delete(upload_id, self._owner(caller))
        self._audit.note(caller.subject, "delete_upload", upload_id)

    # --- the rest

    def audit(self, caller: Caller, before: int | None, limit: int) -> list[Entry]:
        caller.check(Scope.ADMIN)
        return self._audit.entries(before, limit)

    def sweep(self, keep_s: float | None) -> None:
        """Housekeeping: leases that ran out, publications that nobody finished and what dead
        processes left of them, jobs older than `keep_s` and uploads that nothing uses."""
        self.ledger.expire()
        self.publisher.clear()
        claims: dict[str, str] = {}
        for one in self.publisher.unfinished():
            with suppress(JobNotFound):
                claim = self._claim(self.ledger.job(one.job_id))
                claims |= {one.job_id: claim} if claim is not None else {}
        self.publisher.finish(claims)
        if keep_s is not None:
            for job in self.ledger.ended_before(keep_s):
                self.ledger.delete(job.id, Note("retention", "delete"))
                self._blobs.delete_job(job.id)
        in_use = set()
        for job in self.ledger.find(
            Query(states=(State.QUEUED, State.RUNNING, State.CANCELLING), limit=500)
        ):
            references = self.ledger.spec(job.id).get("references", ())
            in_use |= {one.removeprefix("upload:") for one in references}
        self.uploads.forget_unused(frozenset(in_use))

    def _queued(self, submission: Submission, key: str | None, note: Note) -> tuple[Job, bool]:
        """The job, in the trace of the one that it is made from if there is one."""
        parent = None
        if submission.kind is Kind.LOAD_TEST and submission.parent_id is not None:
            with suppress(JobNotFound):
                parent = self.ledger.job(submission.parent_id).traceparent
        about = {"trimserve.job.kind": submission.kind.value}
        with tracing.span("submit job", about, parent=parent, kind="producer") as span:
            traced = replace(submission, traceparent=tracing.traceparent())
            quotas = self.quotas
            job, is_new = self.ledger.submit(
                traced, key, quotas.open_jobs, note, quotas.stored_bytes
            )
            span.set(JOB_ID, job.id)
        return job, is_new

    def _own(self, caller: Caller, job_id: str) -> Job:
        caller.check(Scope.SUBMIT)
        job = self.ledger.job(job_id)
        caller.check_own(job.owner)
        return job

    def _owner(self, caller: Caller) -> str | None:
        return None if Scope.ADMIN in caller.scopes else caller.subject

    def _upload_name(self, caller: Caller, upload_id: str) -> str:
        try:
            upload = self.uploads.get(upload_id, self._owner(caller))
        except UploadNotFound as error:
            raise ValueError(f"want an upload of yours: {error}") from error
        if not upload.complete:
            raise ValueError(
                f"want a finished upload: {upload.received_bytes} of {upload.size_bytes} bytes "
                "are there"
            )
        return upload.name

    def _claim(self, job: Job) -> str | None:
        """Under which claim the job's files are stored."""
        if job.state is not State.SUCCEEDED:
            return None
        made = self.ledger.progress(job.id).get("made")
        return str(made["claim"]) if made is not None else None

    def _made(self, job: Job, name: str) -> bytes:
        claim = self._claim(job)
        content = self._blobs.read(job.id, claim, name, MAX_DOCUMENT_BYTES) if claim else None
        if content is None:
            more = "" if job.state in ENDED else f": it is {job.state}"
            raise NotThere(f"job {job.id} has no {name}{more}")
        return content


def _check_key(key: str | None) -> None:
    if key is not None and not (1 <= len(key) <= 128 and key.isascii() and key.isprintable()):
        raise RequestInvalid("Idempotency-Key", key, "1 to 128 printable ASCII characters")


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise RequestInvalid("labels", len(labels), f"at most {MAX_LABELS}")
    for name, value in labels.items():
        for what, text in ((f"labels.{name[:32]}", name), (f"labels.{name[:32]}", value)):
            if not 1 <= len(text) <= 128 or not set(text) <= _LABEL_CHARS:
                raise RequestInvalid(what, text, "1 to 128 letters, digits or any of -_./:@ ")


def _patched(document: Any, patch: Any) -> Any:
    """JSON merge patch, RFC 7396, section 2."""
    if not isinstance(patch, Mapping):
        return patch
    patched = dict(document) if isinstance(document, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            patched.pop(name, None)
        else:
            patched[name] = _patched(patched.get(name), value)
    return patched
