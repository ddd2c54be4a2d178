"""Folders of work under way, and those of processes that have died."""

import signal
import subprocess
import sys
from pathlib import Path

from optimizer.service import scratch

HOLDER = """
import sys, time
from pathlib import Path
from optimizer.service import scratch
with scratch.held(Path(sys.argv[1]), "theirs") as folder:
    (folder / "file").write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def names(parent: Path) -> set[str]:
    return {one.name for one in parent.iterdir() if one.is_dir()}


def test_a_folder_goes_with_its_block_and_is_left_alone_before(tmp_path: Path) -> None:
    with scratch.held(tmp_path / "work", "ours") as folder:
        (folder / "file").write_text("x")
        assert scratch.clear(tmp_path / "work") == 0
        assert (folder / "file").exists()
    assert names(tmp_path / "work") == set()


def test_what_a_killed_process_held_is_cleared_away(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert scratch.clear(tmp_path) == 0
        assert names(tmp_path) == {"theirs"}
        holder.send_signal(signal.SIGKILL)
    assert scratch.clear(tmp_path) == 1
    assert names(tmp_path) == set()


def test_nothing_is_cleared_where_there_is_nothing(tmp_path: Path) -> None:
    assert scratch.clear(tmp_path / "never") == 0
