"""What REST and the page read from a request: who calls, whence, and a body of bounded size."""

from fastapi import Request

from optimizer.service.auth import Authenticator, Caller
from optimizer.service.status import PayloadTooLarge


def caller_of(request: Request) -> Caller:
    """By the header Authorization. Raises Unauthenticated."""
    authenticator: Authenticator = request.app.state.authenticator
    return authenticator.caller(request.headers.get("authorization"))


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
