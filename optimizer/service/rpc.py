"""gRPC: the same operations as REST, over the messages of proto/jobs.proto.

Calls run in threads, since the operations wait for the database; the streams run on the event
loop with all that follow.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import yaml
from google.protobuf.message import Message

from optimizer.service import jobs_pb2 as pb
from optimizer.service.auth import Authenticator, Caller
from optimizer.service.feed import Feed
from optimizer.service.jobs import ENDED, Job, Kind, State
from optimizer.service.metrics import ServiceMetrics
from optimizer.service.operations import Operations, RequestInvalid
from optimizer.service.publishing import Publication
from optimizer.service.records import MAX_PAGE, Query
from optimizer.service.status import status_of
from optimizer.service.uploads import Upload
from optimizer.service.watching import RECHECK_S, Watched

log = logging.getLogger(__name__)

SERVICE = "trimserve.jobs.v1.Jobs"
_LOG_LOOK_S = 1.0
_OVERHEAD_BYTES = 1 << 20
Call = Callable[[Any, Caller], Message]


class JobsService:
    """The handlers of SERVICE."""

    def __init__(
        self,
        operations: Operations,
        authenticator: Authenticator,
        metrics: ServiceMetrics,
        feed: Feed,
        recheck_s: float = RECHECK_S,
    ) -> None:
        self._ops = operations
        self._authenticator = authenticator
        self._metrics = metrics
        self._feed = feed
        self._recheck_s = recheck_s

    def handlers(self) -> Any:
        unary: dict[str, tuple[Call, type[Message], type[Message]]] = {
            "Submit": (self._submit, pb.SubmitRequest, pb.Job),
            "List": (self._list, pb.ListRequest, pb.ListResponse),
            "Get": (self._get, pb.JobRequest, pb.Details),
            "Cancel": (self._cancel, pb.JobRequest, pb.Job),
            "Retry": (self._retry, pb.JobRequest, pb.Job),
            "Clone": (self._clone, pb.CloneRequest, pb.Job),
            "Delete": (self._delete, pb.JobRequest, pb.Empty),
            "Result": (self._result, pb.JobRequest, pb.ResultResponse),
            "Publish": (self._publish, pb.PublishRequest, pb.Publication),
            "LoadTest": (self._load_test, pb.LoadTestRequest, pb.Job),
            "BeginUpload": (self._begin_upload, pb.BeginUploadRequest, pb.Upload),
            "AppendUpload": (self._append_upload, pb.AppendUploadRequest, pb.Upload),
            "GetUpload": (self._get_upload, pb.UploadRequest, pb.Upload),
            "DeleteUpload": (self._delete_upload, pb.UploadRequest, pb.Empty),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, call),
                request_deserializer=request.FromString,
                response_serializer=answer.SerializeToString,
            )
            for name, (call, request, answer) in unary.items()
        }
        streams: dict[str, tuple[Any, type[Message]]] = {
            "Follow": (self._follow, pb.Event),
            "Logs": (self._logs, pb.LogPiece),
        }
        for name, (stream, answer) in streams.items():
            methods[name] = grpc.unary_stream_rpc_method_handler(
                self._guarded_stream(name, stream),
                request_deserializer=pb.FollowRequest.FromString,
                response_serializer=answer.SerializeToString,
            )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _guarded(self, name: str, call: Call) -> Callable[..., Awaitable[Message]]:
        async def guarded(request: Any, context: Any) -> Message:
            began_s, code = time.perf_counter(), "OK"

            def carried_out() -> Message:
                return call(request, self._caller(context))

            try:
                return await asyncio.to_thread(carried_out)
            except Exception as error:
                code = status_of(error).code
                await self._abort(context, name, error)
                raise AssertionError("abort raises") from error
            finally:
                self._metrics.requests.labels("grpc", name, code).inc()
                self._metrics.request_duration.labels("grpc", name).observe(
                    time.perf_counter() - began_s
                )

        return guarded

    def _guarded_stream(self, name: str, stream: Any) -> Callable[..., AsyncIterator[Message]]:
        async def guarded(request: Any, context: Any) -> AsyncIterator[Message]:
            code = "OK"
            try:
                caller = await asyncio.to_thread(self._caller, context)
                job = await asyncio.to_thread(self._ops.job, caller, request.id)
                if request.after < 0:
                    raise RequestInvalid("after", request.after, "0 or more")
                watched = Watched(
                    lambda: self._ops.job(self._caller(context), job.id), self._recheck_s
                )
                async with aclosing(watched.stream(stream(job.id, request.after))) as messages:
                    async for message in messages:
                        if message is not None:
                            yield message
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except Exception as error:  # noqa: BLE001 - as above
                code = status_of(error).code
                await self._abort(context, name, error)
            finally:
                self._metrics.requests.labels("grpc", name, code).inc()

        return guarded

    async def _abort(self, context: Any, name: str, error: Exception) -> None:
        status = status_of(error)
        if status.http == 500:
            log.error("%s failed", name, exc_info=error)
        shown = str(error) if status.http != 500 else status.title
        await context.abort(getattr(grpc.StatusCode, status.code), shown[:4_000])

    def _caller(self, context: Any) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        return self._authenticator.caller(metadata.get("authorization"))

    # --- calls

    def _submit(self, request: Any, caller: Caller) -> Message:
        job, _ = self._ops.submit(
            caller,
            _spec(request.spec),
            dict(request.labels),
            request.priority,
            not request.without_verification,
            request.idempotency_key or None,
        )
        return job_message(job)

    def _list(self, request: Any, caller: Caller) -> Message:
        if not 0 <= request.limit <= MAX_PAGE:
            raise RequestInvalid("limit", request.limit, f"1 to {MAX_PAGE}, or 0 for 50")
        limit = request.limit or 50
        query = Query(
            owner=request.owner or None,
            states=tuple(_one_of(State, "states", one) for one in request.states),
            kind=_one_of(Kind, "kind", request.kind) if request.kind else None,
            labels=dict(request.labels),
            after=request.after or None,
            limit=limit,
        )
        found = self._ops.jobs(caller, query)
        more = found[-1].id if len(found) == limit else ""
        return pb.ListResponse(jobs=[job_message(job) for job in found], next=more)

    def _get(self, request: Any, caller: Caller) -> Message:
        details = self._ops.details(caller, request.id)
        return pb.Details(
            job=job_message(details.job),
            spec_json=json.dumps(details.spec.get("spec", details.spec)),
            progress_json=json.dumps(details.progress),
            publications=[publication_message(one) for one in details.publications],
        )

    def _cancel(self, request: Any, caller: Caller) -> Message:
        return job_message(self._ops.cancel(caller, request.id))

    def _retry(self, request: Any, caller: Caller) -> Message:
        return job_message(self._ops.retry(caller, request.id))

    def _clone(self, request: Any, caller: Caller) -> Message:
        try:
            changes = json.loads(request.changes_json or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestInvalid("changes_json", request.changes_json, "JSON") from error
        if not isinstance(changes, dict):
            raise RequestInvalid("changes_json", request.changes_json, "a JSON object")
        key = request.idempotency_key or None
        return job_message(self._ops.clone(caller, request.id, changes, None, key)[0])

    def _delete(self, request: Any, caller: Caller) -> Message:
        self._ops.delete(caller, request.id)
        return pb.Empty()

    def _result(self, request: Any, caller: Caller) -> Message:
        return pb.ResultResponse(result_json=self._ops.result(caller, request.id).decode())

    def _publish(self, request: Any, caller: Caller) -> Message:
        model, key = request.model or None, request.idempotency_key or None
        return publication_message(
            self._ops.publish(caller, request.id, request.repository, model, key)
        )

    def _load_test(self, request: Any, caller: Caller) -> Message:
        key = request.idempotency_key or None
        return job_message(self._ops.load_test(caller, request.publication_id, key)[0])

    def _begin_upload(self, request: Any, caller: Caller) -> Message:
        return upload_message(
            self._ops.begin_upload(caller, request.name, request.size_bytes, request.sha256)
        )

    def _append_upload(self, request: Any, caller: Caller) -> Message:
        return upload_message(
            self._ops.append_upload(caller, request.id, request.offset, request.content)
        )

    def _get_upload(self, request: Any, caller: Caller) -> Message:
        return upload_message(self._ops.upload(caller, request.id))

    def _delete_upload(self, request: Any, caller: Caller) -> Message:
        self._ops.delete_upload(caller, request.id)
        return pb.Empty()

    # --- streams

    async def _follow(self, job_id: str, after: int) -> AsyncGenerator[Message | None, None]:
        """None, as in the other stream, where there was nothing for a while."""
        async with aclosing(self._feed.follow(job_id, after, self._recheck_s)) as events:
            async for event in events:
                if event is None:
                    yield None
                    continue
                yield pb.Event(
                    number=event.number,
                    at_s=event.at_s,
                    kind=event.kind,
                    payload_json=json.dumps(event.payload),
                )

    async def _logs(self, job_id: str, after: int) -> AsyncGenerator[Message | None, None]:
        ledger = self._ops.ledger
        while True:
            heads = await asyncio.to_thread(ledger.journal.heads, [job_id])
            pieces = await asyncio.to_thread(ledger.journal.logs, job_id, after)
            for piece in pieces:
                after = piece.number
                yield pb.LogPiece(number=piece.number, at_s=piece.at_s, text=piece.text)
            if not pieces:
                if job_id not in heads or heads[job_id][1] in (*ENDED, State.DELETED):
                    return
                yield None
                await asyncio.sleep(_LOG_LOOK_S)


def make_server(
    service: JobsService,
    max_message_bytes: int,
    tls: tuple[Path, Path] | None,
    address: str,
    interceptors: Sequence[Any] = (),
) -> tuple[Any, int]:
    """A server that isn't started yet, and its port. Raises OSError where it can't listen."""
    server = grpc.aio.server(
        interceptors=tuple(interceptors),
        options=(
            ("grpc.max_receive_message_length", max_message_bytes + _OVERHEAD_BYTES),
            ("grpc.max_concurrent_streams", 1_000),
            ("grpc.so_reuseport", 0),
        ),
    )
    server.add_generic_rpc_handlers((service.handlers(),))
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            chain, key = tls
            pair = (key.read_bytes(), chain.read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise OSError(f"--grpc-port: can't listen on {address}: {error}") from error
    return server, port


def _spec(text: str) -> str | dict[str, Any]:
    """JSON where it is, else YAML."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(parsed, dict) and isinstance(parsed.get("slo"), str):
        try:
            parsed["slo"] = yaml.safe_load(parsed["slo"])
        except (yaml.YAMLError, RecursionError) as error:
            raise RequestInvalid("spec.slo", parsed["slo"], "YAML") from error
    return parsed if isinstance(parsed, dict) else text


def _one_of(kind: Any, name: str, text: str) -> Any:
    names: Iterable[str] = [one.value for one in kind]
    if text not in names:
        raise RequestInvalid(name, text, ", ".join(names))
    return kind(text)


def job_message(job: Job) -> pb.Job:
    return pb.Job(
        id=job.id,
        kind=job.kind,
        name=job.name,
        owner=job.owner,
        state=job.state,
        outcome=job.outcome or "",
        error=job.error or "",
        labels=dict(job.labels),
        priority=job.priority,
        parent_id=job.parent_id or "",
        run=job.run,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        lost=job.lost,
        worker=job.lease.worker if job.lease is not None else "",
        created_s=job.created_s,
        updated_s=job.updated_s,
        started_s=job.started_s,
        ended_s=job.ended_s,
        n_events=job.n_events,
    )


def publication_message(one: Publication) -> pb.Publication:
    return pb.Publication(
        id=one.id,
        job_id=one.job_id,
        repository=one.repository,
        model=one.model,
        version=one.version,
        state=one.state,
        error=one.error or "",
    )


def upload_message(upload: Upload) -> pb.Upload:
    return pb.Upload(
        id=upload.id,
        reference=f"upload:{upload.id}",
        name=upload.name,
        size_bytes=upload.size_bytes,
        sha256=upload.sha256,
        received_bytes=upload.received_bytes,
        complete=upload.complete,
    )
