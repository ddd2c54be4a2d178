"""Calls: the measurer's methods as frames, so that a pipe or a connection can carry them.

`Caller` is the half that asks; `optimizer.measuring.worker` answers. It doesn't know how a frame
gets there.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import pydantic

from optimizer.measuring import Batch, ContenderFailed
from optimizer.measuring.frames import Frame, FrameInvalid
from optimizer.timing import Contender, Effort, Timing
from serve.engines import EngineSpec, KernelTime

PROTOCOL_VERSION = 1
"""Of frames and calls together."""
CHUNK_BYTES = 16 * 1024 * 1024
"""Of inputs that go in one frame, but for a batch that is larger alone."""
MAX_SECONDS = 3600.0

Name = Literal["outputs", "kernels", "time", "memory_bytes", "joules"]
EXCLUSIVE: frozenset[Name] = frozenset({"kernels", "time", "joules"})
"""Calls that need the cores alone."""
_Count = Annotated[int, pydantic.Field(ge=0, le=1_000_000)]
_Seconds = Annotated[float, pydantic.Field(ge=0, le=MAX_SECONDS)]


@dataclass(frozen=True)
class Named:
    """A contender as the other side knows it: `files` is a folder there, or their digest."""

    files: str
    spec: EngineSpec


@dataclass(frozen=True)
class Call:
    """One call but for its tensors. What a call doesn't need keeps its default.

    Calls `outputs` of one session share a loaded engine, until `is_last`.
    """

    name: Name
    contenders: Annotated[tuple[Named, ...], pydantic.Field(min_length=1, max_length=2)]
    session: Annotated[str, pydantic.Field(max_length=64)] = ""
    is_last: bool = True
    n_runs: _Count = 1
    batch_sizes: Annotated[tuple[_Count, ...], pydantic.Field(max_length=256)] = ()
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    seconds: _Seconds = 0.0

    @property
    def n_cores(self) -> int:
        return max(named.spec.instances * named.spec.threads for named in self.contenders)


for _kind in (Call, Named):
    setattr(_kind, "__pydantic_config__", pydantic.ConfigDict(extra="forbid"))  # noqa: B010
_CALLS = pydantic.TypeAdapter(Call)
_KERNELS = pydantic.TypeAdapter(tuple[KernelTime, ...])


def call_of(header: Mapping[str, Any]) -> Call:
    """The call in a frame's header. Raises FrameInvalid."""
    try:
        return _CALLS.validate_python(header.get("call"))
    except pydantic.ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(["call", *map(str, detail["loc"])])
        raise FrameInvalid(f"{key}: {detail['msg']}") from error


def header_of(call: Call) -> dict[str, object]:
    return {"call": asdict(call)}


class Caller(ABC):
    """A measurer somewhere else: all of it but the machine's fingerprint and the way there."""

    @abstractmethod
    def exchange(self, call: Call, batches: Sequence[Batch]) -> Frame:
        """Have the call done and give the answer, a failure included."""

    @abstractmethod
    def named(self, contender: Contender) -> Named:
        """The contender as the other side knows it, once it has its files."""

    def outputs(self, contender: Contender, batches: Iterable[Batch]) -> Iterator[Batch]:
        named, session = self.named(contender), uuid.uuid4().hex
        for chunk, is_last in _chunks(batches):
            call = Call("outputs", (named,), session=session, is_last=is_last)
            answer = self._ask(call, chunk)
            if len(answer.batches) != len(chunk):
                raise ContenderFailed(f"{len(answer.batches)} outputs for {len(chunk)} batches")
            yield from answer.batches

    def kernels(self, contender: Contender, batch: Batch, n_runs: int) -> Sequence[KernelTime]:
        call = Call("kernels", (self.named(contender),), n_runs=n_runs)
        return _KERNELS.validate_python(self._result(call, batch))

    def time(
        self,
        variant: Contender,
        baseline: Contender | None,
        inputs: Batch,
        batch_sizes: Sequence[int],
        *,
        effort: Effort,
        seed: int,
    ) -> Timing:
        contenders = [variant] if baseline is None else [variant, baseline]
        call = Call(
            "time",
            tuple(map(self.named, contenders)),
            batch_sizes=tuple(batch_sizes),
            effort=effort,
            seed=seed,
        )
        return Timing.from_dict(self._result(call, inputs))

    def memory_bytes(self, contender: Contender, batch: Batch) -> int:
        return int(self._result(Call("memory_bytes", (self.named(contender),)), batch))

    def joules(self, contender: Contender, batch: Batch, seconds: float) -> float | None:
        call = Call("joules", (self.named(contender),), seconds=seconds)
        found = self._result(call, batch)
        return None if found is None else float(found)

    def _result(self, call: Call, batch: Batch) -> Any:
        return self._ask(call, [batch]).header["result"]

    def _ask(self, call: Call, batches: Sequence[Batch]) -> Frame:
        answer = self.exchange(call, batches)
        if "failure" in answer.header:
            raise ContenderFailed(str(answer.header["failure"]))
        return answer


def _chunks(batches: Iterable[Batch]) -> Iterator[tuple[list[Batch], bool]]:
    """The batches in lists that fit a frame each, and whether it is the last; none where there are
    none."""
    chunk: list[Batch] = []
    size = 0
    for batch in batches:
        added = sum(array.nbytes for array in batch.values())
        if chunk and size + added > CHUNK_BYTES:
            yield chunk, False
            chunk, size = [], 0
        chunk.append(batch)
        size += added
    if chunk:
        yield chunk, True
