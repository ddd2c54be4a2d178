"""REST: the operations as HTTP, with an OpenAPI document at /openapi.json.

Answers to errors are problem documents (RFC 9457). A body of a spec is JSON or YAML, an uploaded
chunk is the bytes themselves with `Upload-Offset`. Events can be read by page, or followed as
server-sent events that go on from `Last-Event-ID`.
"""

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from importlib import metadata
from typing import Annotated, Any, Literal

import yaml
from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from loadtest.document import MAX_DOCUMENT_BYTES, DocumentInvalid
from optimizer.service import documents as d
from optimizer.service.auth import Authenticator, Caller, Forbidden, Unauthenticated
from optimizer.service.database import DatabaseUnavailable
from optimizer.service.feed import Feed
from optimizer.service.jobs import Kind, State
from optimizer.service.ledger import MAX_PAGE, Event, JobNotFound, QuotaExceeded
from optimizer.service.ledger import Query as JobQuery
from optimizer.service.metrics import ServiceMetrics
from optimizer.service.object_store import StoreUnavailable
from optimizer.service.operations import Operations, RequestInvalid
from optimizer.service.page.rendering import Pages
from optimizer.service.page.routes import page_router
from optimizer.service.provider_login import ProviderLogin
from optimizer.service.requests import caller_of, is_own_origin, read_body
from optimizer.service.sessions import Sessions
from optimizer.service.status import (
    UnsupportedMedia,
    status_of,
)
from optimizer.service.telemetry import NO_REQUESTS, Telemetry
from optimizer.service.uploads import OffsetWrong
from optimizer.service.watching import RECHECK_S, Watched

log = logging.getLogger(__name__)

VERSION = metadata.version("trimserve")
METHOD_NOT_ALLOWED = 405
MAX_BODY_BYTES = MAX_DOCUMENT_BYTES + 100_000
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml")
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="A job's id.")]
UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="An upload's id.")]
After = Annotated[int, Query(ge=0, le=2**31 - 1, description="Numbers above this.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=128,
        description="The same key with the same request gives the job of before.",
    ),
]


class Problem(BaseModel):
    """RFC 9457. `problems` holds one sentence for each thing that is wrong."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    problems: list[str] = Field(default_factory=list)


class Submission(BaseModel):
    """A job to run. `spec` is that of `trimserve optimize`, with the SLO inside of it as `slo`, as
    a mapping or as YAML text."""

    model_config = ConfigDict(extra="forbid")
    spec: dict[str, Any] | str
    labels: dict[str, str] = Field(default_factory=dict)
    priority: int = Field(default=0, ge=-100, le=100, description="Above 0 is for admins.")
    verify: bool = Field(default=True, description="Put the best variants to the real server.")


class Cloning(BaseModel):
    """`changes` is a JSON merge patch (RFC 7396) to the job's spec."""

    model_config = ConfigDict(extra="forbid")
    changes: dict[str, Any] = Field(default_factory=dict)
    labels: dict[str, str] | None = None


class Announcement(BaseModel):
    """A file that is going to be uploaded."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=128)
    size_bytes: int = Field(ge=1, le=2**53)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Publishing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    repository: str = Field(min_length=1, max_length=128)
    model: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Its own name without.",
    )


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Me(BaseModel):
    subject: str
    scopes: list[str]


class Overview(BaseModel):
    """What this service allows: for clients, and for who wants to know why something is refused."""

    version: str
    repositories: list[str]
    stores: str
    factories: list[str]
    max_wall_clock_s: float
    chunk_bytes: int
    stored_bytes: int = Field(description="Of the files that your jobs keep.")
    max_stored_bytes: int | None = Field(description="How many they may keep together.")
    jobs: dict[State, int]


_PROBLEM = {"model": Problem, "content": {"application/problem+json": {}}}


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The errors that every operation can answer, and `codes`."""
    return dict.fromkeys(sorted({400, 401, 403, 422, 500, 503, *codes}), _PROBLEM)


def make_app(
    operations: Operations,
    authenticator: Authenticator,
    metrics: ServiceMetrics,
    hosts: frozenset[str] | None = None,
    sessions: Sessions | None = None,
    telemetry: Telemetry | None = None,
    recheck_s: float = RECHECK_S,
    provider_login: ProviderLogin | None = None,
) -> FastAPI:
    """The application; its lifespan must be entered on the loop that it runs on.

    `hosts` are the names that a browser may have reached it by, None for any: where nobody has to
    show a key, a foreign page must not get in by a name that it lets point here (DNS rebinding).
    """
    app = FastAPI(
        title="trimserve optimizer",
        version=VERSION,
        description="Optimization jobs: submit, follow, publish. See docs/service.md.",
        docs_url=None,
        redoc_url=None,
        responses=problems(),
        telemetry=NO_REQUESTS if telemetry is None else telemetry.fastapi(),
    )
    app.state.operations, app.state.authenticator = operations, authenticator
    app.state.metrics, app.state.feed = metrics, None
    app.state.pages, app.state.sessions = Pages(), sessions
    app.state.recheck_s, app.state.provider_login = recheck_s, provider_login
    app.include_router(_health())
    app.include_router(_jobs())
    app.include_router(_uploads())
    app.include_router(_rest())
    app.include_router(page_router())
    _handle_errors(app)

    @app.middleware("http")
    async def observed(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        began_s = time.perf_counter()
        refusal = _refusal(request, hosts)
        response = refusal if refusal is not None else await call_next(request)
        route = request.scope.get("route")
        operation = getattr(route, "operation_id", None) or getattr(route, "name", "none")
        metrics.requests.labels("rest", operation, response.status_code).inc()
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            spent_s = time.perf_counter() - began_s
            metrics.request_duration.labels("rest", operation).observe(spent_s)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "no-referrer")
        return response

    return app


def _refusal(request: Request, hosts: frozenset[str] | None) -> Response | None:
    """Requests that a foreign page makes a browser send."""
    name = (request.url.hostname or "").lower()
    if hosts is not None and name not in hosts:
        return _problem(403, "Another host", f"Host: got {name!r}, want one of this service")
    origin = request.headers.get("origin")
    if request.method not in ("GET", "HEAD", "OPTIONS") and not is_own_origin(request):
        return _problem(403, "Another origin", f"Origin: got {origin!r}, want this service's own")
    return None


# --- who calls


def _operations(request: Request) -> Operations:
    operations: Operations = request.app.state.operations
    return operations


Who = Annotated[Caller, Depends(caller_of)]
Ops = Annotated[Operations, Depends(_operations)]


# --- routes


def _health() -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/livez", operation_id="live")
    async def live() -> Health:
        """The process answers."""
        return Health()

    @router.get("/readyz", operation_id="ready", responses=problems(503))
    def ready(ops: Ops) -> Health:
        """The database answers, too."""
        ops.ledger.counts()
        return Health()

    @router.get("/metrics", include_in_schema=False)
    def metrics(request: Request) -> Response:
        state = request.app.state
        if state.feed is not None:
            state.metrics.followers.set(state.feed.n_followers)
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _jobs() -> APIRouter:
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    @router.post(
        "",
        operation_id="submit",
        status_code=201,
        responses={200: {"model": d.JobDocument}, **problems(409, 413, 415, 429, 507)},
        openapi_extra={"requestBody": _spec_body()},
    )
    async def submit(
        request: Request, response: Response, who: Who, ops: Ops, key: IdempotencyKey = None
    ) -> d.JobDocument:
        """Submit a job: JSON, or the spec alone as YAML. 200 where the key was known."""
        body = await read_body(request, MAX_BODY_BYTES)
        asked = _submission(body, request.headers.get("content-type", ""))
        spec = _with_parsed_slo(asked.spec)
        job, is_new = await run_in_threadpool(
            ops.submit, who, spec, asked.labels, asked.priority, asked.verify, key
        )
        response.status_code = 201 if is_new else 200
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return d.job_document(job)

    @router.get("", operation_id="list_jobs", responses=problems(404))
    def list_jobs(
        who: Who,
        ops: Ops,
        state: Annotated[list[State] | None, Query(description="One of these.")] = None,
        kind: Kind | None = None,
        owner: Annotated[str | None, Query(max_length=256)] = None,
        label: Annotated[
            list[str] | None, Query(max_length=16, description="NAME=VALUE; all of these.")
        ] = None,
        after: Annotated[str | None, Query(pattern=r"^[0-9a-f]{16}$")] = None,
        limit: Limit = 50,
    ) -> d.Page:
        """Jobs, the newest first."""
        query = JobQuery(owner, tuple(state or ()), kind, _labels(label or []), after, limit)
        found = ops.jobs(who, query)
        more = found[-1].id if len(found) == limit else None
        return d.Page(jobs=[d.job_document(job) for job in found], next=more)

    @router.get("/{job_id}", operation_id="get_job", responses=problems(404))
    def get_job(job_id: JobId, who: Who, ops: Ops) -> d.DetailsDocument:
        """A job with its spec, its last events by kind, and what was published from it."""
        return d.details_document(ops.details(who, job_id))

    @router.get("/{job_id}/events", operation_id="list_events", responses=problems(404))
    def list_events(
        job_id: JobId, who: Who, ops: Ops, after: After = 0, limit: Limit = 100
    ) -> list[d.EventDocument]:
        """What happened to a job, from after a number on."""
        return [d.event_document(one) for one in ops.events(who, job_id, after, limit)]

    @router.get(
        "/{job_id}/events/stream",
        operation_id="follow_events",
        response_class=EventSourceResponse,
        responses=problems(404),
    )
    async def follow_events(
        request: Request,
        job: Annotated[str, Depends(_followed)],
        last_event_id: Annotated[
            int | None, Header(alias="Last-Event-ID", ge=0, le=2**31 - 1)
        ] = None,
        after: After = 0,
    ) -> AsyncIterator[ServerSentEvent]:
        """Follow a job as server-sent events: `id` is an event's number, `event` its kind, `data`
        the event as JSON. The stream ends with the job (`end`); Last-Event-ID goes on where it
        broke. Where the caller's key is revoked or its token expires, it ends within 15 s by
        `refused`, whose data is the problem document."""
        feed: Feed = request.app.state.feed
        start = after if last_event_id is None else last_event_id
        operations, every_s = request.app.state.operations, request.app.state.recheck_s
        watched = Watched(lambda: operations.job(caller_of(request), job), every_s)
        events = watched.stream(feed.follow(job, start, every_s))
        try:
            async with aclosing(events):
                async for event in events:
                    yield _sent(event)
        except (Unauthenticated, Forbidden, JobNotFound) as error:
            status = status_of(error)
            problem = Problem(title=status.title, status=status.http, detail=str(error))
            yield ServerSentEvent(raw_data=problem.model_dump_json(), event="refused")
            return
        yield ServerSentEvent(raw_data="{}", event="end")

    @router.get("/{job_id}/logs", operation_id="list_logs", responses=problems(404))
    def list_logs(
        job_id: JobId, who: Who, ops: Ops, after: After = 0, limit: Limit = 100
    ) -> list[d.LogDocument]:
        """What the job's process printed, in pieces."""
        return [d.log_document(one) for one in ops.logs(who, job_id, after, limit)]

    @router.get(
        "/{job_id}/result",
        operation_id="get_result",
        response_class=JSONResponse,
        responses=problems(404),
    )
    def get_result(job_id: JobId, who: Who, ops: Ops) -> Response:
        """The study's result, or the load test's report, as the commands write them with --json."""
        return Response(ops.result(who, job_id), media_type="application/json")

    @router.get(
        "/{job_id}/report",
        operation_id="get_report",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/html": {}}}, **problems(404)},
    )
    def get_report(job_id: JobId, who: Who, ops: Ops) -> Response:
        """The same as one HTML page. It is user content: it gets no access to the service."""
        headers = {"Content-Security-Policy": "sandbox allow-scripts"}
        return Response(ops.report(who, job_id), media_type="text/html", headers=headers)

    @router.post("/{job_id}/cancel", operation_id="cancel", responses=problems(404, 409))
    def cancel(job_id: JobId, who: Who, ops: Ops) -> d.JobDocument:
        """Stop it; its process is gone within 5 s."""
        return d.job_document(ops.cancel(who, job_id))

    @router.post("/{job_id}/retry", operation_id="retry", responses=problems(404, 409, 429, 507))
    def retry(job_id: JobId, who: Who, ops: Ops) -> d.JobDocument:
        """Run an ended job again; what it has measured isn't measured again."""
        return d.job_document(ops.retry(who, job_id))

    @router.post(
        "/{job_id}/clone",
        operation_id="clone",
        status_code=201,
        responses={200: {"model": d.JobDocument}, **problems(404, 409, 429, 507)},
    )
    def clone(
        job_id: JobId,
        asked: Cloning,
        response: Response,
        who: Who,
        ops: Ops,
        key: IdempotencyKey = None,
    ) -> d.JobDocument:
        """A new job with the same spec, changed."""
        job, is_new = ops.clone(who, job_id, asked.changes, asked.labels, key)
        response.status_code = 201 if is_new else 200
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return d.job_document(job)

    @router.delete(
        "/{job_id}", operation_id="delete_job", status_code=204, responses=problems(404, 409)
    )
    def delete_job(job_id: JobId, who: Who, ops: Ops) -> None:
        """Delete an ended job and what it made; what was published stays."""
        ops.delete(who, job_id)

    @router.get("/{job_id}/publications", operation_id="list_publications", responses=problems(404))
    def list_publications(job_id: JobId, who: Who, ops: Ops) -> list[d.PublicationDocument]:
        return [d.publication_document(one) for one in ops.publications(who, job_id)]

    @router.post(
        "/{job_id}/publications",
        operation_id="publish",
        status_code=201,
        responses=problems(404, 409),
    )
    def publish(
        job_id: JobId, asked: Publishing, who: Who, ops: Ops, key: IdempotencyKey = None
    ) -> d.PublicationDocument:
        """Make what the job found the next version of a model in a serving repository. Sent again
        with the key of before it gives the version of then, which may be `writing` still."""
        done = ops.publish(who, job_id, asked.repository, asked.model, key)
        return d.publication_document(done)

    return router


def _uploads() -> APIRouter:
    router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

    @router.post("", operation_id="begin_upload", status_code=201)
    def begin(asked: Announcement, who: Who, ops: Ops) -> d.UploadDocument:
        """Announce a file. The same one again gives the upload as it stands, to go on with."""
        upload = ops.begin_upload(who, asked.name, asked.size_bytes, asked.sha256)
        return d.upload_document(upload)

    @router.get("", operation_id="list_uploads")
    def list_uploads(who: Who, ops: Ops) -> list[d.UploadDocument]:
        return [d.upload_document(one) for one in ops.uploads_of(who)]

    @router.get("/{upload_id}", operation_id="get_upload", responses=problems(404))
    def get(upload_id: UploadId, who: Who, ops: Ops) -> d.UploadDocument:
        return d.upload_document(ops.upload(who, upload_id))

    @router.patch(
        "/{upload_id}",
        operation_id="append_upload",
        responses=problems(404, 409, 413),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
                },
            }
        },
    )
    async def append(
        upload_id: UploadId,
        request: Request,
        who: Who,
        ops: Ops,
        offset: Annotated[int, Header(alias="Upload-Offset", ge=0, le=2**53)],
    ) -> d.UploadDocument:
        """Add a chunk at `Upload-Offset`. The last one is answered when the digest is right; a
        file whose digest is wrong is deleted."""
        content = await read_body(request, ops.uploads.limits.chunk_bytes)
        upload = await run_in_threadpool(ops.append_upload, who, upload_id, offset, content)
        return d.upload_document(upload)

    @router.delete(
        "/{upload_id}", operation_id="delete_upload", status_code=204, responses=problems(404)
    )
    def delete(upload_id: UploadId, who: Who, ops: Ops) -> None:
        ops.delete_upload(who, upload_id)

    return router


def _rest() -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["service"])

    @router.post(
        "/publications/{publication_id}/load-test",
        operation_id="load_test",
        status_code=201,
        responses={200: {"model": d.JobDocument}, **problems(404, 409, 429, 507)},
    )
    def load_test(
        publication_id: Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")],
        response: Response,
        who: Who,
        ops: Ops,
        key: IdempotencyKey = None,
    ) -> d.JobDocument:
        """Put a published version under the load of its SLO: a job of its own."""
        job, is_new = ops.load_test(who, publication_id, key)
        response.status_code = 201 if is_new else 200
        return d.job_document(job)

    @router.get("/service", operation_id="overview")
    def overview(who: Who, ops: Ops) -> Overview:
        """What this service allows, and how many jobs it has."""
        policy = ops.policy
        return Overview(
            version=VERSION,
            repositories=sorted(ops.publisher.repositories),
            stores=policy.stores.shown,
            factories=list(policy.factories),
            max_wall_clock_s=policy.max_wall_clock_s,
            chunk_bytes=ops.uploads.limits.chunk_bytes,
            stored_bytes=ops.ledger.stored_bytes(who.subject),
            max_stored_bytes=ops.quotas.stored_bytes,
            jobs=ops.ledger.counts(),
        )

    @router.get("/me", operation_id="me")
    def me(who: Who) -> Me:
        return Me(subject=who.subject, scopes=sorted(who.scopes))

    @router.get("/audit", operation_id="list_audit")
    def audit(
        who: Who,
        ops: Ops,
        before: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
        limit: Limit = 100,
    ) -> list[d.AuditDocument]:
        """Every change, the newest first; for admins."""
        return [d.audit_document(one) for one in ops.audit(who, before, limit)]

    return router


def _sent(event: Event | None) -> ServerSentEvent:
    if event is None:
        return ServerSentEvent(comment="still here")
    data = d.event_document(event).model_dump_json()
    return ServerSentEvent(raw_data=data, event=event.kind, id=str(event.number))


def _followed(job_id: JobId, who: Who, ops: Ops) -> str:
    """Before the stream begins, so that what is wrong is answered by its status."""
    return ops.job(who, job_id).id


# --- bodies


def _submission(body: bytes, content_type: str) -> Submission:
    kind = content_type.partition(";")[0].strip().lower()
    if kind in YAML_TYPES:
        try:
            return Submission(spec=body.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestInvalid("body", "not UTF-8", "a UTF-8 text") from error
    if kind != "application/json":
        raise UnsupportedMedia(
            f"Content-Type: got {kind or 'none'!r}, want application/json or application/yaml"
        )
    try:
        return Submission.model_validate(json.loads(body))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and hasattr(error, "errors"):
            raise RequestValidationError(error.errors()) from error
        raise RequestInvalid("body", "not JSON", f"a JSON document ({error})") from error


def _with_parsed_slo(spec: dict[str, Any] | str) -> dict[str, Any] | str:
    """An SLO may come as the text of its file."""
    if not isinstance(spec, dict) or not isinstance(spec.get("slo"), str):
        return spec
    try:
        slo = yaml.safe_load(spec["slo"])
    except (yaml.YAMLError, RecursionError) as error:
        raise DocumentInvalid("slo", [f"spec: slo: not valid YAML: {error}"]) from error
    return {**spec, "slo": slo}


def _labels(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, pair in zip(texts, pairs, strict=True) if not (pair[0] and pair[1])]
    if wrong:
        raise RequestInvalid("label", wrong[0], "NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _spec_body() -> dict[str, Any]:
    schema = Submission.model_json_schema()
    return {
        "required": True,
        "content": {
            "application/json": {"schema": schema},
            "application/yaml": {"schema": {"type": "string"}},
        },
    }


# --- errors


def _problem(status: int, title: str, detail: str, lines: list[str] | None = None) -> JSONResponse:
    problem = Problem(title=title, status=status, detail=detail, problems=lines or [])
    return JSONResponse(
        problem.model_dump(), status_code=status, media_type="application/problem+json"
    )


def _methods(app: FastAPI, request: Request) -> set[str]:
    """Those of all routes with the request's path: the framework names the first one's alone."""
    return {
        method.upper()
        for path, methods in app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.url.path)
        for method in methods
    }


def _handle_errors(app: FastAPI) -> None:
    async def ours(_request: Request, error: Exception) -> Response:
        status = status_of(error)
        lines = list(getattr(error, "problems", ()))
        answer = _problem(status.http, status.title, str(error), lines)
        if isinstance(error, Unauthenticated):
            answer.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, OffsetWrong):
            answer.headers["Upload-Offset"] = str(error.received_bytes)
        if isinstance(error, QuotaExceeded | DatabaseUnavailable | StoreUnavailable):
            answer.headers["Retry-After"] = "5"
        return answer

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        lines = [_wording(one) for one in error.errors()]
        return _problem(422, "The request can't be used", "; ".join(lines), lines)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = _problem(error.status_code, str(error.detail), str(error.detail))
        answer.headers.update(error.headers or {})
        methods = _methods(app, request)
        if error.status_code == METHOD_NOT_ALLOWED and methods:
            answer.headers["Allow"] = ", ".join(sorted(methods))
        return answer

    async def internal(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _problem(500, "An internal error", "the service's log has it")

    from optimizer.service.status import TABLE

    for kind in TABLE:
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, internal)


def _wording(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}"
