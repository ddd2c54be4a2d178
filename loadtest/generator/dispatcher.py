"""The open loop: send each request at its time, whatever became of those before.

And the closed one, where it is asked for: send each request when its client is answered.
"""

import time
import traceback
from array import array
from collections.abc import Callable, Sequence

import gevent
import gevent.pool
import numpy as np

from loadtest.arrivals import Arrivals
from loadtest.generator.sender import Answer, Sender
from loadtest.generator.timer import Timer
from loadtest.labels import UNGRADED
from loadtest.samples import DROPPED, GRPC_BASE, HTTP_OK, TIMED_OUT, UNFINISHED, Samples

DRAIN_MARGIN_S = 1.0
RETRY_S = 0.01
"""How long a client of a closed loop waits after a failure."""
SUCCESSES = (HTTP_OK, GRPC_BASE)

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

    def play(self, arrivals: Arrivals, start_s: float) -> Samples:
        """Send the whole schedule, which starts at `start_s` on time.monotonic(), and wait until
        the last request has its answer.

        The dispatcher never waits for an answer. An arrival that finds the pool full is
        dropped and marked so. Raises SendFailed for a defect in a sender.
        """
        n = len(arrivals)
        record = Record(n, self._grade is not None)
        targets, payloads = arrivals.target.tolist(), arrivals.payload.tolist()
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

    def play_closed(
        self, order: Arrivals, n_clients: int, start_s: float, duration_s: float
    ) -> Samples:
        """So many clients send, each when answered, for so long; then the last answers come.

        Targets and payloads come in the order of the schedule, again and again; its times don't
        count: a request is meant to be sent when it is. A failed request is followed by the next
        after RETRY_S, so that a server that refuses isn't flooded. Raises SendFailed.
        """
        record = Record(0, self._grade is not None)
        targets, payloads = order.target.tolist(), order.payload.tolist()
        sent_targets: list[int] = []
        end_s = start_s + duration_s

        def client() -> None:
            gevent.sleep(max(0.0, start_s - time.monotonic()))
            while time.monotonic() < end_s and not self._defect:
                index = record.grow()
                target, payload = (one[index % len(one)] for one in (targets, payloads))
                sent_targets.append(target)
                self._send(record, index, time.monotonic(), target, payload)
                if record.status[index] not in SUCCESSES:
                    gevent.sleep(RETRY_S)

        for _ in range(n_clients):
            self._pool.spawn(client)
        left_s = end_s - time.monotonic()
        self._pool.join(timeout=left_s + self._timeout_s + DRAIN_MARGIN_S)
        self._pool.kill()
        if self._defect:
            raise SendFailed(self._defect)
        sent = Arrivals(
            np.array(record.sent_s) - start_s,
            np.array(sent_targets, np.int32),
            order.payload[np.arange(len(sent_targets)) % len(order)],
        )
        return record.samples(sent, start_s)

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
    """Columns while they are written, in seconds of time.monotonic().

    Arrays and not lists: 20 bytes a request, where a list's floats take 72.
    """

    def __init__(self, n: int, graded: bool) -> None:
        self.sent_s = array("d", [NOT_YET]) * n
        self.done_s = array("d", [NOT_YET]) * n
        self.status = array("i", [UNFINISHED]) * n
        self.n_right = array("i", [UNGRADED]) * n if graded else None

    def grow(self) -> int:
        """Make room for one more request; gives its index."""
        self.sent_s.append(NOT_YET)
        self.done_s.append(NOT_YET)
        self.status.append(UNFINISHED)
        if self.n_right is not None:
            self.n_right.append(UNGRADED)
        return len(self.status) - 1

    def samples(self, arrivals: Arrivals, start_s: float) -> Samples:
        return Samples(
            intended_s=arrivals.intended_s,
            sent_s=np.array(self.sent_s) - start_s,
            done_s=np.array(self.done_s) - start_s,
            target=arrivals.target,
            status=np.array(self.status, np.int32),
            n_right=None if self.n_right is None else np.array(self.n_right, np.int32),
        )
