"""The connection to a Ray cluster, and actors on it: the one module that calls Ray.

Arguments and answers are bytes, which Ray passes on as they are; with a code search path, even an
empty folder, it imports an actor's class by its name on the node and exports nothing. So no pickle
is made of anything here. Every wait ends. What an actor is for isn't its matter.
"""

import importlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optimizer.errors import OptimizerError
from optimizer.execution import NoExecutor
from optimizer.execution.cluster import Cluster, Node

EXTRA = "pip install 'trimserve[distributed]'"
_ROOT = Path(__file__).resolve().parents[3]
_EVERY_S = 1.0
_CONNECT_S = 20.0
_LOOK_S = 5.0
_HEAD_LOST_S = 20.0
_MAX_MESSAGE_CHARS = 300


class ActorLost(Exception):
    """The actor, its node or the way there is gone; it is killed, if it wasn't yet."""


class TooLate(Exception):
    """No answer within the time that was allowed."""


class ClusterLost(NoExecutor):
    """The head is gone, and with it the cluster."""


class Connection:
    """Used from any thread."""

    def __init__(self, ray: Any, cluster: Cluster) -> None:
        self._ray = ray
        self.cluster = cluster
        self._is_lost = threading.Event()
        self._lock = threading.Lock()
        self._seen_s = self._looked_s = time.monotonic()

    @property
    def is_lost(self) -> bool:
        return self._is_lost.is_set()

    def check(self) -> None:
        """Look for the head, every few seconds. Raises ClusterLost once it hasn't answered for
        long: Ray itself would end the process then, with an exit code that means something."""
        with self._lock:
            now_s = time.monotonic()
            if not self.is_lost and now_s - self._looked_s >= _LOOK_S:
                if _answers(self.cluster):
                    self._seen_s = time.monotonic()
                elif now_s - self._seen_s > _HEAD_LOST_S:
                    self._is_lost.set()
                self._looked_s = time.monotonic()
        if self.is_lost:
            raise ClusterLost(f"Ray cluster {self.cluster.address}: the head is gone")

    def nodes(self) -> list[Node]:
        """Those that are alive. Raises ClusterLost."""
        self.check()
        return [
            Node(
                str(one["NodeID"]),
                str(one["NodeManagerHostname"]),
                str(one["NodeManagerAddress"]),
                {str(name): float(n) for name, n in one["Resources"].items()},
            )
            for one in self._ray.nodes()
            if one["Alive"]
        ]

    def described(self) -> str:
        """The nodes with what they have, for messages."""
        return "; ".join(sorted(map(str, self.nodes()))) or "no nodes"

    def actor(self, kind: type, share: Mapping[str, float]) -> "Actor":
        """One of that class, as soon as a node has so much of its resources free for it: nothing
        is waited for. Two of its calls may run at the same time."""
        custom = {name: n for name, n in share.items() if name not in ("CPU", "GPU")}
        options = {
            "num_cpus": share.get("CPU", 0),
            "num_gpus": share.get("GPU", 0),
            "resources": custom,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,
        }
        self.check()
        made = self._ray.remote(kind).options(**options).remote()
        return Actor(self._ray, made, self)


class Actor:
    def __init__(self, ray: Any, handle: Any, connection: Connection) -> None:
        self._ray = ray
        self._handle = handle
        self._connection = connection
        self._killed = threading.Event()

    def call(
        self,
        method: str,
        argument: bytes,
        timeout_s: float,
        meanwhile: Callable[[], object] = bool,
    ) -> bytes:
        """What the method answers; `meanwhile` is called once in a second until it does.

        Raises ActorLost, ClusterLost, and TooLate after `timeout_s`, with which nothing is ended.
        An exception of the method's own is an OptimizerError: actors answer with theirs.
        """
        errors = self._ray.exceptions
        until_s = time.monotonic() + timeout_s
        try:
            reference = getattr(self._handle, method).remote(argument)
            while True:
                left_s = until_s - time.monotonic()
                done, _ = self._ray.wait([reference], timeout=max(0.0, min(_EVERY_S, left_s)))
                if done:
                    return bytes(self._ray.get(reference, timeout=timeout_s))
                if left_s <= _EVERY_S:
                    raise TooLate(f"no answer within {timeout_s:g} s")
                self._connection.check()
                meanwhile()
        except errors.RayTaskError as error:
            raise OptimizerError(f"on a node of the Ray cluster: {_last_line(error)}") from error
        except errors.ActorUnavailableError as error:
            self.kill()
            raise ActorLost("it can't be reached any more") from error
        except errors.RayError as error:
            self.kill()
            raise ActorLost(_first_line(error)) from error

    def kill(self) -> None:
        """From any thread; calls under way fail as lost."""
        if not self._killed.is_set() and not self._connection.is_lost:
            self._killed.set()
            with suppress(Exception):  # it is gone already, or the whole cluster is
                self._ray.kill(self._handle, no_restart=True)


@contextmanager
def connected(cluster: Cluster) -> Iterator[Connection]:
    """Be a driver of the cluster, which is there already. Raises NoExecutor where Ray isn't
    installed, or the cluster can't be reached from here."""
    # Else it tries for a quarter of an hour, and ends the process before `Connection.check` can.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
    ray = _imported()
    if ray.is_initialized():
        raise NoExecutor("Ray cluster: this process is connected to one already")
    # Else a call after the end would start a cluster here.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    with _own_sigterm():
        try:
            socket.create_connection(cluster.host_and_port, _CONNECT_S).close()
            ray.init(
                address=cluster.address,
                log_to_driver=False,
                configure_logging=False,
                job_config=ray.job_config.JobConfig(code_search_path=[str(_ROOT)]),
            )
        except Exception as error:
            ray.shutdown()
            raise NoExecutor(
                f"Ray cluster {cluster.address}: can't be reached: {_first_line(error)}; want one "
                "that this machine is a node of (ray start --address=HOST:PORT --num-cpus=0)"
            ) from error
    connection = Connection(ray, cluster)
    try:
        yield connection
    finally:
        ray.shutdown()


def _answers(cluster: Cluster) -> bool:
    try:
        socket.create_connection(cluster.host_and_port, _LOOK_S).close()
    except OSError:
        return False
    return True


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise NoExecutor(f"Ray can't be imported ({error}): {EXTRA}") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would end the process past whoever has to end things."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_MAX_MESSAGE_CHARS]


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:_MAX_MESSAGE_CHARS]
