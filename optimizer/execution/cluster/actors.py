"""The actors: what runs on a cluster's nodes for one study, asked by bytes and answering in bytes.

Ray imports these classes by name on the node, and runs each in a process of its own, which does
nothing but pass on: building and measuring are done by the processes that do it on one machine.
An actor is never restarted by Ray, so it knows all that it was told or is gone.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimizer.errors import MeasurerUnavailable
from optimizer.execution.calls import error_to
from optimizer.execution.cluster.terms import Terms, host
from optimizer.execution.processes import ProcessExecutor
from optimizer.measuring import Batch, ContenderFailed
from optimizer.measuring.artifact_cache import DIGEST, ArtifactCache
from optimizer.measuring.calls import Call, Named, call_of
from optimizer.measuring.child import ChildMeasurer
from optimizer.measuring.frames import Frame, decode, encode
from serve.errors import ArtifactInvalid
from serve.machine import this_machine

_MAX_SENT_BYTES = 64 << 20


class BuildActor:
    """Builds on its node. Its calls are made one by one, but for `told`, which may come between."""

    def __init__(self) -> None:
        self._executor: ProcessExecutor | None = None
        self._told = ""

    def ready(self, terms: bytes) -> bytes:
        """Where it is, and what speaks against building there."""
        return _dumped({"host": host(), "problems": Terms.from_dict(json.loads(terms)).problems()})

    def start(self, given: bytes) -> bytes:
        """Be ready to build for the setup, with so many threads."""
        order = json.loads(given)
        self._executor = ProcessExecutor(
            order["setup"], ChildMeasurer(), tell=self._tell, threads=order["threads"]
        )
        try:
            self._executor.start()
        except Exception as error:  # noqa: BLE001 - the process boundary: told to whoever asked
            return _dumped({"error": error_to(error)})
        return _dumped({"answer": "ready"})

    def build(self, request: bytes) -> bytes:
        """Do a call of `optimizer.execution.calls`; the answer, or the error."""
        assert self._executor is not None, "it was started"
        asked = json.loads(request)
        try:
            return _dumped({"answer": self._executor.build(asked["call"], asked["arguments"])})
        except Exception as error:  # noqa: BLE001 - as above
            return _dumped({"error": error_to(error)})
        finally:
            self._told = ""

    def told(self, _: bytes) -> bytes:
        """How far the call under way is, in words; empty for nothing new."""
        told, self._told = self._told, ""
        return told.encode()

    def _tell(self, message: str) -> None:
        self._told = message


class MeasureActor:
    """Measures on its node, which it has alone."""

    def __init__(self) -> None:
        self._measurer: ChildMeasurer | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="trimserve-measured-")
        self._cache = ArtifactCache(Path(self._folder.name), _MAX_SENT_BYTES, _MAX_SENT_BYTES)

    def ready(self, terms: bytes) -> bytes:
        """Where it is, the machine, and what speaks against measuring there."""
        problems = Terms.from_dict(json.loads(terms)).problems() + _niceness()
        machine = this_machine().to_dict()
        return _dumped({"host": host(), "machine": machine, "problems": problems})

    def start(self, given: bytes) -> bytes:
        self._measurer = ChildMeasurer(max_wait_s=json.loads(given)["max_wait_s"])
        return _dumped({"answer": "ready"})

    def take(self, sent: bytes) -> bytes:
        """Files that lie in no shared folder: a line of JSON, digest and sizes, then the contents
        one behind the other."""
        line, _, contents = sent.partition(b"\n")
        told = json.loads(line)
        rest = memoryview(contents)

        def read(n: int) -> bytes:
            nonlocal rest
            piece, rest = bytes(rest[:n]), rest[n:]
            return piece

        try:
            if self._cache.find(told["digest"]) is None:
                self._cache.add(told["digest"], told["sizes"], read)
        except ArtifactInvalid as error:
            return _dumped({"refused": str(error)})
        return _dumped({"answer": "taken"})

    def close(self, _: bytes) -> bytes:
        """End the process that measures, and leave nothing on the node."""
        if self._measurer is not None:
            self._measurer.close()
        self._folder.cleanup()
        return _dumped({"answer": "closed"})

    def exchange(self, sent: bytes) -> bytes:
        """A call as a frame, answered by a frame: a failure of the engine in `failure`, cores that
        can't be had in `unavailable`."""
        frame = decode(sent)
        try:
            answer = self._exchanged(call_of(frame.header), frame.batches)
        except ContenderFailed as error:
            answer = Frame({"failure": str(error)})
        except MeasurerUnavailable as error:
            answer = Frame({"unavailable": str(error)})
        return b"".join(encode(answer))

    def _exchanged(self, call: Call, batches: Sequence[Batch]) -> Frame:
        assert self._measurer is not None, "it was started"
        contenders = tuple(map(self._found, call.contenders))
        return self._measurer.exchange(replace(call, contenders=contenders), batches)

    def _found(self, named: Named) -> Named:
        """With the folder here in place of a digest."""
        if not DIGEST.fullmatch(named.files):
            return named
        directory = self._cache.find(named.files)
        if directory is None:
            raise ContenderFailed(f"no files of the digest {named.files}")
        return Named(str(directory), named.spec)


def _niceness() -> list[str]:
    """What speaks against measuring in a process that Ray made give way to others: it does so with
    all of a node's processes, and its own agents there would go before what is timed."""
    own, parents = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (0, os.getppid()))
    if own <= parents:
        return []
    return [
        f"what measures would be {own - parents} nicer than its node; want RAY_worker_niceness=0 "
        "in the environment of its ray start"
    ]


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode()
