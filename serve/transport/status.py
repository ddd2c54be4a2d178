"""The one table that translates the server's errors to HTTP and gRPC."""

import grpc

from serve.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    Forbidden,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    ModelNotReady,
    NotSupported,
    PayloadTooLarge,
    QueueFull,
    ServeError,
    ShuttingDown,
    UnsupportedEncoding,
)

# error -> (HTTP status, gRPC status)
STATUS: dict[type[ServeError], tuple[int, grpc.StatusCode]] = {
    InvalidRequest: (400, grpc.StatusCode.INVALID_ARGUMENT),
    LoadFailed: (400, grpc.StatusCode.FAILED_PRECONDITION),
    Forbidden: (403, grpc.StatusCode.PERMISSION_DENIED),
    ModelNotFound: (404, grpc.StatusCode.NOT_FOUND),
    PayloadTooLarge: (413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    UnsupportedEncoding: (415, grpc.StatusCode.INVALID_ARGUMENT),
    QueueFull: (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    Cancelled: (499, grpc.StatusCode.CANCELLED),
    EngineFailed: (500, grpc.StatusCode.INTERNAL),
    ServeError: (500, grpc.StatusCode.INTERNAL),
    NotSupported: (501, grpc.StatusCode.UNIMPLEMENTED),
    ModelNotReady: (503, grpc.StatusCode.UNAVAILABLE),
    ShuttingDown: (503, grpc.StatusCode.UNAVAILABLE),
    DeadlineExceeded: (504, grpc.StatusCode.DEADLINE_EXCEEDED),
}


def http_status(error: ServeError) -> int:
    return STATUS[type(error)][0]


def grpc_status(error: ServeError) -> grpc.StatusCode:
    return STATUS[type(error)][1]
