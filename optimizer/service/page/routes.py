"""The addresses of the page. What changes something is a form that is posted and answered by a
redirect; it goes through the operations, as REST does, and so through scopes and audit."""

import re
from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import RedirectResponse

from optimizer.service.auth import Caller, Forbidden, ProviderUnavailable, Unauthenticated
from optimizer.service.jobs import Kind, State
from optimizer.service.operations import Operations, RequestInvalid
from optimizer.service.page.comparison import MAX_COMPARED, comparison, recipe_lines
from optimizer.service.page.job_view import budget_of, job_view, spec_text, study
from optimizer.service.page.rendering import HEADERS, PageRoute, Pages, static
from optimizer.service.provider_login import COOKIE as LOGIN_COOKIE
from optimizer.service.provider_login import PATH, ProviderLogin
from optimizer.service.provider_login import VALID_S as LOGIN_S
from optimizer.service.records import Query as JobQuery
from optimizer.service.requests import caller_of, is_own_origin, read_body, session_caller
from optimizer.service.sessions import COOKIE, VALID_BY_PROVIDER_S, VALID_S, Sessions

MAX_FORM_BYTES = 16_000
PAGE_SIZE = 25
Id = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]
VariantId = Annotated[str, Query(pattern=r"^[0-9a-f]{1,64}$")]


def _visitor(request: Request) -> Caller:
    """Who looks at the page, or posts a form that `_form` has seen to come from it."""
    return session_caller(request) or caller_of(request)


def _operations(request: Request) -> Operations:
    operations: Operations = request.app.state.operations
    return operations


def _pages(request: Request) -> Pages:
    pages: Pages = request.app.state.pages
    return pages


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form that was sent from here: whose cookie comes along says nothing about
    who wrote the form. Raises Forbidden, RequestInvalid, PayloadTooLarge."""
    if not is_own_origin(request, required=True):
        raise Forbidden("the form was sent from another site")
    body = await read_body(request, MAX_FORM_BYTES)
    try:
        fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=20)
    except ValueError as error:
        raise RequestInvalid("form", "unreadable", f"fields in UTF-8 ({error})") from error
    return {name: values[-1] for name, values in fields.items()}


Who = Annotated[Caller, Depends(_visitor)]
Ops = Annotated[Operations, Depends(_operations)]
Show = Annotated[Pages, Depends(_pages)]
Form = Annotated[dict[str, str], Depends(_form)]


def page_router() -> APIRouter:
    router = APIRouter(route_class=PageRoute, include_in_schema=False)
    _see(router)
    _do(router)
    _log_in(router)
    return router


def _see(router: APIRouter) -> None:
    @router.get("/", name="page_jobs")
    def jobs(
        who: Who,
        ops: Ops,
        pages: Show,
        state: State | None = None,
        after: Annotated[str | None, Query(pattern=r"^[0-9a-f]{16}$")] = None,
    ) -> Response:
        """Jobs, the newest first, with what each has spent."""
        query = JobQuery(states=(state,) if state else (), after=after, limit=PAGE_SIZE + 1)
        found = ops.jobs(who, query)
        shown = found[:PAGE_SIZE]
        budgets = {}
        for job in shown:
            is_told = job.kind is Kind.OPTIMIZATION and job.state is not State.QUEUED
            event = ops.last_event(who, job.id, "trial_ended") if is_told else None
            budgets[job.id] = budget_of(event.payload["budget"]) if event is not None else None
        counts = ops.counts(who)
        return pages.answer(
            "jobs.html", who,
            jobs=shown, budgets=budgets, counts=counts, state=state,
            n_jobs=sum(counts.values()),
            next=shown[-1].id if len(found) > PAGE_SIZE else None,
        )  # fmt: skip

    @router.get("/jobs/{job_id}", name="page_job")
    def job(job_id: Id, who: Who, ops: Ops, pages: Show) -> Response:
        view = job_view(ops, who, job_id)
        return pages.answer(
            "job.html", who,
            view=view, spec_text=spec_text(view.spec), max_compared=MAX_COMPARED,
        )  # fmt: skip

    @router.get("/jobs/{job_id}/compare", name="page_compare")
    def compare(
        job_id: Id,
        who: Who,
        ops: Ops,
        pages: Show,
        variant: Annotated[list[VariantId] | None, Query(max_length=200)] = None,
    ) -> Response:
        """Variants beside each other."""
        wanted = list(dict.fromkeys(variant or ()))
        told = ops.details(who, job_id)
        if not 2 <= len(wanted) <= MAX_COMPARED:
            raise RequestInvalid("variant", len(wanted), f"2 to {MAX_COMPARED} variants")
        asked = study(ops, who, told)
        by_id = {one.id: one for one in asked.found}
        if unknown := [one for one in wanted if one not in by_id]:
            raise RequestInvalid("variant", unknown[0], "variants of this job")
        compared = [by_id[one] for one in wanted]
        quantile = asked.slo.latency.quantile if asked.slo is not None else 0.99
        return pages.answer(
            "compare.html", who,
            job=told.job, compared=compared, best_id=asked.best_id,
            lines=comparison(compared, quantile), steps=recipe_lines(compared),
        )  # fmt: skip

    @router.get("/static/{name}", name="page_static")
    def files(name: str, request: Request, pages: Show) -> Response:
        try:
            content, kind, tag = static(name)
        except KeyError:
            return pages.answer(
                "problem.html", None, 404, title="There is no such file", detail=repr(name)
            )
        headers = HEADERS | {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)


def _do(router: APIRouter) -> None:
    @router.post("/jobs/{job_id}/cancel", name="page_cancel")
    def cancel(job_id: Id, _form: Form, who: Who, ops: Ops) -> Response:
        ops.cancel(who, job_id)
        return _to(f"/jobs/{job_id}")

    @router.post("/jobs/{job_id}/retry", name="page_retry")
    def retry(job_id: Id, _form: Form, who: Who, ops: Ops) -> Response:
        ops.retry(who, job_id)
        return _to(f"/jobs/{job_id}")

    @router.post("/jobs/{job_id}/publish", name="page_publish")
    def publish(job_id: Id, form: Form, who: Who, ops: Ops) -> Response:
        ops.publish(who, job_id, form.get("repository", ""), form.get("model") or None)
        return _to(f"/jobs/{job_id}#published")

    @router.post("/publications/{publication_id}/load-test", name="page_load_test")
    def load_test(publication_id: Id, form: Form, who: Who, ops: Ops) -> Response:
        """`once` makes the same form, sent twice, one load test."""
        job, _ = ops.load_test(who, publication_id, form.get("once") or None)
        return _to(f"/jobs/{job.id}")


def _log_in(router: APIRouter) -> None:
    @router.get("/login", name="page_login")
    def ask(request: Request, pages: Show, next: str = "/") -> Response:  # noqa: A002
        if request.app.state.authenticator.is_open:
            return _to("/")
        return _login_page(request, pages, next, "")

    @router.post("/login", name="page_log_in")
    def log_in(request: Request, form: Form, pages: Show) -> Response:
        sessions: Sessions | None = request.app.state.sessions
        target = form.get("next", "/")
        if sessions is None:
            return _login_page(request, pages, target, "", 401)
        try:
            token = sessions.begin(form.get("key", "").strip())
        except Unauthenticated as error:
            return _login_page(request, pages, target, f"{error}", 401)
        answer = _to(_own_path(target))
        answer.set_cookie(
            COOKIE, token, max_age=VALID_S, httponly=True, samesite="strict",
            secure=_is_https(request),
        )  # fmt: skip
        return answer

    @router.get(f"{PATH}/begin", name="page_provider")
    def to_provider(request: Request, pages: Show, next: str = "/") -> Response:  # noqa: A002
        login: ProviderLogin | None = request.app.state.provider_login
        if login is None:
            return _to("/login")
        try:
            url, cookie = login.begin(_own_path(next))
        except ProviderUnavailable as error:
            return _login_page(request, pages, next, f"{error}", 502)
        answer = _to(url)
        # Lax: it has to come along when the provider sends the browser back.
        answer.set_cookie(
            LOGIN_COOKIE, cookie, max_age=LOGIN_S, path=PATH, httponly=True, samesite="lax",
            secure=_is_https(request),
        )  # fmt: skip
        return answer

    @router.get(PATH, name="page_from_provider")
    def from_provider(request: Request, pages: Show) -> Response:
        """The browser comes back. It is answered by a page that goes on by itself: with a redirect
        it would be the provider that leads on, and a strict cookie would stay behind."""
        login: ProviderLogin | None = request.app.state.provider_login
        sessions: Sessions | None = request.app.state.sessions
        if login is None or sessions is None:
            return _to("/login")
        cookie = request.cookies.get(LOGIN_COOKIE, "")
        try:
            caller, target = login.finish(cookie, dict(request.query_params))
        except Unauthenticated as error:
            return _login_page(request, pages, "/", f"{error}", 401)
        except ProviderUnavailable as error:
            return _login_page(request, pages, "/", f"{error}", 502)
        answer = pages.answer("logged_in.html", None, target=target)
        answer.set_cookie(
            COOKIE, sessions.begin_for(caller), max_age=VALID_BY_PROVIDER_S, httponly=True,
            samesite="strict", secure=_is_https(request),
        )  # fmt: skip
        answer.delete_cookie(LOGIN_COOKIE, path=PATH, httponly=True, samesite="lax")
        return answer

    @router.post("/logout", name="page_log_out")
    def log_out(request: Request, _form: Form) -> Response:
        sessions: Sessions | None = request.app.state.sessions
        if sessions is not None and (token := request.cookies.get(COOKIE)):
            sessions.end(token)
        answer = _to("/login")
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=_is_https(request))
        return answer


def _login_page(
    request: Request, pages: Pages, target: str, error: str, status: int = 200
) -> Response:
    sessions: Sessions | None = request.app.state.sessions
    return pages.answer(
        "login.html", None, status,
        next=_own_path(target), error=error,
        takes_keys=sessions is not None and sessions.take_keys,
        has_provider=request.app.state.provider_login is not None, provider_path=f"{PATH}/begin",
    )  # fmt: skip


def _own_path(target: str) -> str:
    """Where to go after the login: nowhere but on this site, whatever a link says."""
    parts = urlsplit(target)
    is_own = not parts.scheme and not parts.netloc and re.fullmatch(r"/[\w/?&=.-]*", target)
    return target if is_own and not target.startswith("//") else "/"


def _is_https(request: Request) -> bool:
    """By itself, or by a proxy; who lies about it only keeps its own cookie from http."""
    forwarded = request.headers.get("x-forwarded-proto", "")
    origin = request.headers.get("origin", "")
    return "https" in (request.url.scheme, forwarded) or origin.startswith("https://")


def _to(path: str) -> Response:
    return RedirectResponse(path, 303, HEADERS)
