"""The measurer on a Ray cluster: an actor that has a node of the target's kind alone.

It takes the node's whole share of a custom resource, all its CPUs and all its GPUs, so nothing is
built or measured beside it. One that is lost is followed by another on a node of the same kind. It
knows neither what is measured nor who builds.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimizer.errors import MeasurerUnavailable, OptimizerError
from optimizer.execution.cluster import Node
from optimizer.execution.cluster.actors import MeasureActor
from optimizer.execution.cluster.connection import (
    Actor,
    ActorLost,
    ClusterLost,
    Connection,
    TooLate,
)
from optimizer.execution.cluster.terms import Terms
from optimizer.measuring import Batch
from optimizer.measuring.calls import Call, Caller, Named, header_of
from optimizer.measuring.child import MAX_CALL_S
from optimizer.measuring.cores import MAX_WAIT_S
from optimizer.measuring.frames import Frame, FrameInvalid, decode, encode
from optimizer.telling import Tell, untold
from optimizer.timing import Contender
from optimizer.variant import directory_digest
from serve.machine import Machine

MAX_LOST = 3
"""Nodes that one call may lose, until it is taken to be what ends them."""
_START_S = 300.0
_CLOSE_S = 10.0
_MARGIN_S = 120.0
_POLL_S = 1.0
_LOOK_S = 5.0


class RayMeasurer(Caller):
    """Close it after use. `max_wait_s` is how long to wait for a node that another study has, of
    which `tell` hears, and on it for the cores; `artifacts` is the folder that all nodes share."""

    def __init__(
        self,
        connection: Connection,
        terms: Terms,
        artifacts: Path,
        tell: Tell = untold,
        *,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._connection = connection
        self._terms = terms
        self._artifacts = artifacts
        self._tell = tell
        self._max_wait_s = max_wait_s
        self._actor: Actor | None = None
        self._machine: Machine | None = None
        self._where = ""
        self._sent: dict[str, bytes] = {}
        """What lies in no shared folder, by digest: small, and sent again to another node."""
        self._taken: set[str] = set()
        self._stopped = threading.Event()

    @property
    def machine(self) -> Machine:
        """The node's. Raises MeasurerUnavailable."""
        self._started()
        assert self._machine is not None
        return self._machine

    def close(self) -> None:
        """Give the node back; a later call takes one again."""
        actor = self._actor
        if actor is not None and not self._stopped.is_set():
            with suppress(ActorLost, TooLate, OptimizerError):
                actor.call("close", b"", _CLOSE_S)
        self._drop()

    def stop(self) -> None:
        """For good, and from any thread: the call under way fails at once, and so do later ones."""
        self._stopped.set()
        actor = self._actor
        if actor is not None:
            actor.kill()

    def named(self, contender: Contender) -> Named:
        directory = contender.directory.absolute()
        if directory.is_relative_to(self._artifacts):
            return Named(str(directory), contender.spec)
        digest = directory_digest(directory)
        self._sent[digest] = _packed(digest, directory)
        return Named(digest, contender.spec)

    def exchange(self, call: Call, batches: Sequence[Batch]) -> Frame:
        sent = b"".join(encode(Frame(header_of(call), batches)))
        limit_s = MAX_CALL_S + call.seconds + self._max_wait_s + _MARGIN_S
        for _ in range(MAX_LOST):
            actor = self._started()
            try:
                self._have_taken(actor)
                answer = decode(actor.call("exchange", sent, limit_s))
            except ActorLost as error:
                lost = str(error)
                self._drop()
                continue
            except (ClusterLost, TooLate, FrameInvalid) as error:
                self._drop()
                raise self._unavailable(str(error)) from error
            if "unavailable" in answer.header:
                raise self._unavailable(str(answer.header["unavailable"]))
            return answer
        raise self._unavailable(f"{MAX_LOST} nodes were lost in one call, the last: {lost}")

    def _drop(self) -> None:
        actor, self._actor = self._actor, None
        self._taken.clear()
        if actor is not None:
            actor.kill()

    def _started(self) -> Actor:
        """The actor, on a node of the machine that measured before. Raises MeasurerUnavailable."""
        if self._actor is not None and not self._stopped.is_set():
            return self._actor
        share = self._share()
        actor = self._actor = self._connection.actor(MeasureActor, share)
        try:
            self._admit(actor)
        except ActorLost as error:
            self._drop()
            raise self._unavailable(f"lost before it measured: {error}") from error
        except TooLate:
            self._drop()
            raise self._unavailable(
                f"not free within {self._max_wait_s:g} s: another study has it, perhaps"
            ) from None
        except BaseException:
            self._drop()
            raise
        return actor

    def _admit(self, actor: Actor) -> None:
        """Once it has a node, and that is fit for it."""
        terms = json.dumps(self._terms.to_dict()).encode()
        raw = actor.call("ready", terms, self._max_wait_s, _Patience(self._look).check)
        document = json.loads(raw)
        self._where = str(document["host"])
        if document["problems"]:
            raise self._unavailable("; ".join(document["problems"]))
        machine = Machine.from_dict(document["machine"])
        if self._machine is not None and machine != self._machine:
            differs = "; ".join(self._machine.differences(machine)) or "it says more or less"
            raise self._unavailable(f"isn't of the kind that measured before: {differs}")
        self._machine = machine
        actor.call("start", json.dumps({"max_wait_s": self._max_wait_s}).encode(), _START_S)

    def _look(self) -> None:
        self._share()
        self._tell("waiting for a node that measures, which another study has perhaps")

    def _share(self) -> dict[str, float]:
        """Of a node that may measure, all that it has. Raises MeasurerUnavailable where none has
        come within the cluster's `max_pending_s`, or they differ."""
        cluster = self._connection.cluster
        until_s = time.monotonic() + cluster.max_pending_s
        while not (nodes := self._marked()):
            if self._stopped.wait(_POLL_S):
                raise self._unavailable("stopped")
            if time.monotonic() > until_s:
                raise self._unavailable(
                    f"no node has the resource {cluster.measure_resource}: start one by ray start "
                    f"--address=… --num-cpus=0 --resources='{{\"{cluster.measure_resource}\": 1}}';"
                    f" the cluster has {self._connection.described()}"
                )
        if self._stopped.is_set():
            raise self._unavailable("stopped")
        shares = {tuple(share_of(one, cluster.measure_resource).items()) for one in nodes}
        if len(shares) > 1:
            shown = "; ".join(sorted(map(str, nodes)))
            raise self._unavailable(
                f"nodes with the resource {cluster.measure_resource} differ ({shown}): want one "
                "resource for each kind of machine"
            )
        return dict(shares.pop())

    def _marked(self) -> list[Node]:
        name = self._connection.cluster.measure_resource
        return [one for one in self._connection.nodes() if one.resources.get(name, 0.0) >= 1]

    def _have_taken(self, actor: Actor) -> None:
        """What lies in no shared folder, and the node hasn't yet. Raises ActorLost, TooLate."""
        for digest in self._sent.keys() - self._taken:
            answer: dict[str, Any] = json.loads(actor.call("take", self._sent[digest], _START_S))
            if "refused" in answer:
                raise self._unavailable(str(answer["refused"]))
            self._taken.add(digest)

    def _unavailable(self, problem: str) -> MeasurerUnavailable:
        where = f", node {self._where}" if self._where else ""
        address = self._connection.cluster.address
        return MeasurerUnavailable(f"Ray cluster {address}{where}", problem)


class _Patience:
    """Looks every now and then whether there still is a node to wait for."""

    def __init__(self, look: Callable[[], object]) -> None:
        self._look = look
        self._next_s = time.monotonic() + _LOOK_S

    def check(self) -> None:
        if time.monotonic() >= self._next_s:
            self._look()
            self._next_s = time.monotonic() + _LOOK_S


def share_of(node: Node, resource: str) -> dict[str, float]:
    """What an actor asks for to have the node alone."""
    return {name: node.resources.get(name, 0.0) for name in ("CPU", "GPU", resource)}


def _packed(digest: str, directory: Path) -> bytes:
    """As `MeasureActor.take` reads it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    line = json.dumps({"digest": digest, "sizes": sizes}).encode()
    return line + b"\n" + b"".join(path.read_bytes() for path in files)
