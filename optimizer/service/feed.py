"""Events as they come, for many followers at once.

One thread looks at the database for all of them: it asks for the last numbers of the jobs that
are followed, reads what is new of each once, and hands it to the followers on the event loop. So
a hundred pages that watch a job cost as much as one. A follower that begins further back, or that
falls behind, reads from the database itself, and none misses an event or gets one twice: numbers
have no gaps.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from optimizer.service.database import DatabaseUnavailable
from optimizer.service.jobs import ENDED, State
from optimizer.service.journal import Event
from optimizer.service.ledger import Ledger

log = logging.getLogger(__name__)

MAX_FOLLOWERS = 1_000
_KEPT = 500
"""Events of a job that are held for its followers."""
_LOOK_S = 0.25


class TooManyFollowers(Exception):
    def __init__(self) -> None:
        super().__init__(f"{MAX_FOLLOWERS} clients follow events, that is all this service takes")


@dataclass
class _Followed:
    """A job that somebody follows. Belongs to the event loop."""

    recent: deque[Event] = field(default_factory=lambda: deque(maxlen=_KEPT))
    last: int = 0
    state: State | None = None
    n_followers: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """Made on the event loop that its coroutines run on; `close` ends its thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._loop = asyncio.get_running_loop()
        self._followed: dict[str, _Followed] = {}
        self._n_followers = 0
        self._closed = threading.Event()
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._look, name="event-feed", daemon=True)
        self._thread.start()

    @property
    def n_followers(self) -> int:
        return self._n_followers

    def close(self) -> None:
        """Followers' streams end."""
        self._closed.set()
        self._wanted.set()
        for followed in self._followed.values():
            followed.news.set()

    async def follow(
        self, job_id: str, after: int, beat_s: float = 15.0
    ) -> AsyncGenerator[Event | None, None]:
        """The job's events with numbers above `after`: those that are there, and then those that
        come, until the job has ended and all was told. None whenever nothing came for `beat_s`.

        Raises TooManyFollowers."""
        if self._n_followers >= MAX_FOLLOWERS:
            raise TooManyFollowers
        followed = self._followed.setdefault(job_id, _Followed())
        followed.n_followers += 1
        self._n_followers += 1
        self._wanted.set()
        try:
            while not self._closed.is_set():
                news = followed.news
                found = await self._after(job_id, followed, after)
                for event in found:
                    after = event.number
                    yield event
                if found:
                    continue
                if followed.state in (*ENDED, State.DELETED) and after >= followed.last:
                    return
                try:
                    await asyncio.wait_for(news.wait(), beat_s)
                except TimeoutError:
                    yield None
        finally:
            followed.n_followers -= 1
            self._n_followers -= 1
            if not followed.n_followers:
                self._followed.pop(job_id, None)

    async def _after(self, job_id: str, followed: _Followed, after: int) -> list[Event]:
        recent = followed.recent
        if recent and recent[0].number <= after + 1:
            return [event for event in recent if event.number > after]
        if followed.last and after >= followed.last:
            return []
        return await asyncio.to_thread(self._ledger.journal.events, job_id, after)

    def _look(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait()
            ids = list(self._followed)
            if not ids:
                self._wanted.clear()
                continue
            try:
                self._look_at(ids)
            except DatabaseUnavailable as error:
                log.warning("events can't be read: %s", error)
                self._closed.wait(1.0)
            except RuntimeError:  # the loop is closed
                return
            self._closed.wait(_LOOK_S)

    def _look_at(self, ids: list[str]) -> None:
        heads = self._ledger.journal.heads(ids)
        for job_id in ids:
            followed = self._followed.get(job_id)
            if followed is None:
                continue
            last, state = heads.get(job_id, (0, State.DELETED))
            if (last, state) == (followed.last, followed.state):
                continue
            known = followed.last or max(0, last - _KEPT)
            fresh = self._ledger.journal.events(job_id, known) if last > known else []
            self._loop.call_soon_threadsafe(_tell, followed, fresh, last, state)


def _tell(followed: _Followed, fresh: list[Event], last: int, state: State) -> None:
    """On the loop. What was read goes on from what is held, or begins it anew."""
    told = [event for event in fresh if event.number > followed.last]
    if followed.recent and told and told[0].number != followed.recent[-1].number + 1:
        followed.recent.clear()
    followed.recent.extend(told)
    followed.last = told[-1].number if told else followed.last
    # The state counts only with all the events up to it.
    followed.state = state if followed.last >= last else None
    followed.news.set()
    followed.news = asyncio.Event()
