"""The application: routes, what is counted of each request, and what foreign pages may not do."""

import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response

from optimizer.service.auth import Authenticator
from optimizer.service.metrics import ServiceMetrics
from optimizer.service.operations import Operations
from optimizer.service.page.rendering import Pages
from optimizer.service.page.routes import page_router
from optimizer.service.provider_login import ProviderLogin
from optimizer.service.requests import is_own_origin
from optimizer.service.rest import health, jobs, overview, uploads
from optimizer.service.rest.problems import handle_errors, problem, problems
from optimizer.service.sessions import Sessions
from optimizer.service.telemetry import NO_REQUESTS, Telemetry
from optimizer.service.watching import RECHECK_S


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
        version=overview.VERSION,
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
    app.include_router(health.router)
    app.include_router(jobs.router)
    app.include_router(uploads.router)
    app.include_router(overview.router)
    app.include_router(page_router())
    handle_errors(app)

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
        return problem(403, "Another host", f"Host: got {name!r}, want one of this service")
    origin = request.headers.get("origin")
    if request.method not in ("GET", "HEAD", "OPTIONS") and not is_own_origin(request):
        return problem(403, "Another origin", f"Origin: got {origin!r}, want this service's own")
    return None
