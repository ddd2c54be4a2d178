"""Batching decisions: which queued requests run together now, and which wait.

Deterministic in what it is given: no clock, thread or socket. The server's batcher calls it with
the monotonic clock, the optimizer's capacity simulation with simulated time, so that what is
simulated is what is served.

A request has up to two instants. Its *target* is when the SLO wants it answered: it orders the
queue (earliest first) and bounds the batch size, and a request that can't make it any more gives
way to those that can, but is still served. Its *deadline* is when its client gives up: what
can't make it is expired at once. The reasons are in docs/design.md.

Only requests of one *lane* can share a run: those of one shape or, where lengths are padded, of one
length bucket. The queue looks past requests of other lanes, so unequal ones don't close a batch.
"""

import bisect
import itertools
import math
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")

# Weight of the newest gap between arrivals in its moving average: a memory of about 20.
_ARRIVAL_WEIGHT = 0.05
# Weight of the newest batch in the correction of service times, and how far it may go.
_SERVICE_WEIGHT = 0.05
_MAX_CORRECTION = 10.0
# After so long a request is as urgent as any, whatever its own target, when lanes are chosen.
_LANE_PATIENCE_S = 1.0


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
    """A request in the queue; instants are absolute, infinity where there is none.

    `lane` says what it can share a run with: requests of the same lane. Lanes that are numbers
    are length buckets, and a shorter one may ride in a longer one's batch.
    """

    item: Item
    n_rows: int
    arrival_s: float
    target_s: float = math.inf
    deadline_s: float = math.inf
    lane: Hashable = None


@dataclass(frozen=True, slots=True)
class Decision(Generic[Item]):
    """Run `batch` now (where it isn't empty), answer `expired` with their deadline error, and
    decide again at `wake_at_s` if nothing else happens before. `lane` is the batch's (entries of
    shorter buckets may be among it). `reason` is why the batch was closed: "full", "drained" (all
    of the lane that was queued), "target" (more rows would make the first late), or "late" (only
    requests past their target)."""

    batch: tuple[Entry[Item], ...] = ()
    expired: tuple[Entry[Item], ...] = ()
    reason: str = ""
    wake_at_s: float = math.inf
    lane: Hashable = None


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


@dataclass(slots=True, eq=False)
class _Lane(Generic[Item]):
    """The queued requests that can share a run: those in time by their due instant, earliest
    first, and the late ones in the order in which they became late."""

    key: Hashable
    times: ServiceTimes
    in_time: list[Entry[Item]] = field(default_factory=list)
    late: deque[Entry[Item]] = field(default_factory=deque)
    n_rows: int = 0

    @property
    def entries(self) -> Iterator[Entry[Item]]:
        return itertools.chain(self.in_time, self.late)


@dataclass(eq=False)
class BatchQueue(Generic[Item]):
    """The queue of one model and the decisions over it. One owner; not thread-safe.

    `times` are those of a lane that `lane_times` doesn't name. Entries that can make their target
    are kept sorted by it within their lane. New ones mostly belong at the end, where binary search
    puts them; a decision looks at the lanes' fronts and a bounded number of entries of one lane.
    """

    limits: Limits
    times: ServiceTimes
    lane_times: Mapping[Hashable, ServiceTimes] = field(default_factory=dict)
    _lanes: dict[Hashable, _Lane[Item]] = field(default_factory=dict)
    _arrivals: _Arrivals = field(default_factory=_Arrivals)
    n_rows: int = 0
    n_requests: int = 0

    def times_of(self, lane: Hashable) -> ServiceTimes:
        return self.lane_times.get(lane, self.times)

    def offer(self, entry: Entry[Item], now: float) -> tuple[bool, tuple[Entry[Item], ...]]:
        """Admit `entry` if there is room: (admitted, those that had to go for it).

        A full queue makes room by evicting the request that is late for longest, since it can't
        be answered in time anyway.
        """
        evicted: list[Entry[Item]] = []
        if self.n_requests >= self.limits.max_queue_size:
            evicted = self._demote_late(now) or self._evict_latest()
            if not evicted:
                return False, ()
        self._arrivals.observe(now)
        lane = self._lanes.get(entry.lane)
        if lane is None:
            lane = self._lanes[entry.lane] = _Lane(entry.lane, self.times_of(entry.lane))
        bisect.insort_right(lane.in_time, entry, key=_due)
        self.n_requests += 1
        self.n_rows += entry.n_rows
        lane.n_rows += entry.n_rows
        return True, tuple(evicted)

    def cancel(self, entry: Entry[Item]) -> bool:
        """Remove `entry`; False where it isn't queued (any more)."""
        lane = self._lanes.get(entry.lane)
        if lane is None:
            return False
        queued: list[Entry[Item]] | deque[Entry[Item]]
        for queued in (lane.in_time, lane.late):
            if entry in queued:
                queued.remove(entry)
                self._forget(lane, entry)
                self._drop_if_empty(lane)
                return True
        return False

    def retry_after_s(self) -> float:
        """Seconds until the rows now queued are served, by the service times."""
        limits = self.limits
        seconds = 0.0
        for lane in self._lanes.values():
            n_batches = math.ceil(lane.n_rows / limits.max_batch_size)
            seconds += n_batches * lane.times.of(limits.max_batch_size)
        return seconds / limits.n_instances

    def decide(self, now: float) -> Decision[Item]:
        """What an idle instance should do at `now`."""
        expired = self._demote_late(now)
        if self.n_requests == 0:
            return Decision(expired=tuple(expired))
        lane, wake_at_s = self._next_lane(now)
        if lane is None:
            return Decision(expired=tuple(expired), wake_at_s=wake_at_s)
        size, reason = self._batch_size(lane, now)
        batch = self._take(lane, size, now, expired)
        if batch and isinstance(lane.key, int) and len(self._lanes) > 1:
            self._take_along(lane, size, now, batch)
        self._drop_if_empty(lane)
        return Decision(tuple(batch), tuple(expired), reason if batch else "", lane=lane.key)

    def drain(self) -> list[Entry[Item]]:
        """Remove and return all that is queued."""
        entries = [entry for lane in self._lanes.values() for entry in lane.entries]
        self._lanes.clear()
        self.n_requests = self.n_rows = 0
        return entries

    def _next_lane(self, now: float) -> tuple[_Lane[Item] | None, float]:
        """The lane to run now: of those for which waiting isn't worth it, the one with the most
        urgent request. None and the instant to ask again where all should wait."""
        wake_at_s = math.inf
        if self.limits.max_queue_delay_s <= 0:
            return min(self._lanes.values(), key=_urgency), now
        for lane in sorted(self._lanes.values(), key=_urgency):
            until = self._worth_waiting_until(lane, now)
            if until <= now:
                return lane, now
            wake_at_s = min(wake_at_s, until)
        return None, wake_at_s

    def _demote_late(self, now: float) -> list[Entry[Item]]:
        """Move what can't make its target to the late ones; returns what can't even make its
        deadline."""
        expired: list[Entry[Item]] = []
        for lane in list(self._lanes.values()):
            n_late = 0
            for entry in lane.in_time:
                finish = now + lane.times.of(entry.n_rows)
                if finish <= _due(entry):
                    break
                n_late += 1
                if finish > entry.deadline_s:
                    self._forget(lane, entry)
                    expired.append(entry)
                else:
                    lane.late.append(entry)
            if n_late:
                del lane.in_time[:n_late]
                self._drop_if_empty(lane)
        return expired

    def _evict_latest(self) -> list[Entry[Item]]:
        """Remove the late request that was due first, where there is a late one."""
        late = [lane for lane in self._lanes.values() if lane.late]
        if not late:
            return []
        lane = min(late, key=lambda lane: _due(lane.late[0]))
        entry = lane.late.popleft()
        self._forget(lane, entry)
        self._drop_if_empty(lane)
        return [entry]

    def _batch_size(self, lane: _Lane[Item], now: float) -> tuple[int, str]:
        """Rows to run now, and why not more."""
        limit = self.limits.max_batch_size
        if not lane.in_time:
            return limit, "late"
        budget = _due(lane.in_time[0]) - now
        size = lane.times.largest_within(budget, limit) if math.isfinite(budget) else limit
        size = max(size, lane.in_time[0].n_rows)
        if lane.n_rows <= size:
            return size, "drained"
        if size == limit:
            return size, "full"
        return self._most_in_time(lane, now, size), "target"

    def _most_in_time(self, lane: _Lane[Item], now: float, size: int) -> int:
        """Of `size`, which the first entry can afford, and larger sizes, which sacrifice it, the
        one that answers most of the entries at the front of the lane in time.

        Each size is played through as if all batches had it and the instances took turns.
        """
        window = lane.in_time[: 2 * self.limits.max_batch_size]
        sizes = [size]
        while sizes[-1] < self.limits.max_batch_size:
            sizes.append(min(2 * sizes[-1], self.limits.max_batch_size))
        served = [self._served_in_time(window, lane.times.of(size), size, now) for size in sizes]
        return sizes[served.index(max(served))]

    def _served_in_time(
        self, window: Sequence[Entry[Item]], seconds: float, size: int, now: float
    ) -> int:
        finish, rows, served = now + seconds, 0, 0
        for entry in window:
            if rows and rows + entry.n_rows > size:
                finish += seconds / self.limits.n_instances
                rows = 0
            if finish <= _due(entry):
                rows += entry.n_rows
                served += 1
        return served

    def _take(
        self, lane: _Lane[Item], size: int, now: float, expired: list[Entry[Item]]
    ) -> list[Entry[Item]]:
        """Remove up to `size` rows of a lane: in-time entries that the batch can still serve in
        time, then late ones."""
        finish = now + lane.times.of(min(size, lane.n_rows))
        batch: list[Entry[Item]] = []
        rows = taken = 0
        for entry in lane.in_time:
            if batch and rows + entry.n_rows > size:
                break
            taken += 1
            if finish > _due(entry) and entry.n_rows < size:
                lane.late.append(entry)  # sacrificed for a larger batch
            else:
                batch.append(entry)
                rows += entry.n_rows
        del lane.in_time[:taken]
        while lane.late and (not batch or rows + lane.late[0].n_rows <= size):
            late = lane.late.popleft()
            if now + lane.times.of(late.n_rows) > late.deadline_s:
                self._forget(lane, late)
                expired.append(late)
                continue
            batch.append(late)
            rows += late.n_rows
        for entry in batch:
            self._forget(lane, entry)
        return batch

    def _take_along(
        self, lane: _Lane[Item], size: int, now: float, batch: list[Entry[Item]]
    ) -> None:
        """Fill what room `batch` has left with in-time requests of shorter buckets, longest bucket
        first, where padding them further costs less than running them in their own.

        The saving is exact for the rows that are queued now: what their lane's next batch gets
        shorter by is compared with what this batch gets longer by.
        """
        rows = sum(entry.n_rows for entry in batch)
        shorter = [
            other
            for other in self._lanes.values()
            if isinstance(other.key, int) and isinstance(lane.key, int) and other.key < lane.key
        ]
        for other in sorted(shorter, key=lambda one: -cast("int", one.key)):
            riders = _fitting(other.in_time, size - rows)
            n_riding = sum(entry.n_rows for entry in riders)
            if not riders:
                continue
            more = lane.times.of(rows + n_riding) - lane.times.of(rows)
            waiting = min(sum(entry.n_rows for entry in other.in_time), size)
            left = max(0, waiting - n_riding)
            saved = other.times.of(waiting) - (other.times.of(left) if left else 0.0)
            if more > saved or now + lane.times.of(rows + n_riding) > _due(riders[0]):
                continue
            del other.in_time[: len(riders)]
            for entry in riders:
                self._forget(other, entry)
            batch.extend(riders)
            rows += n_riding
            self._drop_if_empty(other)

    def _worth_waiting_until(self, lane: _Lane[Item], now: float) -> float:
        """The instant until which an idle instance should wait for company; `now` for not.

        It waits only where a delay is configured, a larger batch costs less than two, another
        request is expected before the delay is over, and the first can afford it.
        """
        limits = self.limits
        if lane.n_rows >= limits.max_batch_size:
            return now
        more = lane.times.of(lane.n_rows + 1)
        if more >= lane.times.of(lane.n_rows) + lane.times.of(1):
            return now
        until = min(entry.arrival_s for entry in lane.entries) + limits.max_queue_delay_s
        until = min(until, min(_due(entry) for entry in lane.entries) - more)
        expected = max(now, self._arrivals.last_s + self._arrivals.gap_s)
        return until if expected <= until else now

    def _forget(self, lane: _Lane[Item], entry: Entry[Item]) -> None:
        self.n_requests -= 1
        self.n_rows -= entry.n_rows
        lane.n_rows -= entry.n_rows

    def _drop_if_empty(self, lane: _Lane[Item]) -> None:
        """Lanes come and go with their requests: shapes may be as many as clients like."""
        if not lane.in_time and not lane.late:
            self._lanes.pop(lane.key, None)


def _due(entry: Entry[Item]) -> float:
    return min(entry.target_s, entry.deadline_s)


def _urgency(lane: _Lane[Item]) -> tuple[bool, float, float]:
    """Sorts by the first request's due instant, among equal ones by its arrival; what is due never,
    or far from now, is so soon after its arrival, lest it wait for ever behind lanes that are never
    empty. Lanes of late ones come last, oldest first."""
    if not lane.in_time:
        return True, lane.late[0].arrival_s, 0.0
    first = lane.in_time[0]
    return False, min(_due(first), first.arrival_s + _LANE_PATIENCE_S), first.arrival_s


def _fitting(entries: Sequence[Entry[Item]], room: int) -> list[Entry[Item]]:
    """The entries from the front that fit into `room` rows together."""
    fitting: list[Entry[Item]] = []
    for entry in entries:
        room -= entry.n_rows
        if room < 0:
            break
        fitting.append(entry)
    return fitting
