"""Spans: what is done, from when to when and as a part of what, for whoever asked for traces.

Where nobody asked, nothing is kept and nothing imported. One process of several exports
(`optimizer.service.telemetry`); the others record spans as plain values and hand them up to it, so
they need neither its library nor its credentials. Contexts travel as W3C Trace Context's
`traceparent` (version 00). It doesn't know what is done.
"""

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

Value = str | int | float | bool
Kind = Literal["internal", "producer", "consumer"]
MAX_SPANS = 10_000
"""That one process hands up, or one job's processes together; the rest is left out."""
MAX_ATTRIBUTES = 32
MAX_TEXT_CHARS = 1_000
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True)
class Context:
    """A place in a trace: 32 and 16 hexadecimal digits."""

    trace_id: str
    span_id: str
    is_sampled: bool = True

    @classmethod
    def parse(cls, traceparent: str | None) -> "Context | None":
        """None for what isn't one."""
        match = _TRACEPARENT.fullmatch(traceparent or "")
        if match is None or not int(match[1], 16) or not int(match[2], 16):
            return None
        return cls(match[1], match[2], bool(int(match[3], 16) & 1))

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.is_sampled:02x}"


@dataclass(frozen=True)
class SpanRecord:
    """A span that has ended. Times are nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value] = field(default_factory=dict)
    failed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "SpanRecord":
        """Of a process that runs user code and may say anything. Raises ValueError."""
        try:
            record = cls(**document)
        except TypeError as error:
            raise ValueError(f"no span: {error}") from error
        ids = (record.span_id, record.parent_id)
        times = (record.start_ns, record.end_ns)
        if not isinstance(record.name, str) or not 1 <= len(record.name) <= 128:
            raise ValueError("no span: want a name of at most 128 characters")
        if not all(isinstance(at_ns, int) and 0 <= at_ns < 2**63 for at_ns in times):
            raise ValueError("no span: want times in nanoseconds since 1970")
        if not all(Context.parse(f"00-{record.trace_id}-{one}-01") for one in ids):
            raise ValueError("no span: want ids of hexadecimal digits")
        if not isinstance(record.attributes, Mapping) or not isinstance(record.failed, bool):
            raise ValueError("no span: want attributes as a mapping, failed as a truth value")
        if len(record.attributes) > MAX_ATTRIBUTES or not all(
            isinstance(name, str)
            and len(name) <= 128
            and isinstance(value, Value)
            and len(str(value)) <= MAX_TEXT_CHARS
            for name, value in record.attributes.items()
        ):
            raise ValueError(f"no span: want at most {MAX_ATTRIBUTES} short attributes")
        return record


class Span(Protocol):
    """One that is under way."""

    def set(self, name: str, value: Value) -> None: ...

    def fail(self) -> None:
        """What it stands for went wrong. A block that raises does so by itself."""


class Tracer(Protocol):
    """Usable from several threads."""

    def span(
        self,
        name: str,
        attributes: Mapping[str, Value],
        parent: str | None,
        kind: Kind,
        start_ns: int | None,
    ) -> AbstractContextManager[Span]: ...

    def traceparent(self) -> str | None:
        """Of the span that this thread or task is in."""
        ...

    def pass_on(self, record: SpanRecord) -> None:
        """A span that another process has recorded."""


class _Nothing:
    def set(self, name: str, value: Value) -> None: ...

    def fail(self) -> None: ...


_NOTHING = _Nothing()
_tracer: Tracer | None = None


@contextmanager
def using(tracer: Tracer | None) -> Iterator[None]:
    """In this process, until the block ends."""
    global _tracer
    before, _tracer = _tracer, tracer
    try:
        yield
    finally:
        _tracer = before


def span(
    name: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    parent: str | None = None,
    kind: Kind = "internal",
    start_ns: int | None = None,
) -> AbstractContextManager[Span]:
    """What the block does. It is a part of the span around it or of `parent`, a traceparent: then
    the span around it is linked. It began at `start_ns` where that is given."""
    if _tracer is None:
        return nullcontext(_NOTHING)
    return _tracer.span(name, attributes or {}, parent, kind, start_ns)


def traceparent() -> str | None:
    """Of the span around; None without one, and where nobody asked for traces."""
    return _tracer.traceparent() if _tracer is not None else None


def pass_on(record: SpanRecord) -> None:
    if _tracer is not None:
        _tracer.pass_on(record)


class Recorder:
    """A tracer whose spans go to `sink` when they end, at most MAX_SPANS of them; it begins below
    `root`, of which nothing is recorded where that isn't sampled."""

    def __init__(self, root: Context, sink: Callable[[SpanRecord], None]) -> None:
        self._root = root
        self._sink = sink
        self._here: ContextVar[Context] = ContextVar("span", default=root)
        self._lock = threading.Lock()
        self._n_spans = 0

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, Value],
        parent: str | None,
        kind: Kind,  # noqa: ARG002 - what is recorded is internal
        start_ns: int | None,
    ) -> Iterator[Span]:
        above = Context.parse(parent) or self._here.get()
        here = Context(above.trace_id, secrets.token_hex(8), above.is_sampled)
        under_way = _Recorded(dict(attributes))
        start_ns = time.time_ns() if start_ns is None else start_ns
        token = self._here.set(here)
        try:
            yield under_way
        except BaseException:
            under_way.fail()
            raise
        finally:
            self._here.reset(token)
            if here.is_sampled:
                self.pass_on(
                    SpanRecord(
                        name, here.trace_id, here.span_id, above.span_id, start_ns, time.time_ns(),
                        under_way.attributes, under_way.failed,
                    )
                )  # fmt: skip

    def traceparent(self) -> str | None:
        return self._here.get().traceparent

    def pass_on(self, record: SpanRecord) -> None:
        with self._lock:
            self._n_spans += 1
            if self._n_spans <= MAX_SPANS:
                self._sink(record)


class _Recorded:
    def __init__(self, attributes: dict[str, Value]) -> None:
        self.attributes = attributes
        self.failed = False

    def set(self, name: str, value: Value) -> None:
        self.attributes[name] = value

    def fail(self) -> None:
        self.failed = True


@contextmanager
def recording(traceparent: str | None, sink: Callable[[SpanRecord], None]) -> Iterator[None]:
    """Record the block's spans as parts of `traceparent`, if it is one that is sampled."""
    root = Context.parse(traceparent)
    with using(Recorder(root, sink) if root is not None and root.is_sampled else None):
        yield
