"""Routes of jobs: submit, list, follow, read, change, publish.

Events can be read by page, or followed as server-sent events that go on from `Last-Event-ID`.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from optimizer.service import documents as d
from optimizer.service.auth import Forbidden, Unauthenticated
from optimizer.service.feed import Feed
from optimizer.service.jobs import Kind, State
from optimizer.service.journal import Event
from optimizer.service.operations import RequestInvalid
from optimizer.service.records import JobNotFound
from optimizer.service.records import Query as JobQuery
from optimizer.service.requests import caller_of, read_body
from optimizer.service.rest.bodies import MAX_BODY_BYTES, spec_body, submission, with_parsed_slo
from optimizer.service.rest.parameters import After, IdempotencyKey, JobId, Limit, Ops, Who
from optimizer.service.rest.problems import Problem, problems
from optimizer.service.status import status_of
from optimizer.service.watching import Watched


class Cloning(BaseModel):
    """`changes` is a JSON merge patch (RFC 7396) to the job's spec."""

    model_config = ConfigDict(extra="forbid")
    changes: dict[str, Any] = Field(default_factory=dict)
    labels: dict[str, str] | None = None


class Publishing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    repository: str = Field(min_length=1, max_length=128)
    model: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Its own name without.",
    )


router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post(
    "",
    operation_id="submit",
    status_code=201,
    responses={200: {"model": d.JobDocument}, **problems(409, 413, 415, 429, 507)},
    openapi_extra={"requestBody": spec_body()},
)
async def submit(
    request: Request, response: Response, who: Who, ops: Ops, key: IdempotencyKey = None
) -> d.JobDocument:
    """Submit a job: JSON, or the spec alone as YAML. 200 where the key was known."""
    body = await read_body(request, MAX_BODY_BYTES)
    asked = submission(body, request.headers.get("content-type", ""))
    spec = with_parsed_slo(asked.spec)
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


def _followed(job_id: JobId, who: Who, ops: Ops) -> str:
    """Before the stream begins, so that what is wrong is answered by its status."""
    return ops.job(who, job_id).id


@router.get(
    "/{job_id}/events/stream",
    operation_id="follow_events",
    response_class=EventSourceResponse,
    responses=problems(404),
)
async def follow_events(
    request: Request,
    job: Annotated[str, Depends(_followed)],
    last_event_id: Annotated[int | None, Header(alias="Last-Event-ID", ge=0, le=2**31 - 1)] = None,
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


def _sent(event: Event | None) -> ServerSentEvent:
    if event is None:
        return ServerSentEvent(comment="still here")
    data = d.event_document(event).model_dump_json()
    return ServerSentEvent(raw_data=data, event=event.kind, id=str(event.number))


def _labels(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, pair in zip(texts, pairs, strict=True) if not (pair[0] and pair[1])]
    if wrong:
        raise RequestInvalid("label", wrong[0], "NAME=VALUE")
    return {name: value for name, _, value in pairs}
