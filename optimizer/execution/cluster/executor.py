"""The executor on a Ray cluster: a builder on whichever node has room for it.

One that is lost, with its node or without, raises ExecutorLost, and the next call starts another
elsewhere. It doesn't know what is built.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimizer.errors import TechniqueFailed
from optimizer.execution import ExecutorLost, Json, NoExecutor
from optimizer.execution.calls import error_from
from optimizer.execution.cluster.actors import BuildActor
from optimizer.execution.cluster.connection import Actor, ActorLost, Connection, TooLate
from optimizer.execution.cluster.terms import Terms
from optimizer.execution.processes import MAX_BUILD_S
from optimizer.measuring import Measurer
from optimizer.telling import Tell, untold

_TOLD_S = 30.0
_MARGIN_S = 120.0
"""Beyond what the node's own limit for a build ends."""


@dataclass(eq=False)
class RayExecutor:
    """`setup` is what a worker is told first (`optimizer.execution.processes.setup_of`), with paths
    that hold on every node."""

    connection: Connection
    setup: Mapping[str, Json]
    terms: Terms
    measurer: Measurer
    tell: Tell = untold
    max_build_s: float = MAX_BUILD_S
    _actor: Actor | None = field(default=None, init=False)
    _where: str = field(default="", init=False)

    def start(self) -> None:
        """Have a builder, and wait until it can build. Raises SpecInvalid where model or data can't
        be used, NoExecutor where no node has room or is fit, ExecutorLost."""
        if self._actor is not None:
            return
        cluster = self.connection.cluster
        actor = self._actor = self.connection.actor(BuildActor, {"CPU": cluster.build_cpus})
        try:
            self._admit(actor)
            order = {"setup": self.setup, "threads": cluster.build_cpus}
            self._asked(actor, "start", order, "the model")
        except BaseException:
            self.close()
            raise

    def build(self, call: str, arguments: Json) -> Json:
        blamed = str(arguments.get("technique") or _last(arguments["recipe"]))
        self.start()
        actor = self._actor
        if actor is None:
            raise ExecutorLost("a builder was closed while it started")
        return self._asked(actor, "build", {"call": call, "arguments": arguments}, blamed)

    def close(self) -> None:
        """From any thread; a call under way raises ExecutorLost."""
        actor, self._actor = self._actor, None
        if actor is not None:
            actor.kill()

    def _admit(self, actor: Actor) -> None:
        """Once it is on a node that is fit for it."""
        cluster = self.connection.cluster
        terms = json.dumps(self.terms.to_dict()).encode()
        try:
            document = json.loads(actor.call("ready", terms, cluster.max_pending_s))
        except TooLate:
            raise NoExecutor(
                f"no node had room for a builder of {cluster.build_cpus} CPUs within "
                f"{cluster.max_pending_s:g} s: the cluster has {self.connection.described()}"
            ) from None
        except ActorLost as error:
            raise ExecutorLost(f"a builder was lost while it started: {error}") from error
        self._where = str(document["host"])
        if document["problems"]:
            raise NoExecutor(f"node {self._where}: {'; '.join(document['problems'])}")

    def _asked(self, actor: Actor, method: str, request: Any, blamed: str) -> Json:
        limit_s = self.max_build_s + _MARGIN_S
        try:
            raw = actor.call(
                method, json.dumps(request).encode(), limit_s, lambda: self._pass_on(actor)
            )
        except ActorLost as error:
            self.close()
            raise ExecutorLost(f"the builder on {self._where} was lost: {error}") from error
        except TooLate as error:
            self.close()
            raise TechniqueFailed(blamed, f"on {self._where}: {error}") from error
        except BaseException:
            self.close()
            raise
        document = json.loads(raw)
        if "error" in document:
            raise error_from(document["error"])
        return document["answer"]

    def _pass_on(self, actor: Actor) -> None:
        """Tell how far it is. Where it doesn't say, the call itself will tell why."""
        try:
            told = actor.call("told", b"", _TOLD_S)
        except TooLate:
            return
        if told:
            self.tell(told.decode())


def _last(recipe: list[list[Json]]) -> str:
    return str(recipe[-1][0]) if recipe else "the model"
