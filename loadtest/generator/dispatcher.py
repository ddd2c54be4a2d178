"""The open loop: send each request at its time, whatever became of those before."""

import time
import traceback
from collections.abc import Callable, Sequence

import gevent
import gevent.pool
import numpy as np

from loadtest.arrivals import Arrivals
from loadtest.generator.sender import Answer, Sender
from loadtest.generator.timer import Timer
from loadtest.labels import UNGRADED
from loadtest.samples import DROPPED, TIMED_OUT, UNFINISHED, Samples

LEAD_S = 0.05
"""The first arrival is this far ahead when a schedule starts."""
DRAIN_MARGIN_S = 1.0

NOT_YET = float("nan")
Observe = Callable[[int, float, Answer], None]
"""Called with (target, latency in seconds from the intended send, answer) after each request."""
Grade = Callable[[int, int, Answer], int]
"""Called with (target, payload, success); gives the number of rows that were answered right."""


class SendFailed(Exception):
    """A defect in the generator itself, not in what it tests."""


class Dispatcher:
    """Plays schedules through one bounded pool of greenlets, one schedule after the other."""

    def __init__(
        self,
        senders: Sequence[Sender],
        timer: Timer,
        max_in_flight: int,
        timeout_s: float,
        observe: Observe,
        grade: Grade | None = None,
    ) -> None:
        self._senders = senders
        self._timer = timer
        self._pool = gevent.pool.Pool(max_in_flight)
        self._timeout_s = timeout_s
        self._observe = observe
        self._grade = grade
        self._defect = ""

    def play(self, arrivals: Arrivals) -> Samples:
        """Send the whole schedule and wait until the last request has its answer.

        The dispatcher never waits for an answer. An arrival that finds the pool full is
        dropped and marked so. Raises SendFailed for a defect in a sender.
        """
        n = len(arrivals)
        record = Record(n, self._grade is not None)
        targets, payloads = arrivals.target.tolist(), arrivals.payload.tolist()
        start_s = time.monotonic() + LEAD_S
        for index, intended_s in enumerate(arrivals.intended_s.tolist()):
            self._timer.sleep_until(start_s + intended_s)
            if self._pool.full():
                record.status[index] = DROPPED
                self._observe(targets[index], self._timeout_s, Answer(DROPPED))
            else:
                self._pool.spawn(
                    self._send,
                    record,
                    index,
                    start_s + intended_s,
                    targets[index],
                    payloads[index],
                )
        self._pool.join(timeout=self._timeout_s + DRAIN_MARGIN_S)
        self._pool.kill()
        if self._defect:
            raise SendFailed(self._defect)
        return record.samples(arrivals, start_s)

    def kill(self) -> None:
        self._pool.kill()

    def _send(
        self, record: "Record", index: int, intended_s: float, target: int, payload: int
    ) -> None:
        record.sent_s[index] = time.monotonic()
        limit = gevent.Timeout.start_new(self._timeout_s)
        try:
            answer = self._senders[target].send(payload)
        except gevent.Timeout as timeout:
            if timeout is not limit:
                raise
            answer = Answer(TIMED_OUT, error=f"no answer within {self._timeout_s:g} s")
        except Exception:  # noqa: BLE001 - the request boundary; play() raises it again
            self._defect = self._defect or traceback.format_exc()
            return
        finally:
            limit.close()
        done_s = time.monotonic()
        record.done_s[index] = done_s
        record.status[index] = answer.status
        # Graded after its time was taken, so that it costs the next request at most.
        if self._grade is not None and record.n_right is not None and answer.body:
            record.n_right[index] = self._grade(target, payload, answer)
        self._observe(target, done_s - intended_s, answer)


class Record:
    """Columns while they are written, in seconds of time.monotonic()."""

    def __init__(self, n: int, graded: bool) -> None:
        self.sent_s = [NOT_YET] * n
        self.done_s = [NOT_YET] * n
        self.status = [UNFINISHED] * n
        self.n_right = [UNGRADED] * n if graded else None

    def samples(self, arrivals: Arrivals, start_s: float) -> Samples:
        return Samples(
            intended_s=arrivals.intended_s,
            sent_s=np.array(self.sent_s) - start_s,
            done_s=np.array(self.done_s) - start_s,
            target=arrivals.target,
            status=np.array(self.status, np.int32),
            n_right=None if self.n_right is None else np.array(self.n_right, np.int32),
        )
