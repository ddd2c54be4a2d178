"""Answers to errors: problem documents (RFC 9457)."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from optimizer.service.auth import Unauthenticated
from optimizer.service.database import DatabaseUnavailable
from optimizer.service.object_store import StoreUnavailable
from optimizer.service.records import QuotaExceeded
from optimizer.service.status import TABLE, status_of
from optimizer.service.uploads import OffsetWrong

log = logging.getLogger(__name__)

METHOD_NOT_ALLOWED = 405


class Problem(BaseModel):
    """RFC 9457. `problems` holds one sentence for each thing that is wrong."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    problems: list[str] = Field(default_factory=list)


_PROBLEM = {"model": Problem, "content": {"application/problem+json": {}}}


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The errors that every operation can answer, and `codes`."""
    return dict.fromkeys(sorted({400, 401, 403, 422, 500, 503, *codes}), _PROBLEM)


def problem(status: int, title: str, detail: str, lines: list[str] | None = None) -> JSONResponse:
    document = Problem(title=title, status=status, detail=detail, problems=lines or [])
    return JSONResponse(
        document.model_dump(), status_code=status, media_type="application/problem+json"
    )


def _methods(app: FastAPI, request: Request) -> set[str]:
    """Those of all routes with the request's path: the framework names the first one's alone."""
    return {
        method.upper()
        for path, methods in app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.url.path)
        for method in methods
    }


def handle_errors(app: FastAPI) -> None:
    async def ours(_request: Request, error: Exception) -> Response:
        status = status_of(error)
        lines = list(getattr(error, "problems", ()))
        answer = problem(status.http, status.title, str(error), lines)
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
        return problem(422, "The request can't be used", "; ".join(lines), lines)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = problem(error.status_code, str(error.detail), str(error.detail))
        answer.headers.update(error.headers or {})
        methods = _methods(app, request)
        if error.status_code == METHOD_NOT_ALLOWED and methods:
            answer.headers["Allow"] = ", ".join(sorted(methods))
        return answer

    async def internal(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "An internal error", "the service's log has it")

    for kind in TABLE:
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, internal)


def _wording(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}"
