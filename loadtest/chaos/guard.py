"""Resumes a paused process when the load test is gone, however it went.

Started as `python -m loadtest.chaos.guard` with the process' descriptor as standard output and a
pipe as standard input, whose other end the load test holds: its end closes it, even by SIGKILL.
"""

import contextlib
import os
import signal

PIDFD = 1


def main() -> None:
    while os.read(0, 64):
        continue
    # It may have ended by now, which is what nobody needs to resume.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(PIDFD, signal.SIGCONT)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main()
