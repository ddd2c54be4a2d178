"""What became of each request: the raw material of every figure in a report.

A request's status is one integer on both transports: an HTTP status as it is, a gRPC code
plus 1000, and a negative number where no server's answer was seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

HTTP_OK = 200
GRPC_BASE = 1000
CONNECTION_FAILED = -1
TIMED_OUT = -2
DROPPED = -3
UNFINISHED = -4

CLIENT_STATUSES: Mapping[int, str] = {
    CONNECTION_FAILED: "connection failed",
    TIMED_OUT: "timed out",
    DROPPED: "dropped, too many in flight",
    UNFINISHED: "unfinished",
}
# https://grpc.github.io/grpc/core/md_doc_statuscodes.html
GRPC_CODES: Mapping[int, str] = {
    0: "OK",
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}
# The gRPC library gives these for a broken connection too, so the server may not know of it.
AMBIGUOUS_GRPC_CODES = (1, 2, 13, 14)
# The server says that the request itself is wrong, which no load can cause.
INVALID_REQUEST = (400, 413, 415, 422, GRPC_BASE + 3)

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Samples:
    """One row for each planned request, in the order of the schedule; seconds from the start."""

    intended_s: FloatArray
    """[n] when it was meant to be sent"""
    sent_s: FloatArray
    """[n] when it was, NaN where it was dropped"""
    done_s: FloatArray
    """[n] when its answer was complete or given up, NaN where dropped or unfinished"""
    target: npt.NDArray[np.int32]
    """[n] index of the target"""
    status: npt.NDArray[np.int32]
    """[n] HTTP status, 1000 + gRPC code, or one of CLIENT_STATUSES"""
    n_right: npt.NDArray[np.int32] | None = None
    """[n] rows answered right, -1 where that isn't known; none: no answer was graded"""

    def __len__(self) -> int:
        return len(self.intended_s)

    @property
    def latency_s(self) -> FloatArray:
        """[n] from the intended send to the end; infinite where there is none."""
        return _infinite_where_nan(self.done_s - self.intended_s)

    @property
    def latency_from_send_s(self) -> FloatArray:
        """[n] from the actual send to the end: what a generator without lag might have seen."""
        return _infinite_where_nan(self.done_s - self.sent_s)

    @property
    def lag_s(self) -> FloatArray:
        """[m] how much later than intended each of the m sent requests was sent."""
        return (self.sent_s - self.intended_s)[self.sent]

    @property
    def sent(self) -> BoolArray:
        """[n] not dropped"""
        return np.not_equal(self.status, DROPPED)

    @property
    def ok(self) -> BoolArray:
        """[n] answered with a success"""
        return np.isin(self.status, (HTTP_OK, GRPC_BASE))

    @property
    def invalid(self) -> BoolArray:
        """[n] refused as a wrong request"""
        return np.isin(self.status, INVALID_REQUEST)

    @property
    def answered(self) -> BoolArray:
        """[n] the server's own answer arrived, so that the server must have counted it"""
        ambiguous = np.isin(self.status, [GRPC_BASE + code for code in AMBIGUOUS_GRPC_CODES])
        return (self.status > 0) & ~ambiguous

    @property
    def maybe_counted(self) -> BoolArray:
        """[n] sent, yet no certain answer: the server may or may not have counted it"""
        return self.sent & ~self.answered

    @property
    def graded(self) -> BoolArray:
        """[n] a success whose answer was compared with its labels"""
        known = np.zeros(len(self), np.bool_) if self.n_right is None else self.n_right >= 0
        return self.ok & known

    def count_by_status(self) -> dict[int, int]:
        statuses, counts = np.unique(self.status, return_counts=True)
        return dict(zip(statuses.tolist(), counts.tolist(), strict=True))


def status_label(status: int) -> str:
    """A status for people: "HTTP 503", "gRPC UNAVAILABLE", "timed out"."""
    if status < 0:
        return CLIENT_STATUSES.get(status, f"client status {status}")
    if status >= GRPC_BASE:
        code = status - GRPC_BASE
        return f"gRPC {GRPC_CODES.get(code, code)}"
    return f"HTTP {status}"


def save_samples(samples: Samples, path: Path) -> None:
    """Write an .npz file, one array for each column, nothing pickled."""
    columns = {
        column.name: getattr(samples, column.name)
        for column in fields(Samples)
        if getattr(samples, column.name) is not None
    }
    with path.open("wb") as file:
        np.savez(file, **columns)


def load_samples(path: Path) -> Samples:
    with np.load(path, allow_pickle=False) as columns:
        names = [column.name for column in fields(Samples) if column.name in columns]
        return Samples(**{name: columns[name] for name in names})


def _infinite_where_nan(values: FloatArray) -> FloatArray:
    return np.where(np.isnan(values), np.inf, values)
