"""Pages as responses: templates, the headers that keep foreign content out, errors as pages."""

import hashlib
import importlib.resources
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import cache
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment

from optimizer.quantities import points
from optimizer.service.auth import Caller, Unauthenticated
from optimizer.service.status import INTERNAL, Status, status_of
from optimizer.templating import environment

log = logging.getLogger(__name__)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    # With no-referrer a browser would send the Origin null with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
STATIC = {
    "report.css": ("optimizer", "templates/report.css", "text/css"),
    "page.css": ("optimizer.service.page", "static/page.css", "text/css"),
    "page.js": ("optimizer.service.page", "static/page.js", "text/javascript"),
    "front.js": ("optimizer.service.page", "static/front.js", "text/javascript"),
    "live.js": ("optimizer.service.page", "static/live.js", "text/javascript"),
    "icon.svg": ("optimizer.service.page", "static/icon.svg", "image/svg+xml"),
}


def static(name: str) -> tuple[bytes, str, str]:
    """Content, type and entity tag. Raises KeyError."""
    package, path, kind = STATIC[name]
    content = importlib.resources.files(package).joinpath(path).read_bytes()
    return content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


@cache
def page_environment() -> Environment:
    """Compiling the templates takes longer than rendering them."""
    made = environment()
    made.filters |= {"when": _when, "points": points, "share": _share}
    return made


class Pages:
    """Renders templates of `templates/page`."""

    def __init__(self) -> None:
        self._environment = page_environment()

    def answer(
        self, name: str, caller: Caller | None, status: int = 200, **values: Any
    ) -> HTMLResponse:
        """`caller` None: of whom nothing is known."""
        template = self._environment.get_template(f"page/{name}")
        text = template.render(caller=caller, **values)
        headers = HEADERS | {"Cache-Control": "no-store"}
        return HTMLResponse(text, status, headers)


class PageRoute(APIRoute):
    """A route whose errors are pages, and on which who isn't known is asked to log in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await inner(request)
            except Unauthenticated:
                path = request.url.path if request.method == "GET" else "/"
                return RedirectResponse(f"/login?next={quote(path)}", 303, HEADERS)
            except RequestValidationError as error:
                wrong_place = any(one["loc"][:1] == ("path",) for one in error.errors())
                what = Status(404, "", "There is no such page")
                said = "the address names nothing that is here"
                if not wrong_place:
                    what = Status(422, "", "The request can't be used")
                    said = "; ".join(
                        f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
                    )
                return _problem(request, what, said)
            except Exception as error:
                status = status_of(error)
                if status is not INTERNAL:
                    return _problem(request, status, str(error))
                log.exception("%s %s failed", request.method, request.url.path)
                return _problem(request, status, "the service's log has it")

        return handle


def _problem(request: Request, status: Status, detail: str) -> Response:
    pages: Pages = request.app.state.pages
    return pages.answer("problem.html", None, status.http, title=status.title, detail=detail)


def _share(value: float) -> str:
    """As a place in an SVG."""
    return f"{value * 100:.2f}%"


def _when(seconds: float | None) -> str:
    """To the minute, UTC; a dash for never."""
    if seconds is None:
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
