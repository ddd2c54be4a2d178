"""REST beside inference: health, metadata, statistics, and the extensions of Triton's clients.

A FastAPI application for the data port, and a smaller one for the control port, which alone loads
and unloads unless the data port is allowed to. All are coroutines: the service belongs to the event
loop, and what takes long goes to threads below it.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from serve import VERSION
from serve.control import ModelControl
from serve.errors import (
    Forbidden,
    InvalidRequest,
    ModelNotReady,
    NotSupported,
    PayloadTooLarge,
    ServeError,
)
from serve.logs import LogSettings, change_settings
from serve.logs import settings as log_settings
from serve.model_config import config_document
from serve.planning import Wanted
from serve.service import InferenceService
from serve.transport import documents
from serve.transport.openapi import (
    CONFIG_ANSWER,
    DESCRIPTIONS,
    Answers,
    described,
    responses,
)
from serve.transport.rest import error_answer

MAX_BODY_BYTES = 1_000_000  # of requests that aren't inference
CONTROL_ELSEWHERE = (
    "models are loaded and settings changed on the control port (--control-port), or here with "
    "--control-on-data-port"
)

Body = TypeVar("Body", bound=pydantic.BaseModel)
Value = TypeVar("Value")
Tags = list[Any]


def data_app(service: InferenceService) -> fastapi.FastAPI:
    """What the data port answers beside inference; interactive documentation at `/docs`."""
    app = _application("trimserve", service, with_inference=True)
    _add_health(app, service)
    _add_metadata(app, service)
    _add_index(app, service)
    _add_control(app, service, allowed=service.options.control_on_data_port)
    _add_tracing(app, service)
    _add_shared_memory(app, service)
    _add_cuda_shared_memory(app)
    return app


def control_app(service: InferenceService) -> fastapi.FastAPI:
    """What the control port answers: the index, loading and unloading, settings."""
    app = _application("trimserve control", service, with_inference=False)
    _add_health(app, service)
    _add_index(app, service)
    _add_control(app, service, allowed=True)
    _add_tracing(app, service)
    return app


def _application(title: str, service: InferenceService, with_inference: bool) -> fastapi.FastAPI:
    app = fastapi.FastAPI(title=title, version=VERSION, redirect_slashes=False, redoc_url=None)
    app.openapi = described(app, service, with_inference)  # type: ignore[method-assign]

    @app.exception_handler(ServeError)
    async def serve_error(_: fastapi.Request, error: ServeError) -> fastapi.Response:
        status, headers, parts = error_answer(error)
        texts = {name.decode(): value.decode() for name, value in headers}
        return fastapi.Response(parts[0], status, texts)

    @app.exception_handler(RequestValidationError)
    async def misfit(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": _first_problem(list(error.errors()))}, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(app, request))
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers)

    @app.exception_handler(Exception)
    async def internal_error(_: fastapi.Request, __: Exception) -> JSONResponse:
        return JSONResponse({"error": "internal error, see the log"}, 500)

    return app


def _add_health(app: fastapi.FastAPI, service: InferenceService) -> None:
    tags: Tags = ["health"]

    @app.get("/v2/health/live", tags=tags, responses=responses())
    async def live() -> documents.LiveDocument:
        """The process is up."""
        return documents.LiveDocument(live=True)

    @app.get("/v2/health/ready", tags=tags, responses=responses(503))
    async def ready() -> documents.ReadyDocument:
        """200 where models answer and new requests are welcome, else 503."""
        if not service.is_ready:
            raise ModelNotReady("", "", "the server is loading or draining, or no model answers")
        return documents.ReadyDocument(ready=True)

    async def model_ready(model: str, version: str) -> documents.ModelReadyDocument:
        """200 where the model answers, else 503 with the reason."""
        service.check_model_ready(model, version)
        return documents.ModelReadyDocument(name=model, ready=True)

    _on_models(app, "/ready", model_ready, tags, (404, 503))


def _add_metadata(app: fastapi.FastAPI, service: InferenceService) -> None:
    tags: Tags = ["metadata"]

    @app.get("/v2", tags=tags, responses=responses())
    @app.get("/v2/", include_in_schema=False)
    async def server_metadata() -> documents.ServerDocument:
        """Name, version and protocol extensions of the server."""
        return documents.ServerDocument.of(service)

    @app.get("/v2/models/stats", tags=tags, responses=responses())
    async def all_statistics() -> documents.StatisticsDocument:
        """Counts and times of all loaded versions."""
        return _statistics(service, "", "")

    async def model_metadata(model: str, version: str) -> documents.ModelDocument:
        """Versions, platform and tensors of a model."""
        return documents.ModelDocument.of(service.model_metadata(model, version))

    async def model_config(model: str, version: str) -> JSONResponse:
        """The model's configuration, as Triton describes its own."""
        return JSONResponse(config_document(service.model_config(model, version)))

    async def model_statistics(model: str, version: str) -> documents.StatisticsDocument:
        """Counts and times of a model's loaded versions, or of one."""
        return _statistics(service, model, version)

    _on_models(app, "", model_metadata, tags, (404, 503))
    _on_models(app, "/config", model_config, tags, (404, 503), CONFIG_ANSWER)
    _on_models(app, "/stats", model_statistics, tags, (404, 503))


def _add_index(app: fastapi.FastAPI, service: InferenceService) -> None:
    @app.post(
        "/v2/repository/index",
        tags=["repository"],
        responses=responses(400, 413),
        openapi_extra=_body_schema(documents.IndexRequest),
    )
    async def index(request: fastapi.Request) -> list[documents.IndexEntry]:
        """All versions of the repository, with their states and reasons."""
        wanted = await _read(service, request, documents.IndexRequest)
        return [documents.IndexEntry.of(slot) for slot in await service.index(wanted.ready)]


def _add_control(app: fastapi.FastAPI, service: InferenceService, allowed: bool) -> None:
    """Loading and settings; where that isn't allowed here, 403 says where it is."""

    def control() -> ModelControl:
        if not allowed:
            raise Forbidden(CONTROL_ELSEWHERE)
        assert service.control is not None
        return service.control

    @app.post(
        "/v2/repository/models/{model}/load",
        tags=["repository"],
        responses=responses(400, 403, 404, 413),
        openapi_extra=_body_schema(documents.LoadRequest),
    )
    async def load(model: str, request: fastapi.Request) -> documents.NothingDocument:
        """Load a model, or load it again; what answers until then goes on answering."""
        given = (await _read(service, request, documents.LoadRequest)).parameters
        await control().load(Wanted(model, given.config, given.digest))
        return documents.NothingDocument()

    @app.post(
        "/v2/repository/models/{model}/unload",
        tags=["repository"],
        responses=responses(400, 403, 404, 413),
        openapi_extra=_body_schema(documents.UnloadRequest),
    )
    async def unload(model: str, request: fastapi.Request) -> documents.NothingDocument:
        """Unload all versions of a model, after the requests they are at work on."""
        await _read(service, request, documents.UnloadRequest)
        await control().unload(model)
        return documents.NothingDocument()

    @app.get("/v2/logging", tags=["settings"], responses=responses())
    async def logging_settings() -> documents.LogSettingsDocument:
        """What the server logs."""
        return _log_document()

    @app.post(
        "/v2/logging",
        tags=["settings"],
        responses=responses(400, 403, 413, 501),
        openapi_extra=_body_schema(documents.LogSettingsRequest),
    )
    async def change_logging(request: fastapi.Request) -> documents.LogSettingsDocument:
        """Change what the server logs; where to and how stays."""
        wanted = await _read(service, request, documents.LogSettingsRequest)
        if wanted != documents.LogSettingsRequest():
            control()
        change_logs(wanted)
        return _log_document()


def _add_tracing(app: fastapi.FastAPI, service: InferenceService) -> None:
    tags: Tags = ["settings"]

    async def trace_settings() -> documents.TraceSettingsDocument:
        """Requests aren't traced; this says so."""
        return documents.TraceSettingsDocument()

    async def change_tracing(request: fastapi.Request) -> documents.TraceSettingsDocument:
        """Requests aren't traced: only switching it off is understood."""
        refuse_tracing(await _read_object(service, request))
        return documents.TraceSettingsDocument()

    async def model_trace_settings(model: str) -> documents.TraceSettingsDocument:
        """A model's requests aren't traced; this says so."""
        service.model_metadata(model)
        return documents.TraceSettingsDocument()

    async def change_model_tracing(
        model: str, request: fastapi.Request
    ) -> documents.TraceSettingsDocument:
        """A model's requests aren't traced: only switching it off is understood."""
        service.model_metadata(model)
        return await change_tracing(request)

    everything, one = "/v2/trace/setting", "/v2/models/{model}/trace/setting"
    app.get(everything, tags=tags, responses=responses())(trace_settings)
    app.get(one, tags=tags, responses=responses(404, 503))(model_trace_settings)
    for path, endpoint, errors in (
        (everything, change_tracing, (400, 413, 501)),
        (one, change_model_tracing, (400, 404, 413, 501, 503)),
    ):
        app.post(path, tags=tags, responses=responses(*errors), openapi_extra=documents.TRACE_BODY)(
            endpoint
        )


def _add_shared_memory(app: fastapi.FastAPI, service: InferenceService) -> None:
    memory = service.shared_memory
    tags: Tags = ["shared memory"]
    base, one = "/v2/systemsharedmemory", "/v2/systemsharedmemory/region/{region}"

    @app.get(f"{base}/status", tags=tags, responses=responses(501))
    async def regions() -> list[documents.RegionDocument]:
        """Registered regions of the system's shared memory."""
        return [documents.RegionDocument.of(region) for region in memory.status()]

    @app.get(f"{one}/status", tags=tags, responses=responses(400, 501))
    async def region_status(region: str) -> list[documents.RegionDocument]:
        """The registered region of that name."""
        return [documents.RegionDocument.of(found) for found in memory.status(region)]

    @app.post(
        f"{one}/register",
        tags=tags,
        responses=responses(400, 413, 501, 503),
        openapi_extra=_body_schema(documents.RegisterRequest, required=True),
    )
    async def register(region: str, request: fastapi.Request) -> documents.NothingDocument:
        """Register a region of the system's shared memory under a name."""
        wanted = await _read(service, request, documents.RegisterRequest)
        memory.register(region, wanted.key, wanted.offset, wanted.byte_size)
        return documents.NothingDocument()

    @app.post(f"{one}/unregister", tags=tags, responses=responses(501))
    async def unregister(region: str) -> documents.NothingDocument:
        """Forget a region."""
        memory.unregister(region)
        return documents.NothingDocument()

    @app.post(f"{base}/unregister", tags=tags, responses=responses(501))
    async def unregister_all() -> documents.NothingDocument:
        """Forget all regions."""
        memory.unregister_all()
        return documents.NothingDocument()


def _add_cuda_shared_memory(app: fastapi.FastAPI) -> None:
    """What clients may ask for and none gets."""

    async def no_cuda() -> None:
        """CUDA shared memory isn't there."""
        raise NotSupported("CUDA shared memory is not supported")

    async def no_cuda_region(region: str) -> None:
        """CUDA shared memory isn't there."""
        del region  # whatever it is
        await no_cuda()

    base, one = "/v2/cudasharedmemory", "/v2/cudasharedmemory/region/{region}"
    for add, path, endpoint in (
        (app.get, f"{base}/status", no_cuda),
        (app.get, f"{one}/status", no_cuda_region),
        (app.post, f"{one}/register", no_cuda_region),
        (app.post, f"{one}/unregister", no_cuda_region),
        (app.post, f"{base}/unregister", no_cuda),
    ):
        add(
            path,
            tags=["shared memory"],
            status_code=501,
            response_model=documents.ErrorDocument,
            response_description=DESCRIPTIONS[501],
        )(endpoint)


def change_logs(wanted: documents.LogSettingsRequest) -> None:
    """Change what is logged; raises NotSupported for where to and how."""
    if wanted.log_file:
        raise NotSupported("log_file: logs go to standard error; redirect them where it is started")
    if wanted.log_format not in (None, "default"):
        raise NotSupported("log_format: chosen at the start, by --log-format")
    now = log_settings()
    change_settings(
        LogSettings(
            _or(wanted.log_info, now.info),
            _or(wanted.log_warning, now.warning),
            _or(wanted.log_error, now.error),
            _or(wanted.log_verbose_level, now.verbose_level),
        )
    )


def refuse_tracing(wanted: dict[str, Any]) -> None:
    """Raise NotSupported for settings that would trace; clearing (null) and OFF are fine."""
    for name, value in wanted.items():
        if value not in (None, [], "OFF", ["OFF"]):
            raise NotSupported(f"{name}: requests are not traced")


def _on_models(
    app: fastapi.FastAPI,
    suffix: str,
    endpoint: Callable[[str, str], Awaitable[Any]],
    tags: Tags,
    errors: tuple[int, ...],
    answers: Answers | None = None,
) -> None:
    """The endpoint of model and version, for a version by number and for a model's best one."""

    async def of_best(model: str) -> Any:
        return await endpoint(model, "")

    # What the framework makes the description from.
    of_best.__name__, of_best.__doc__ = endpoint.__name__, endpoint.__doc__
    of_best.__annotations__["return"] = endpoint.__annotations__["return"]
    for path, call in (
        ("/v2/models/{model}", of_best),
        ("/v2/models/{model}/versions/{version}", endpoint),
    ):
        app.get(path + suffix, tags=tags, responses=responses(*errors) | (answers or {}))(call)


def _methods(app: fastapi.FastAPI, request: fastapi.Request) -> list[str]:
    """The methods of all routes of a path: the framework names those of the first one only."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in found for method in route.methods or ()})


def _statistics(
    service: InferenceService, model: str, version: str
) -> documents.StatisticsDocument:
    return documents.StatisticsDocument(
        model_stats=[
            documents.ModelStatisticsDocument.of(one)
            for one in service.model_statistics(model, version)
        ]
    )


def _log_document() -> documents.LogSettingsDocument:
    now = log_settings()
    return documents.LogSettingsDocument(
        log_file="",
        log_info=now.info,
        log_warning=now.warning,
        log_error=now.error,
        log_verbose_level=now.verbose_level,
        log_format="default",
    )


async def _read(service: InferenceService, request: fastapi.Request, kind: type[Body]) -> Body:
    """The body as a document; an empty one has all defaults, if the document has."""
    try:
        return kind.model_validate(await _read_object(service, request))
    except pydantic.ValidationError as error:
        raise InvalidRequest(*_problem_parts(list(error.errors(include_url=False)))) from error


async def _read_object(service: InferenceService, request: fastapi.Request) -> dict[str, Any]:
    """The body as a JSON object, empty for an empty one; it counts among the bytes in flight."""
    body = bytearray()
    n_reserved = 0
    try:
        async for chunk in request.stream():
            service.reserve(len(chunk))
            n_reserved += len(chunk)
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise PayloadTooLarge(len(body), MAX_BODY_BYTES)
        return _object(bytes(body))
    finally:
        service.release(n_reserved)


def _object(body: bytes) -> dict[str, Any]:
    if not body.strip(b" \t\r\n"):  # JSON's white space
        return {}
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("body", "malformed JSON", "a JSON object") from error
    if not isinstance(document, dict):
        raise InvalidRequest("body", type(document).__name__, "a JSON object")
    return document


def _problem_parts(errors: list[Any]) -> tuple[str, object, str]:
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    got = "a field" if first["type"] == "extra_forbidden" else first.get("input")
    return field, got, str(first["msg"])


def _first_problem(errors: list[Any]) -> str:
    field, got, want = _problem_parts(errors)
    return str(InvalidRequest(field, got, want))


def _body_schema(kind: type[pydantic.BaseModel], required: bool = False) -> dict[str, Any]:
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    for name, definition in definitions.items():  # inlined: there are few, and none is recursive
        schema = json.loads(
            json.dumps(schema).replace(
                json.dumps({"$ref": f"#/components/schemas/{name}"})[1:-1],
                json.dumps(definition)[1:-1],
            )
        )
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"content": content, "required": required}}


def _or(wanted: Value | None, now: Value) -> Value:
    return now if wanted is None else wanted
