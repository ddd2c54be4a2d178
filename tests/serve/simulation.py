"""Batching in simulated time: a queue, instances that take what the service times say, no thread.

`Fifo` is the reference that the policy must beat: oldest first, up to the batch size, nothing
dropped.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serve.batch_policy import BatchQueue, Decision, Entry, Limits, ServiceTimes


class Queue(Protocol):
    """What the simulation needs of a queue; `BatchQueue` has it."""

    n_requests: int

    def offer(self, entry: Entry[int], now: float) -> tuple[bool, tuple[Entry[int], ...]]: ...

    def decide(self, now: float) -> Decision[int]: ...


class Fifo:
    """The plain queue: the oldest requests first, as many rows as fit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: deque[Entry[int]] = deque()

    @property
    def n_requests(self) -> int:
        return len(self._entries)

    def offer(self, entry: Entry[int], now: float) -> tuple[bool, tuple[Entry[int], ...]]:
        if len(self._entries) >= self._limits.max_queue_size:
            return False, ()
        self._entries.append(entry)
        return True, ()

    def decide(self, now: float) -> Decision[int]:
        batch: list[Entry[int]] = []
        rows = 0
        while self._entries and rows + self._entries[0].n_rows <= self._limits.max_batch_size:
            batch.append(self._entries.popleft())
            rows += batch[-1].n_rows
        return Decision(tuple(batch), reason="drained" if batch else "")


@dataclass
class Outcome:
    """How every request ended, by its number, and the batches in the order of their start."""

    finished_s: dict[int, float] = field(default_factory=dict)
    expired: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    batches: list[tuple[float, tuple[Entry[int], ...]]] = field(default_factory=list)
    decisions: list[tuple[float, Decision[int]]] = field(default_factory=list)
    longest_queue: int = 0

    def ends(self) -> list[int]:
        return sorted([*self.finished_s, *self.expired, *self.evicted, *self.rejected])

    def n_in_time(self, entries: Sequence[Entry[int]]) -> int:
        return sum(self.finished_s.get(e.item, math.inf) <= e.target_s for e in entries)


def simulate(
    entries: Sequence[Entry[int]], queue: Queue, times: ServiceTimes, n_instances: int = 1
) -> Outcome:
    """Play `entries`, sorted by their arrival, through `queue`."""
    outcome = Outcome()
    waiting = deque(entries)
    busy: list[float] = []  # when each busy instance is done
    wake_at_s = math.inf
    while waiting or busy or queue.n_requests:
        arrival_s = waiting[0].arrival_s if waiting else math.inf
        now = min(arrival_s, busy[0] if busy else math.inf, wake_at_s)
        assert math.isfinite(now), "nothing will ever happen to the queue again"
        wake_at_s = math.inf
        while busy and busy[0] <= now:
            heapq.heappop(busy)
        while waiting and waiting[0].arrival_s <= now:
            entry = waiting.popleft()
            admitted, evicted = queue.offer(entry, now)
            outcome.evicted += [other.item for other in evicted]
            if not admitted:
                outcome.rejected.append(entry.item)
            outcome.longest_queue = max(outcome.longest_queue, queue.n_requests)
        while len(busy) < n_instances:
            decision = queue.decide(now)
            outcome.decisions.append((now, decision))
            outcome.expired += [entry.item for entry in decision.expired]
            if not decision.batch:
                wake_at_s = decision.wake_at_s
                break
            finish = now + times.of(sum(entry.n_rows for entry in decision.batch))
            heapq.heappush(busy, finish)
            outcome.batches.append((now, decision.batch))
            for entry in decision.batch:
                outcome.finished_s[entry.item] = finish
    return outcome


def policy(limits: Limits, times: ServiceTimes) -> BatchQueue[int]:
    return BatchQueue(limits, times)
