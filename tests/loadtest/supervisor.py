"""Runs a command again a while after it ends, and keeps its number in a file; ends it when told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PAUSE_S = 1.0
"""Before it runs again, so that what is lost meanwhile is many and no matter of luck."""


class Supervisor:
    def __init__(self, pid_file: Path, argv: list[str]) -> None:
        self.pid_file, self.argv = pid_file, argv
        self.pid = 0
        self.is_over = False

    def end(self, *_: object) -> None:
        """As a signal handler, which may come at any moment."""
        self.is_over = True
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def run(self) -> None:
        while not self.is_over:
            child = subprocess.Popen(self.argv)
            self.pid = child.pid
            if self.is_over:
                child.kill()
            part = self.pid_file.with_suffix(".part")
            part.write_text(f"{child.pid}\n")
            part.replace(self.pid_file)
            # Waited for without being reaped: until `pid` is 0 its number is nobody else's.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            self.pid = 0
            child.wait()
            if not self.is_over:
                time.sleep(PAUSE_S)


if __name__ == "__main__":
    supervisor = Supervisor(Path(sys.argv[1]), sys.argv[2:])
    signal.signal(signal.SIGTERM, supervisor.end)
    supervisor.run()
