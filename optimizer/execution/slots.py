"""Slots: several executors as one, for trials that run at once.

Each call goes to one that is free. Recipes that begin with the same steps share them: a step is
built once, and whoever needs it meanwhile waits. A call whose executor is lost is made again by
another.
"""

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from optimizer.errors import ParityMismatch, TechniqueFailed, TechniqueNotApplicable
from optimizer.execution import Executor, ExecutorLost, Json, NoExecutor
from optimizer.measuring import Measurer
from optimizer.telling import Tell, untold
from optimizer.turns import Turns
from optimizer.variant import canonical_json

MAX_LOST = 3
"""Executors that one call may lose, until it is taken to be what ends them."""


class Slots:
    """Used from the threads that take `turns`, which are lent while a call is under way. `tell`
    hears of executors that are lost, in any of the threads."""

    def __init__(self, executors: Sequence[Executor], turns: Turns, tell: Tell = untold) -> None:
        self._executors = list(executors)
        self._turns = turns
        self._tell = tell
        self._free: queue.LifoQueue[Executor | None] = queue.LifoQueue()
        for executor in reversed(self._executors):
            self._free.put(executor)
        self._steps: dict[str, threading.Lock] = {}
        self._made: set[str] = set()
        self._failed: dict[str, Exception] = {}
        self._is_stopped = threading.Event()

    @property
    def measurer(self) -> Measurer:
        return self._executors[0].measurer

    def start(self) -> None:
        """Be ready in the first of them; the others start when they are needed. Raises
        SpecInvalid."""
        self._executors[0].start()

    def build(self, call: str, arguments: Json) -> Json:
        """As `Executor.build`. Raises NoExecutor where none is left."""
        with self._turns.lent():
            if call != "build":
                return self._done(call, arguments)
            recipe: Sequence[Json] = arguments["recipe"]
            for n_steps in range(1, len(recipe)):
                self._shared(recipe[:n_steps])
            return self._built(recipe)

    def stop(self) -> None:
        """From any thread: the calls under way fail soon, and so do later ones."""
        self._is_stopped.set()
        self.close()

    def close(self) -> None:
        for executor in self._executors:
            executor.close()

    def _shared(self, steps: Sequence[Json]) -> None:
        """Have the last of the steps built, by the first that asks."""
        name = canonical_json({"steps": steps})
        with self._steps.setdefault(name, threading.Lock()):
            if name in self._failed:
                raise self._failed[name]
            if name in self._made:
                return
            try:
                self._built(steps)
            except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
                self._failed[name] = error
                raise
            self._made.add(name)

    def _built(self, steps: Sequence[Json]) -> Json:
        return self._done("build", {"recipe": steps})

    def _done(self, call: str, arguments: Mapping[str, Any]) -> Json:
        for _ in range(MAX_LOST):
            try:
                return self._done_once(call, arguments)
            except ExecutorLost as error:
                lost = error
                self._tell(str(error))
        blamed = str(arguments.get("technique") or arguments["recipe"][-1][0])
        raise TechniqueFailed(blamed, f"{MAX_LOST} that built it were lost, the last: {lost}")

    def _done_once(self, call: str, arguments: Json) -> Json:
        """By one that is free and can be had; those that can't, while others can, are given up."""
        while True:
            executor = self._free.get()
            if executor is None or self._is_stopped.is_set():
                self._free.put(executor)
                raise NoExecutor("none is left" if executor is None else "stopped")
            try:
                answer = executor.build(call, arguments)
            except NoExecutor as error:
                self._executors.remove(executor)
                executor.close()
                self._tell(str(error))
                if self._executors:
                    continue
                self._free.put(None)  # for all that wait
                raise
            except BaseException:
                self._free.put(executor)
                raise
            self._free.put(executor)
            return answer
