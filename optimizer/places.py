"""The places of a study: what measures for it and what builds, as its options and spec have it.

In this process, in others of this machine, on an agent's or on a Ray cluster. It decides how many
trials can run at once and how long they wait for each other; what they do isn't its matter.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.errors import SpecInvalid
from optimizer.execution import Executor
from optimizer.execution.cluster import Cluster, Node
from optimizer.execution.inline import InlineExecutor
from optimizer.execution.processes import MAX_BUILD_S, ProcessExecutor, setup_of
from optimizer.execution.setup import Surroundings
from optimizer.execution.slots import Slots
from optimizer.measuring import Measurer
from optimizer.measuring.bearer import TokenInvalid, read_token
from optimizer.measuring.child import ChildMeasurer
from optimizer.measuring.cores import MAX_WAIT_S
from optimizer.measuring.local import LocalMeasurer
from optimizer.measuring.remote import RemoteMeasurer
from optimizer.spec import Spec
from optimizer.store import Store, StoreInvalid
from optimizer.store.location import Location, locate
from optimizer.telling import Tell
from optimizer.turns import Turns
from serve.machine import Machine, allowed_cpus, this_machine

if TYPE_CHECKING:
    from optimizer.execution.cluster.connection import Connection
    from optimizer.execution.cluster.terms import Terms


@dataclass(eq=False)
class Places:
    """`n_at_once` trials are asked for. `told` hears of steps, and `lost` of executors that are
    gone, in any thread. Without `isolate` all is done in this process."""

    spec: Spec
    store: Path | str
    artifacts: Path | None
    isolate: bool
    cluster: Cluster | None
    n_at_once: int
    turns: Turns
    told: Tell
    lost: Tell
    stops: list[Callable[[], None]] = field(default_factory=list)
    """What ends what is under way, from another thread."""
    _joined: "_Joined | None" = field(default=None, init=False)

    @property
    def n(self) -> int:
        """Trials that run at the same time: objects that are given in Python do so one by one."""
        if not self.isolate:
            return 1
        return self.n_at_once if self.cluster else min(self.n_at_once, len(allowed_cpus()))

    def serves_here(self, measured: Machine) -> bool:
        """Whether this machine, on which servers are load-tested, is the one that measures, or of
        its kind."""
        if self.spec.target.agent is not None:
            return False
        return self.cluster is None or this_machine() == measured

    @contextmanager
    def opened(self) -> Iterator[Measurer]:
        """What measures, on the target that the spec names: another machine by its agent, a node of
        the cluster, or this machine. Raises NoExecutor where the cluster can't be used."""
        with ExitStack() as stack:
            if self.cluster is not None:
                self._joined = stack.enter_context(self._joining(self.cluster))
            yield self._measurer(stack)

    def executor(self, shared: Surroundings, store: Store, measurer: Measurer) -> Executor:
        """What builds, while the places are open; `store` is for building in this process."""
        if not self.isolate:
            return InlineExecutor(shared, store, measurer, self.told)
        if self._joined is not None:
            return self._on_cluster(self._joined, measurer)
        setup = setup_of(
            self.spec.source, self.store, self.artifacts, measurer.machine, self._patience_s
        )
        n = self.n
        if n == 1:
            return ProcessExecutor(setup, measurer, self.told)
        threads = max(1, len(allowed_cpus()) // n)
        return self._as_one(
            [ProcessExecutor(setup, measurer, self.told, threads) for _ in range(n)]
        )

    @property
    def _patience_s(self) -> float:
        """Seconds to wait for the cores. Where trials run at once, a build of one can hold them for
        as long as builds may take."""
        return MAX_WAIT_S if self.n == 1 else MAX_BUILD_S

    def _measurer(self, stack: ExitStack) -> Measurer:
        agent = self.spec.target.agent
        if agent is not None:
            return RemoteMeasurer(agent, _token(self.spec))
        if self._joined is not None:
            from optimizer.execution.cluster.measurer import RayMeasurer

            joined = self._joined
            remote = RayMeasurer(
                joined.connection, joined.terms, joined.artifacts, self.told,
                max_wait_s=self._patience_s,
            )  # fmt: skip
            stack.callback(remote.close)
            self.stops.append(remote.stop)
            return remote
        if not self.isolate:
            return LocalMeasurer()
        child = stack.enter_context(ChildMeasurer(max_wait_s=self._patience_s))
        self.stops.append(child.stop)
        return child

    @contextmanager
    def _joining(self, cluster: Cluster) -> Iterator["_Joined"]:
        from optimizer.execution.cluster.connection import connected
        from optimizer.execution.cluster.terms import marked

        where = locate(self.store, self.artifacts)
        artifacts = where.artifacts.absolute()
        with connected(cluster) as connection:
            refuse_local_store(where, [one for one in connection.nodes() if one.can_build(cluster)])
            with marked(artifacts, self.spec.source, where.file is not None) as terms:
                store = str(self.store) if where.file is None else str(where.file)
                yield _Joined(connection, terms, store, artifacts)

    def _on_cluster(self, joined: "_Joined", measurer: Measurer) -> Executor:
        from optimizer.execution.cluster.executor import RayExecutor

        setup = setup_of(
            self.spec.source, joined.store, joined.artifacts, measurer.machine, self._patience_s
        )
        return self._as_one(
            [
                RayExecutor(joined.connection, setup, joined.terms, measurer, self.told)
                for _ in range(self.n)
            ]
        )

    def _as_one(self, executors: list[Executor]) -> Executor:
        slots = Slots(executors, self.turns, self.lost)
        self.stops.append(slots.stop)
        return slots


@dataclass(frozen=True, eq=False)
class _Joined:
    """A cluster that this process is connected to, with where its nodes find the store."""

    connection: "Connection"
    terms: "Terms"
    store: str
    artifacts: Path


def refuse_local_store(where: Location, builders: Sequence[Node]) -> None:
    """Raises StoreInvalid for a file that other machines would have to write to."""
    hosts = {one.host for one in builders}
    if where.file is not None and hosts - {socket.gethostname()}:
        raise StoreInvalid(
            where.shown,
            "an SQLite file can't be shared by machines, and the Ray cluster would build on "
            f"{', '.join(sorted(hosts))}: want postgresql://… and --artifacts",
        )


def _token(spec: Spec) -> str:
    try:
        return read_token(os.environ)
    except TokenInvalid as error:
        raise SpecInvalid(str(spec.source), [f"target.agent: {error}"]) from error
