"""What REST and the page read from a request: who calls, whence, and a body of bounded size."""

from fastapi import Request

from optimizer.service.auth import Authenticator, Caller
from optimizer.service.sessions import COOKIE, Sessions
from optimizer.service.status import PayloadTooLarge


def caller_of(request: Request) -> Caller:
    """By the header Authorization; a browser that only reads, by its session. Raises
    Unauthenticated."""
    authenticator: Authenticator = request.app.state.authenticator
    said = request.headers.get("authorization")
    if said is None and request.method in ("GET", "HEAD"):
        found = session_caller(request)
        if found is not None:
            return found
    return authenticator.caller(said)


def session_caller(request: Request) -> Caller | None:
    """Whose session the cookie names, None without one. Raises Unauthenticated where it is over.

    Whoever changes something by it looks where the request comes from, too."""
    sessions: Sessions | None = request.app.state.sessions
    token = request.cookies.get(COOKIE)
    return sessions.caller(token) if sessions is not None and token else None


def is_own_origin(request: Request, required: bool = False) -> bool:
    """Whether the page that sent it is the service's own. Programs name no origin; where one is
    `required`, a browser's word that it is the same will do. A proxy may speak TLS for us."""
    origin = request.headers.get("origin")
    if origin is None:
        return not required or request.headers.get("sec-fetch-site") == "same-origin"
    host = request.headers.get("host")
    return origin in (f"{request.url.scheme}://{host}", f"https://{host}")


async def read_body(request: Request, limit: int) -> bytes:
    """Raises PayloadTooLarge as soon as that is known."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise PayloadTooLarge(limit)
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise PayloadTooLarge(limit)
        pieces.append(piece)
    return b"".join(pieces)
