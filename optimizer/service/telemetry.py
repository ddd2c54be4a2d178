"""OpenTelemetry: where a process of the service sends its traces, by the standard OTEL_* variables.

Off unless one of them names an exporter: then nothing of the SDK is imported. It belongs to the
service and its workers, whose environment holds the exporter's credentials; what jobs' processes
record comes here as values (`optimizer.tracing`).
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.telemetry import TelemetryConfig

from optimizer.tracing import Kind, Span, SpanRecord, Value, using

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp", "opentelemetry.instrumentation.grpc")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTERS = ("otlp", "console", "none")
_SCOPE = "trimserve.optimizer"
# Addresses that say nothing, and the one whose query holds a provider's code.
_UNTRACED = ("/livez", "/readyz", "/metrics", "/static/", "/login/provider")


class TelemetryUnusable(Exception):
    """The environment asks for traces that can't be sent; says what is wanted."""


def wanted_exporter(environ: Mapping[str, str]) -> str | None:
    """The exporter's name, None for no traces. Raises TelemetryUnusable."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    name = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if not name:
        return "otlp" if any(environ.get(one) for one in _ENDPOINTS) else None
    if name not in _EXPORTERS:
        raise TelemetryUnusable(
            f"OTEL_TRACES_EXPORTER: got {name!r}, want one of {', '.join(_EXPORTERS)}"
        )
    return None if name == "none" else name


class Telemetry:
    """A tracer (`optimizer.tracing.Tracer`) that exports by `exporter`, an SDK's SpanExporter, in
    batches on a thread of its own, or `at_once`."""

    def __init__(self, service: str, exporter: Any, at_once: bool = False) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        resource = Resource.create()
        named = str(resource.attributes.get(SERVICE_NAME, "unknown_service"))
        if named.startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: service}))
        self._resource = resource
        self._processor = SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter)
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(self._processor)
        self._tracer = self.provider.get_tracer(_SCOPE)

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, Value],
        parent: str | None,
        kind: Kind,
        start_ns: int | None,
    ) -> Iterator[Span]:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context, links = None, []
        if parent is not None:
            context = TraceContextTextMapPropagator().extract({"traceparent": parent})
            around = trace.get_current_span().get_span_context()
            links = [trace.Link(around)] if around.is_valid else []
        with self._tracer.start_as_current_span(
            name, context, trace.SpanKind[kind.upper()], dict(attributes), links, start_ns,
            record_exception=False, set_status_on_exception=False,
        ) as made:  # fmt: skip
            under_way = _UnderWay(made)
            try:
                yield under_way
            except BaseException:
                under_way.fail()  # the message stays out: it may hold what a user's code says
                raise

    def traceparent(self) -> str | None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier.get("traceparent")

    def pass_on(self, record: SpanRecord) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

        def context(span_id: str, is_remote: bool) -> SpanContext:
            sampled = TraceFlags(TraceFlags.SAMPLED)
            return SpanContext(int(record.trace_id, 16), int(span_id, 16), is_remote, sampled)

        self._processor.on_end(
            ReadableSpan(
                record.name,
                context(record.span_id, False),
                context(record.parent_id, True),
                self._resource,
                dict(record.attributes),
                status=Status(StatusCode.ERROR if record.failed else StatusCode.UNSET),
                start_time=record.start_ns,
                end_time=record.end_ns,
                instrumentation_scope=InstrumentationScope(_SCOPE),
            )
        )

    def fastapi(self) -> TelemetryConfig:
        """What `FastAPI(telemetry=…)` takes: a span for each request, by its route."""
        return {
            **NO_REQUESTS,
            "tracing": True,
            "tracer_provider": self.provider,
            "exclude": lambda scope: str(scope.get("path", "")).startswith(_UNTRACED),
        }

    def grpc_interceptors(self) -> list[Any]:
        from opentelemetry.instrumentation.grpc import aio_server_interceptor

        return [aio_server_interceptor(self.provider)]  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Send what is left."""
        self.provider.shutdown()


NO_REQUESTS: TelemetryConfig = {
    "tracing": False, "metrics": False, "logs": False, "operation_spans": False,
    "auto_configure": False,
}  # fmt: skip
"""What `FastAPI(telemetry=…)` takes for none; its metrics and logs are always left to ours."""


@contextmanager
def telemetry(environ: Mapping[str, str], service: str) -> Iterator[Telemetry | None]:
    """As the environment asks for it, used by this process until the block ends; None without.
    Log lines have the ids of the trace and the span that they are written in.

    Raises TelemetryUnusable."""
    name = wanted_exporter(environ)
    if name is None:
        yield None
        return
    made = Telemetry(service, _exporter(name, environ), at_once=name == "console")
    ids, handlers = _TraceIds(), logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(ids)
    try:
        with using(made):
            yield made
    finally:
        for handler in handlers:
            handler.removeFilter(ids)
        made.close()


class _UnderWay:
    def __init__(self, span: Any) -> None:
        self._span = span

    def set(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)

    def fail(self) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR))


class _TraceIds(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        from opentelemetry.trace import format_span_id, format_trace_id, get_current_span

        context = get_current_span().get_span_context()
        if context.is_valid:
            record.trace_id = format_trace_id(context.trace_id)
            record.span_id = format_span_id(context.span_id)
        return True


def _exporter(name: str, environ: Mapping[str, str]) -> Any:
    _check_installed()
    if name == "console":
        import sys

        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)  # standard output says the ports
    protocol = next((environ[one] for one in _PROTOCOLS if environ.get(one)), "http/protobuf")
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as OverGrpc,
        )

        return OverGrpc()
    raise TelemetryUnusable(
        f"OTEL_EXPORTER_OTLP_PROTOCOL: got {protocol!r}, want http/protobuf or grpc"
    )


def _check_installed() -> None:
    missing = [name for name in _NEEDED if not _is_there(name)]
    if missing:
        raise TelemetryUnusable(
            f"OTEL_* variables ask for traces, but {', '.join(missing)} is missing: "
            "pip install 'trimserve[telemetry]', or set OTEL_SDK_DISABLED=true"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
