"""The server's errors: each leaf is one decision for the caller and carries data.

Nothing here knows HTTP or gRPC; `serve.transport.status` translates by one table.
"""

from collections.abc import Sequence
from typing import ClassVar

MAX_MESSAGE_LENGTH = 1024


class ServeError(Exception):
    """Base of all errors that a client may see; `code` is its name in metrics and logs.

    Messages quote what clients sent, so they are bounded and show control characters escaped.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message[:MAX_MESSAGE_LENGTH])[:MAX_MESSAGE_LENGTH])


class InvalidRequest(ServeError):
    """The request can't be served as it is; sending it again changes nothing."""

    code = "invalid_request"

    def __init__(self, field: str, got: object, want: str) -> None:
        super().__init__(f"{_bounded(field)}: got {_shown(got)}, want {want}")
        self.field = field
        self.got = got
        self.want = want


class PayloadTooLarge(ServeError):
    code = "payload_too_large"

    def __init__(self, size_bytes: int, max_bytes: int) -> None:
        super().__init__(f"request of {size_bytes} bytes or more, at most {max_bytes} are allowed")
        self.max_bytes = max_bytes


class UnsupportedEncoding(ServeError):
    code = "unsupported_encoding"

    def __init__(self, encoding: str, allowed: Sequence[str]) -> None:
        super().__init__(
            f"Content-Encoding: got {_shown(encoding)}, want one of {', '.join(allowed)}"
        )
        self.allowed = tuple(allowed)


class NotSupported(ServeError):
    """A part of the protocol that this server doesn't implement."""

    code = "not_supported"


class Forbidden(ServeError):
    """Understood, and not allowed here; the message says where or how it would be."""

    code = "forbidden"


class ModelNotFound(ServeError):
    code = "model_not_found"

    def __init__(self, model: str, version: str = "") -> None:
        what = f"model {_shown(model)}" + (f" version {_shown(version)}" if version else "")
        super().__init__(f"{what} is not in the repository")
        self.model = model
        self.version = version


class ModelNotReady(ServeError):
    code = "model_not_ready"

    def __init__(self, model: str, version: str, reason: str) -> None:
        super().__init__(f"model {model!r} version {version!r} is not ready: {reason}")
        self.reason = reason


class ShuttingDown(ServeError):
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is draining and admits no new requests")


class QueueFull(ServeError):
    code = "queue_full"

    def __init__(self, limit: int, retry_after_s: float, unit: str = "requests") -> None:
        super().__init__(
            f"the queue holds its limit of {limit} {unit}, retry in {retry_after_s:.3g} s"
        )
        self.limit = limit
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServeError):
    code = "deadline_exceeded"

    def __init__(self, waited_s: float, phase: str) -> None:
        super().__init__(f"deadline exceeded in the {phase} after {waited_s * 1e3:.1f} ms")
        self.waited_s = waited_s
        self.phase = phase


class Cancelled(ServeError):
    """The client went away; nobody reads the answer."""

    code = "cancelled"

    def __init__(self) -> None:
        super().__init__("the client cancelled the request")


class LoadFailed(ServeError):
    """A model that was asked to be loaded can't be; what was there before goes on."""

    code = "load_failed"

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"model {_shown(model)} was not loaded: {reason}")
        self.reason = reason


class EngineFailed(ServeError):
    """The engine raised; the cause is in the log only, since it may name internals."""

    code = "engine_failed"

    def __init__(self, model: str, version: str) -> None:
        super().__init__(f"the engine of model {model!r} version {version!r} failed, see the log")


class ArtifactInvalid(Exception):
    """A model version that can't be loaded, with the file and what is wrong with it."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


def _shown(value: object) -> str:
    """`repr`, bounded and with control characters escaped: it goes to clients and logs."""
    return _bounded(repr(value))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _bounded(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
