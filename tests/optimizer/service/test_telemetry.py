"""Traces: one for a job, from its submission to its publication, through all its processes."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from optimizer.service import jobs_pb2 as pb
from optimizer.service.app import Parts, Settings, make_service
from optimizer.service.auth import LOCAL
from optimizer.service.blobs import Blobs
from optimizer.service.feed import Feed
from optimizer.service.jobs import State
from optimizer.service.metrics import ServiceMetrics
from optimizer.service.rpc import JobsService, make_server
from optimizer.service.telemetry import Telemetry, TelemetryUnusable, telemetry, wanted_exporter
from optimizer.service.worker import Worker, WorkerOptions
from optimizer.tracing import Context, span, using
from serve import logs
from tests.optimizer.service.test_worker import OneJob
from tests.optimizer.service.told import succeed, taken
from tests.optimizer.study_result import met

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(parts: Parts, exporter: InMemorySpanExporter) -> Iterator[Parts]:
    made = Telemetry("tests", exporter, at_once=True)
    with using(made):
        yield replace(parts, telemetry=made)
    made.close()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {one.name: one for one in exporter.get_finished_spans()}


def trace_of(one: ReadableSpan) -> int:
    assert one.context is not None
    return one.context.trace_id


def attributes(one: ReadableSpan) -> dict[str, Any]:
    return dict(one.attributes or {})


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        pytest.param({}, None, id="nothing asked for"),
        pytest.param(ENDPOINT, "otlp", id="an endpoint"),
        pytest.param({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, "otlp", id="of traces"),
        pytest.param(ENDPOINT | {"OTEL_SDK_DISABLED": "TRUE"}, None, id="disabled"),
        pytest.param(ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, None, id="no traces"),
        pytest.param({"OTEL_TRACES_EXPORTER": "console"}, "console", id="to the console"),
    ],
)
def test_exporter_is_the_one_that_the_environment_names(
    environ: dict[str, str], name: str | None
) -> None:
    assert wanted_exporter(environ) == name


def test_environment_that_cant_be_met_is_refused_with_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(TelemetryUnusable, match="got 'zipkin', want one of otlp, console, none"):
        wanted_exporter({"OTEL_TRACES_EXPORTER": "zipkin"})
    wrong = ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
    with pytest.raises(TelemetryUnusable, match="got 'http/json', want http/protobuf or grpc"):
        telemetry(wrong, "x").__enter__()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(TelemetryUnusable, match=r"pip install 'trimserve\[telemetry\]'"):
        telemetry(ENDPOINT, "x").__enter__()


def test_rest_request_has_a_span_by_its_route_and_the_callers_trace(
    traced: Parts, settings: Settings, exporter: InMemorySpanExporter, spec: dict[str, Any]
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {
        "traceparent": f"00-{trace_id}-00f067aa0ba902b7-01",
        "Authorization": "Bearer s3cr3t",
    }
    with TestClient(make_service(traced, settings), base_url="http://localhost") as client:
        job = client.post("/v1/jobs", json={"spec": spec}, headers=headers).json()
        assert client.get("/livez").status_code == 200
        back = client.get("/login/provider?code=s3cr3t", follow_redirects=False)
        assert back.status_code == 303
    spans = by_name(exporter)
    assert set(spans) == {"POST /v1/jobs", "submit job"}
    request, submitted = spans["POST /v1/jobs"], spans["submit job"]
    assert f"{trace_of(request):032x}" == f"{trace_of(submitted):032x}" == trace_id
    assert submitted.parent is not None
    assert request.context is not None
    assert submitted.parent.span_id == request.context.span_id
    assert attributes(submitted)["trimserve.job.id"] == job["id"]
    kept = Context.parse(traced.ledger.job(job["id"]).traceparent)
    assert kept is not None
    assert kept.trace_id == trace_id
    assert "s3cr3t" not in "".join(one.to_json() for one in spans.values())


def test_grpc_call_has_a_span(
    traced: Parts, settings: Settings, exporter: InMemorySpanExporter
) -> None:
    import asyncio

    async def call() -> None:
        assert traced.telemetry is not None
        feed = Feed(traced.ledger)
        service = JobsService(
            traced.operations, traced.authenticator, ServiceMetrics(traced.ledger), feed
        )
        server, port = make_server(
            service, 1_000, None, "127.0.0.1:0", traced.telemetry.grpc_interceptors()
        )
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                get = channel.unary_unary(
                    "/trimserve.jobs.v1.Jobs/Get",
                    request_serializer=pb.JobRequest.SerializeToString,
                    response_deserializer=pb.Details.FromString,
                )
                with pytest.raises(grpc.aio.AioRpcError):
                    await get(pb.JobRequest(id="none"))
        finally:
            await server.stop(0)
            feed.close()

    asyncio.run(call())
    (called,) = exporter.get_finished_spans()
    assert called.name == "/trimserve.jobs.v1.Jobs/Get"
    assert attributes(called)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]


def test_publication_and_its_load_test_are_in_the_jobs_trace(
    traced: Parts, exporter: InMemorySpanExporter, spec: dict[str, Any]
) -> None:
    job, _ = traced.operations.submit(LOCAL, spec)
    succeed(traced, taken(traced, job.id), met())
    with span("another request"):
        published = traced.operations.publish(LOCAL, job.id, "prod")
    spans = by_name(exporter)
    publishing, asking = spans["publish version"], spans["another request"]
    assert trace_of(publishing) == trace_of(spans["submit job"]) != trace_of(asking)
    assert [link.context.trace_id for link in publishing.links] == [trace_of(asking)]
    assert attributes(publishing) == {
        "trimserve.job.id": job.id, "trimserve.repository": "prod",
        "trimserve.model": published.model, "trimserve.version": "1",
    }  # fmt: skip
    test, _ = traced.operations.load_test(LOCAL, published.id)
    kept = Context.parse(test.traceparent)
    assert kept is not None
    assert int(kept.trace_id, 16) == trace_of(publishing)


@pytest.mark.full
def test_worker_and_the_process_of_a_job_are_in_its_trace(
    traced: Parts,
    settings: Settings,
    tmp_path: Path,
    exporter: InMemorySpanExporter,
    spec: dict[str, Any],
) -> None:
    job, _ = traced.operations.submit(LOCAL, spec)  # of files that are no model: it fails
    metrics = OneJob()
    options = WorkerOptions("w", tmp_path / "work", str(tmp_path / "store.sqlite"))
    Worker(
        traced.ledger, traced.uploads, Blobs(settings.blobs), settings.policy.stores, options,
        {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin"}, metrics,
    ).run(metrics.stop)  # fmt: skip
    assert traced.ledger.job(job.id).state is State.FAILED
    spans = by_name(exporter)
    assert set(spans) == {
        "submit job",
        "run job",
        "claim job",
        "fetch files",
        "run process",
        "study",
    }
    assert len({trace_of(one) for one in spans.values()}) == 1
    parents = {"study": "run process", "run process": "run job", "run job": "submit job"}
    for name, above in parents.items():
        parent, context = spans[name].parent, spans[above].context
        assert parent is not None
        assert context is not None
        assert parent.span_id == context.span_id
    assert {attributes(one)["trimserve.job.id"] for one in spans.values()} == {job.id}
    assert attributes(spans["run job"])["trimserve.job.ended"] == "failed"
    assert not spans["run job"].status.is_ok
    kinds = {event.kind for event in traced.ledger.journal.events(job.id)}
    assert "span" not in kinds


def test_log_lines_have_the_ids_of_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = StringIO()
    logs.configure("json", "info", stream)
    try:
        with telemetry({"OTEL_TRACES_EXPORTER": "console"}, "x") as made:
            assert made is not None
            with span("work"):
                logging.getLogger("a").info("in")
                here = made.traceparent()
            logging.getLogger("a").info("out")
        logging.getLogger("a").info("after")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    context = Context.parse(here)
    assert context is not None
    assert (lines[0]["trace_id"], lines[0]["span_id"]) == (context.trace_id, context.span_id)
    assert ["trace_id" in line for line in lines] == [True, False, False]


@pytest.mark.full
def test_nothing_that_exports_is_imported_when_nobody_asked() -> None:
    code = (
        "import sys, optimizer.service.server, optimizer.service.worker\n"
        "from optimizer.service.telemetry import telemetry\n"
        "with telemetry({}, 'x') as made: assert made is None\n"
        # FastAPI has imported the interface.
        "kinds = ('opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.instrumentation')\n"
        "print([m for m in sys.modules if m.startswith(kinds)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
