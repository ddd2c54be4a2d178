"""Resumes a paused process where the load test doesn't: it was killed, or is suspended itself.

Started as `python -m loadtest.chaos.guard SECONDS` with the process' descriptor as standard output
and a pipe as standard input, whose other end the load test holds: its end closes it, even by
SIGKILL. After SECONDS the process is resumed in any case.
"""

import contextlib
import select
import signal
import sys

PIDFD = 1


def main(limit_s: float) -> None:
    select.select([0], [], [], limit_s)
    # It may have ended by now, and then there is nothing to resume.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(PIDFD, signal.SIGCONT)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main(float(sys.argv[1]))
