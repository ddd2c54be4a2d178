"""One table of what went wrong: the HTTP status and the gRPC code of every error."""

from dataclasses import dataclass

from loadtest.document import DocumentInvalid
from optimizer.service.auth import Forbidden, ProviderUnavailable, Unauthenticated
from optimizer.service.database import DatabaseUnavailable
from optimizer.service.feed import TooManyFollowers
from optimizer.service.jobs import NotAllowed
from optimizer.service.object_store import StoreUnavailable
from optimizer.service.operations import NotThere, RequestInvalid
from optimizer.service.publishing import NothingToPublish, PublicationNotFound
from optimizer.service.records import JobNotFound, QuotaExceeded, StorageExceeded
from optimizer.service.repeats import KeyReused
from optimizer.service.uploads import OffsetWrong, UploadNotFound, UploadRefused
from serve.errors import ArtifactInvalid


@dataclass(frozen=True)
class Status:
    """`code` is the name of a `grpc.StatusCode`."""

    http: int
    code: str
    title: str


class PayloadTooLarge(Exception):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the body is larger than {limit_bytes} bytes")


class UnsupportedMedia(Exception):
    """A body of a type that isn't taken; says which are."""


TABLE: dict[type[Exception], Status] = {
    DocumentInvalid: Status(422, "INVALID_ARGUMENT", "The spec can't be used"),
    RequestInvalid: Status(422, "INVALID_ARGUMENT", "The request can't be used"),
    UploadRefused: Status(422, "INVALID_ARGUMENT", "The upload is refused"),
    Unauthenticated: Status(401, "UNAUTHENTICATED", "Who are you?"),
    Forbidden: Status(403, "PERMISSION_DENIED", "You may not do this"),
    JobNotFound: Status(404, "NOT_FOUND", "There is no such job"),
    UploadNotFound: Status(404, "NOT_FOUND", "There is no such upload"),
    PublicationNotFound: Status(404, "NOT_FOUND", "There is no such publication"),
    NotThere: Status(404, "NOT_FOUND", "It isn't there"),
    NotAllowed: Status(409, "FAILED_PRECONDITION", "The job is in another state"),
    NothingToPublish: Status(409, "FAILED_PRECONDITION", "There is nothing to publish"),
    ArtifactInvalid: Status(409, "FAILED_PRECONDITION", "The version can't be published"),
    KeyReused: Status(409, "ALREADY_EXISTS", "The idempotency key was used otherwise"),
    OffsetWrong: Status(409, "ABORTED", "The chunk doesn't follow on"),
    PayloadTooLarge: Status(413, "RESOURCE_EXHAUSTED", "The body is too large"),
    UnsupportedMedia: Status(415, "INVALID_ARGUMENT", "The body is of another type"),
    QuotaExceeded: Status(429, "RESOURCE_EXHAUSTED", "You have too many jobs"),
    StorageExceeded: Status(507, "RESOURCE_EXHAUSTED", "You have stored too much"),
    TooManyFollowers: Status(503, "RESOURCE_EXHAUSTED", "Too many follow events"),
    DatabaseUnavailable: Status(503, "UNAVAILABLE", "The database doesn't answer"),
    ProviderUnavailable: Status(502, "UNAVAILABLE", "The OpenID provider doesn't answer"),
    StoreUnavailable: Status(503, "UNAVAILABLE", "The store of files doesn't answer"),
}
INTERNAL = Status(500, "INTERNAL", "An internal error; the service's log has it")


def status_of(error: Exception) -> Status:
    return next((status for kind, status in TABLE.items() if isinstance(error, kind)), INTERNAL)
