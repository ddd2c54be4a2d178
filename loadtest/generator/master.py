"""The master: shares a plan among workers, lets them begin together, and merges what they measured.

Sends no request itself. Locust's runner knows who is connected and alive, and shows their
statistics; what is judged are the workers' raw samples.
"""

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from locust.env import Environment  # isort: skip

import gevent
from gevent.event import Event

from loadtest.generator import messages
from loadtest.generator.finish import Finish
from loadtest.generator.parent import (
    Abandoned,
    await_word,
    tell,
    tell_finished,
    tell_progress,
)
from loadtest.generator.run import EXIT_DEFECT, EXIT_INTERRUPTED, PROGRESS_EVERY_S, longest_s
from loadtest.generator.worker import START_S
from loadtest.parts import merge, split
from loadtest.plan import Plan

WAIT_S = 600.0
"""How long all workers may take to come."""
LOOK_EVERY_S = 0.02
MISSING = "missing"
HEARD = (
    messages.HELLO,
    messages.READY,
    messages.WARM,
    messages.PROGRESS,
    messages.FINISHED,
    messages.DEFECT,
)


class WorkersFailed(Exception):
    """Workers didn't come, were lost, or had a defect; `str()` says which."""


class Master:
    """`n` workers that play one plan; `over` is set when it has ended, and `exit_code` says how."""

    def __init__(self, environment: Environment, runner: Any, plan: Plan, n: int) -> None:
        self._environment = environment
        self._runner = runner
        self._plan = plan
        self._n = n
        self._heard: dict[str, dict[str, Any]] = {kind: {} for kind in HEARD}
        self._chosen: tuple[str, ...] = ()
        self.over = Event()
        self.exit_code = EXIT_INTERRUPTED
        for kind in HEARD:
            runner.register_message(kind, self._hear)
        stopping: Any = environment.events.test_stopping
        stopping.add_listener(self._hear_stop)

    def guarded(self, folder: Path) -> None:
        """Conduct, and keep the exit code."""
        try:
            tell("listening", port=self._runner.server.port)
            self.conduct(folder)
            self.exit_code = 0
        except Abandoned:
            self.exit_code = EXIT_INTERRUPTED
        except WorkersFailed as error:
            tell("failed", message=str(error))
            self.exit_code = EXIT_DEFECT
        except Exception:  # noqa: BLE001 - the process boundary
            traceback.print_exc()
            self.exit_code = EXIT_DEFECT
        finally:
            self.over.set()

    def conduct(self, folder: Path) -> None:
        """Raises WorkersFailed, or Abandoned where the parent is gone."""
        self._gather()
        for client, part in zip(self._chosen, split(self._plan, self._n), strict=True):
            self._runner.send_message(messages.PLAN, messages.plan_message(part, folder), client)
        self._await(messages.READY, START_S)
        self._runner.start(user_count=self._n, spawn_rate=self._n)
        longest = longest_s(self._plan)
        warmed = self._await(messages.WARM, longest)
        tell("warm", **{name: sum(one[name] for one in warmed) for name in ("n_sent", "n_bad")})
        await_word()
        self._heard[messages.PROGRESS].clear()
        self._environment.stats.reset_all()
        go = messages.go_message()
        for client in self._chosen:
            self._runner.send_message(messages.GO, go, client)
        tell("started", start_s=go["start_s"])
        reporter = gevent.spawn(self._report_progress)
        found = self._await(messages.FINISHED, longest)
        reporter.kill()
        tell_finished(together([messages.finish_of(one, folder) for one in found]), folder)

    def _gather(self) -> None:
        """Wait for so many workers; those that come later have nothing to do."""
        hellos = self._heard[messages.HELLO]
        n_told = -1
        with gevent.Timeout(WAIT_S, WorkersFailed(f"not all workers came within {WAIT_S:g} s")):
            while len(hellos) < self._n:
                if len(hellos) != n_told:
                    n_told = len(hellos)
                    tell("workers", n=n_told, n_wanted=self._n)
                gevent.sleep(LOOK_EVERY_S)
        self._chosen = tuple(hellos)[: self._n]
        tell("workers", n=self._n, n_wanted=self._n)

    def _await(self, kind: str, limit_s: float) -> list[Any]:
        """What each worker says of that kind, in their order."""
        late = WorkersFailed(f"not all workers said {kind} within {limit_s:g} s")
        with gevent.Timeout(limit_s, late):
            while not all(client in self._heard[kind] for client in self._chosen):
                self._check(kind)
                gevent.sleep(LOOK_EVERY_S)
        return [self._heard[kind][client] for client in self._chosen]

    def _check(self, awaited: str) -> None:
        for client, message in self._heard[messages.DEFECT].items():
            raise WorkersFailed(f"worker {client}: {message['trace']}")
        for client in self._chosen:
            node = self._runner.clients.get(client)
            gone = node is None or node.state == MISSING
            if gone and client not in self._heard[awaited]:
                raise WorkersFailed(f"worker {client} was lost")

    def _report_progress(self) -> None:
        while True:
            said = self._heard[messages.PROGRESS].values()
            try:
                tell_progress(sum_of(said, "n_done"), sum_of(said, "n_bad"))
            except Abandoned:
                self.over.set()
                return
            gevent.sleep(PROGRESS_EVERY_S)

    def _hear(self, msg: Any, **_: object) -> None:
        self._heard[msg.type][msg.node_id] = msg.data

    def _hear_stop(self, **_: object) -> None:
        """Somebody pressed stop in the web interface."""
        self.over.set()


def together(parts: list[Finish]) -> Finish:
    """Of all processes: the busiest one's share, and all cores."""
    errors = {status: text for part in reversed(parts) for status, text in part.errors.items()}
    return Finish(
        merge([part.samples for part in parts]),
        errors,
        max(part.cpu_share for part in parts),
        sum(part.process_cores for part in parts),
    )


def sum_of(said: Iterable[Any], name: str) -> int:
    return sum(int(one[name]) for one in said)
