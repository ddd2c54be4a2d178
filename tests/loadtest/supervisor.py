"""Runs a command again whenever it ends, and keeps its number in a file; ends it when told to."""

import signal
import subprocess
import sys
from pathlib import Path


def main(pid_file: Path, argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        child = subprocess.Popen(argv)
        try:
            part = pid_file.with_suffix(".part")
            part.write_text(f"{child.pid}\n")
            part.replace(pid_file)
            child.wait()
        finally:
            child.kill()
            child.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
