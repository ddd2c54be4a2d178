"""Batching decisions: which queued requests run together now, and which wait.

Deterministic in what it is given: no clock, thread or socket. The server's batcher calls it with
the monotonic clock, the optimizer's capacity simulation with simulated time, so that what is
simulated is what is served.

A request has up to two instants. Its *target* is when the SLO wants it answered: it orders the
queue (earliest first) and bounds the batch size, and a request that can't make it any more gives
way to those that can, but is still served. Its *deadline* is when its client gives up: what
can't make it is expired at once. The reasons are in docs/design.md.
"""

import bisect
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

# Weight of the newest gap between arrivals in its moving average: a memory of about 20.
_ARRIVAL_WEIGHT = 0.05
# Weight of the newest batch in the correction of service times, and how far it may go.
_SERVICE_WEIGHT = 0.05
_MAX_CORRECTION = 10.0


class ServiceTimes:
    """Seconds that an instance takes for a batch of n rows, corrected by what is observed.

    Between measured sizes it is linear, beyond the largest proportional; with `padded`, a batch
    takes as long as the next measured size. One factor for all sizes follows the machine's drift.
    """

    def __init__(
        self, sizes: Sequence[int], seconds: Sequence[float], padded: bool = False
    ) -> None:
        if not sizes or len(sizes) != len(seconds):
            raise ValueError("want as many sizes as seconds, and at least one")
        if list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or min(seconds) <= 0:
            raise ValueError("want rising sizes from 1 and positive seconds")
        self._sizes = tuple(sizes)
        self._seconds = tuple(seconds)
        self._padded = padded
        self.correction = 1.0

    def of(self, n_rows: int) -> float:
        """Expected seconds for a batch of `n_rows`."""
        return self.correction * self._measured(n_rows)

    def observe(self, n_rows: int, seconds: float) -> None:
        """Take into account that a batch of `n_rows` took `seconds`."""
        ratio = seconds / self._measured(n_rows)
        bounded = min(max(ratio, 1 / _MAX_CORRECTION), _MAX_CORRECTION)
        self.correction += _SERVICE_WEIGHT * (bounded - self.correction)

    def largest_within(self, seconds: float, limit: int) -> int:
        """The largest batch, at most `limit`, that takes at most `seconds`; 0 if none does.

        Assumes that more rows never take less time, and searches by halves.
        """
        return bisect.bisect_right(range(1, limit + 1), seconds, key=self.of)

    def _measured(self, n_rows: int) -> float:
        index = bisect.bisect_left(self._sizes, n_rows)
        if index == len(self._sizes):
            return self._seconds[-1] * n_rows / self._sizes[-1]
        if self._padded or self._sizes[index] == n_rows or index == 0:
            return self._seconds[index]
        low, high = self._sizes[index - 1], self._sizes[index]
        share = (n_rows - low) / (high - low)
        return self._seconds[index - 1] * (1 - share) + self._seconds[index] * share


@dataclass(frozen=True)
class Limits:
    """`max_batch_size` in rows, `max_queue_size` in requests; the delay counts from the oldest
    request's arrival."""

    max_batch_size: int
    max_queue_size: int = 1024
    max_queue_delay_s: float = 0.0
    n_instances: int = 1


@dataclass(slots=True, eq=False)
class Entry(Generic[Item]):
    """A request in the queue; instants are absolute, infinity where there is none."""

    item: Item
    n_rows: int
    arrival_s: float
    target_s: float = math.inf
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Decision(Generic[Item]):
    """Run `batch` now (where it isn't empty), answer `expired` with their deadline error, and
    decide again at `wake_at_s` if nothing else happens before. `reason` is why the batch was
    closed: "full", "drained" (all that was queued), "target" (more rows would make the first
    late), or "late" (only requests past their target)."""

    batch: tuple[Entry[Item], ...] = ()
    expired: tuple[Entry[Item], ...] = ()
    reason: str = ""
    wake_at_s: float = math.inf


@dataclass(slots=True)
class _Arrivals:
    """Moving average of the gap between arrivals, in seconds."""

    last_s: float = -math.inf
    gap_s: float = math.inf

    def observe(self, now: float) -> None:
        gap = now - self.last_s
        if math.isfinite(gap):
            known = self.gap_s if math.isfinite(self.gap_s) else gap
            self.gap_s = known + _ARRIVAL_WEIGHT * (gap - known)
        self.last_s = now


@dataclass(eq=False)
class BatchQueue(Generic[Item]):
    """The queue of one model and the decisions over it. One owner; not thread-safe.

    Entries that can make their target are kept sorted by it. New ones mostly belong at the end,
    where binary search puts them; a decision looks at a bounded number of entries from the front.
    """

    limits: Limits
    times: ServiceTimes
    _in_time: list[Entry[Item]] = field(default_factory=list)
    _late: deque[Entry[Item]] = field(default_factory=deque)
    _arrivals: _Arrivals = field(default_factory=_Arrivals)
    n_rows: int = 0
    n_requests: int = 0

    def offer(self, entry: Entry[Item], now: float) -> tuple[bool, tuple[Entry[Item], ...]]:
        """Admit `entry` if there is room: (admitted, those that had to go for it).

        A full queue makes room by evicting the request that is late for longest, since it can't
        be answered in time anyway.
        """
        evicted: list[Entry[Item]] = []
        if self.n_requests >= self.limits.max_queue_size:
            evicted = self._demote_late(now)
            if not evicted and self._late:
                evicted.append(self._late.popleft())
                self._forget(evicted[0])
            if not evicted:
                return False, ()
        self._arrivals.observe(now)
        bisect.insort_right(self._in_time, entry, key=_due)
        self.n_requests += 1
        self.n_rows += entry.n_rows
        return True, tuple(evicted)

    def cancel(self, entry: Entry[Item]) -> bool:
        """Remove `entry`; False where it isn't queued (any more)."""
        queued: list[Entry[Item]] | deque[Entry[Item]]
        for queued in (self._in_time, self._late):
            if entry in queued:
                queued.remove(entry)
                self._forget(entry)
                return True
        return False

    def retry_after_s(self) -> float:
        """Seconds until the rows now queued are served, by the service times."""
        limits = self.limits
        batches = math.ceil(self.n_rows / limits.max_batch_size) / limits.n_instances
        return batches * self.times.of(limits.max_batch_size)

    def decide(self, now: float) -> Decision[Item]:
        """What an idle instance should do at `now`."""
        expired = self._demote_late(now)
        if self.n_requests == 0:
            return Decision(expired=tuple(expired))
        wake_at_s = self._worth_waiting_until(now)
        if wake_at_s > now:
            return Decision(expired=tuple(expired), wake_at_s=wake_at_s)
        size, reason = self._batch_size(now)
        batch = self._take(size, now, expired)
        return Decision(tuple(batch), tuple(expired), reason if batch else "")

    def drain(self) -> list[Entry[Item]]:
        """Remove and return all that is queued."""
        entries = [*self._in_time, *self._late]
        self._in_time.clear()
        self._late.clear()
        self.n_requests = self.n_rows = 0
        return entries

    def _demote_late(self, now: float) -> list[Entry[Item]]:
        """Move what can't make its target to the late ones; returns what can't even make its
        deadline."""
        expired = []
        n_late = 0
        for entry in self._in_time:
            finish = now + self.times.of(entry.n_rows)
            if finish <= _due(entry):
                break
            n_late += 1
            if finish > entry.deadline_s:
                self._forget(entry)
                expired.append(entry)
            else:
                self._late.append(entry)
        del self._in_time[:n_late]
        return expired

    def _batch_size(self, now: float) -> tuple[int, str]:
        """Rows to run now, and why not more."""
        limit = self.limits.max_batch_size
        if not self._in_time:
            return limit, "late"
        budget = _due(self._in_time[0]) - now
        size = self.times.largest_within(budget, limit) if math.isfinite(budget) else limit
        size = max(size, self._in_time[0].n_rows)
        if self.n_rows <= size:
            return size, "drained"
        if size == limit:
            return size, "full"
        return self._most_in_time(now, size), "target"

    def _most_in_time(self, now: float, size: int) -> int:
        """Of `size`, which the first entry can afford, and larger sizes, which sacrifice it, the
        one that answers most of the entries at the front of the queue in time.

        Each size is played through as if all batches had it and the instances took turns.
        """
        window = self._in_time[: 2 * self.limits.max_batch_size]
        sizes = [size]
        while sizes[-1] < self.limits.max_batch_size:
            sizes.append(min(2 * sizes[-1], self.limits.max_batch_size))
        served = [self._served_in_time(window, size, now) for size in sizes]
        return sizes[served.index(max(served))]

    def _served_in_time(self, window: Sequence[Entry[Item]], size: int, now: float) -> int:
        seconds = self.times.of(size)
        finish, rows, served = now + seconds, 0, 0
        for entry in window:
            if rows and rows + entry.n_rows > size:
                finish += seconds / self.limits.n_instances
                rows = 0
            if finish <= _due(entry):
                rows += entry.n_rows
                served += 1
        return served

    def _take(self, size: int, now: float, expired: list[Entry[Item]]) -> list[Entry[Item]]:
        """Remove up to `size` rows: in-time entries that the batch can still serve in time, then
        late ones."""
        finish = now + self.times.of(min(size, self.n_rows))
        batch: list[Entry[Item]] = []
        rows = taken = 0
        for entry in self._in_time:
            if batch and rows + entry.n_rows > size:
                break
            taken += 1
            if finish > _due(entry) and entry.n_rows < size:
                self._late.append(entry)  # sacrificed for a larger batch
            else:
                batch.append(entry)
                rows += entry.n_rows
        del self._in_time[:taken]
        while self._late and (not batch or rows + self._late[0].n_rows <= size):
            late = self._late.popleft()
            if now + self.times.of(late.n_rows) > late.deadline_s:
                self._forget(late)
                expired.append(late)
                continue
            batch.append(late)
            rows += late.n_rows
        for entry in batch:
            self._forget(entry)
        return batch

    def _worth_waiting_until(self, now: float) -> float:
        """The instant until which an idle instance should wait for company; `now` for not.

        It waits only where a delay is configured, a larger batch costs less than two, another
        request is expected before the delay is over, and the first can afford it.
        """
        limits = self.limits
        if limits.max_queue_delay_s <= 0 or self.n_rows >= limits.max_batch_size:
            return now
        more = self.times.of(self.n_rows + 1)
        if more >= self.times.of(self.n_rows) + self.times.of(1):
            return now
        waiting = [*self._in_time, *self._late]
        until = min(entry.arrival_s for entry in waiting) + limits.max_queue_delay_s
        until = min(until, min(_due(entry) for entry in waiting) - more)
        expected = max(now, self._arrivals.last_s + self._arrivals.gap_s)
        return until if expected <= until else now

    def _forget(self, entry: Entry[Item]) -> None:
        self.n_requests -= 1
        self.n_rows -= entry.n_rows


def _due(entry: Entry[Item]) -> float:
    return min(entry.target_s, entry.deadline_s)
