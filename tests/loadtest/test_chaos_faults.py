"""Actions on real processes of this machine; each wait has an end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.chaos.conductor import Conductor
from loadtest.chaos.faults import ActionFailed, Stage, check_action, perform
from loadtest.chaos.process import open_process
from loadtest.chaos.profile import AnyAction, Command, Kill, Pause, Slow, Stop
from loadtest.target import Target

LIMIT_S = 20.0
LISTENER = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
time.sleep(60)
"""
NOWHERE = (Target("rest", "127.0.0.1", 1),)


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that listens; its port is its first line."""
    child = subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True)
    yield child
    child.send_signal(signal.SIGCONT)
    child.kill()
    child.wait(LIMIT_S)
    assert child.stdout is not None
    child.stdout.close()


def targets_of(server: subprocess.Popen[str]) -> tuple[Target, ...]:
    assert server.stdout is not None
    return (Target("rest", "localhost", int(server.stdout.readline())),)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for_state(pid: int, *states: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while state_of(pid) not in states:
        assert time.monotonic() < deadline_s, f"{state_of(pid)}, want {states}"


def done(action: AnyAction, targets: tuple[Target, ...] = NOWHERE) -> list[float]:
    """Perform; gives the times of beginning and end."""
    times_s: list[float] = []

    def now() -> None:
        times_s.append(time.monotonic())

    perform(action, Stage(targets, threading.Event(), now, now))
    return times_s


def anybody(kind: type[AnyAction], pid: int, **more: Any) -> Any:
    return kind(kind=kind.__name__.lower(), at_s=0, pid=pid, any_process=True, **more)


@pytest.mark.parametrize(("kind", "number"), [(Kill, signal.SIGKILL), (Stop, signal.SIGTERM)])
def test_process_ends_by_its_signal_when_it_is_killed_or_stopped(
    server: subprocess.Popen[str], kind: type[AnyAction], number: int
) -> None:
    done(kind(kind=kind.__name__.lower(), at_s=0, pid=server.pid), targets_of(server))
    assert server.wait(LIMIT_S) == -number


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
time.sleep(60)
"""


def test_stop_fails_when_the_process_stays() -> None:
    child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(ActionFailed, match=r"didn't end within 0\.1 s"):
            done(anybody(Stop, child.pid, within_s=0.1))
    finally:
        child.kill()
        child.communicate(timeout=LIMIT_S)


def test_process_is_stopped_and_runs_again_when_it_is_paused(
    server: subprocess.Popen[str],
) -> None:
    seen: list[str] = []
    action = anybody(Pause, server.pid, for_s=0.3)
    thread = threading.Thread(target=lambda: seen.append(str(len(done(action)))))
    thread.start()
    wait_for_state(server.pid, "T")
    thread.join(LIMIT_S)
    assert seen == ["2"]
    wait_for_state(server.pid, "S", "R")


@pytest.mark.alone
def test_process_gets_about_its_share_when_it_is_slowed() -> None:
    """A busy loop's processor time, against the time that passes."""
    script = "print(flush=True)\nwhile True: pass"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        before_s = processor_s(child.pid)
        began_s, ended_s = done(anybody(Slow, child.pid, for_s=1.5, share=0.2))
        used_s = processor_s(child.pid) - before_s
        assert state_of(child.pid) != "T"
        # It may get less, where others want the processor too.
        assert 0 < used_s < 0.5 * (ended_s - began_s)
    finally:
        child.kill()
        child.wait(LIMIT_S)
        assert child.stdout is not None
        child.stdout.close()


def processor_s(pid: int) -> float:
    columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(columns[11]) + int(columns[12])) / os.sysconf("SC_CLK_TCK")


PAUSER = """
import sys, threading
from loadtest.chaos.faults import Stage, perform
from loadtest.chaos.profile import Pause
for_s = float(sys.argv[2])
action = Pause(kind="pause", at_s=0, pid=int(sys.argv[1]), any_process=True, for_s=for_s)
perform(action, Stage((), threading.Event(), lambda: None, lambda: None))
"""


def test_process_runs_again_when_the_load_test_is_killed(server: subprocess.Popen[str]) -> None:
    pauser = subprocess.Popen([sys.executable, "-c", PAUSER, str(server.pid), "60"])
    wait_for_state(server.pid, "T")
    pauser.kill()
    pauser.wait(LIMIT_S)
    wait_for_state(server.pid, "S", "R")


def test_process_runs_again_when_the_load_test_is_suspended(server: subprocess.Popen[str]) -> None:
    pauser = subprocess.Popen([sys.executable, "-c", PAUSER, str(server.pid), "0.5"])
    try:
        wait_for_state(server.pid, "T")
        pauser.send_signal(signal.SIGSTOP)
        wait_for_state(server.pid, "S", "R")
    finally:
        pauser.kill()
        pauser.wait(LIMIT_S)


def test_process_runs_again_when_the_run_is_given_up(server: subprocess.Popen[str]) -> None:
    conductor = Conductor((anybody(Pause, server.pid, for_s=60),), NOWHERE, perform)
    conductor.start(time.monotonic())
    wait_for_state(server.pid, "T")
    conductor.close()
    assert state_of(server.pid) != "T"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"pid": 2**22 + 1}, "there is no process 4194305", id="no such process"),
        pytest.param({"pid": os.getpid()}, "is the load test itself", id="ourselves"),
        pytest.param({"pid_file": "/nowhere/pid"}, "pid_file /nowhere/pid: No such", id="no file"),
        pytest.param({"pid_file": __file__}, "want the number of a process", id="no number"),
    ],
)
def test_action_is_refused_when_there_is_no_process_for_it(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ActionFailed) as caught:
        check_action(Kill(kind="kill", at_s=0, **given), NOWHERE)
    assert message in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
def test_action_is_refused_when_the_process_is_another_users() -> None:
    other = subprocess.Popen(["sleep", "60"], user=65534)
    try:
        with pytest.raises(ActionFailed, match="is user 65534's, want one of user 0"):
            check_action(Kill(kind="kill", at_s=0, pid=other.pid), NOWHERE)
    finally:
        other.kill()
        other.wait(LIMIT_S)


def test_process_is_the_servers_when_it_listens_on_a_targets_address(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    targets = targets_of(server)
    file = tmp_path / "server.pid"
    file.write_text(f"{server.pid}\n")
    check_action(Kill(kind="kill", at_s=0, pid_file=str(file)), (*NOWHERE, *targets))
    for elsewhere in (
        Target("rest", "127.0.0.1", targets[0].port + 1),
        Target("rest", "192.0.2.1", targets[0].port),
    ):
        with pytest.raises(ActionFailed, match="doesn't listen on"):
            check_action(Kill(kind="kill", at_s=0, pid=server.pid), (elsewhere,))
    check_action(Kill(kind="kill", at_s=0, pid=server.pid, any_process=True), NOWHERE)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "::1"])
def test_process_listens_on_an_address_when_its_socket_takes_it(address: str) -> None:
    if address != "0.0.0.0" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    script = LISTENER.replace('("127.0.0.1", 0)', f'("{address}", 0), family={family(address)}')
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        host = "::1" if ":" in address else "127.0.0.1"
        open_process(child.pid, None, False, (Target("rest", host, port),)).close()
    finally:
        child.kill()
        child.communicate(timeout=LIMIT_S)


def family(address: str) -> int:
    return int(socket.AF_INET6 if ":" in address else socket.AF_INET)


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_command_is_undone_when_its_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "there"
    write = script(f"open({str(file)!r}, 'w')")
    remove = script(f"import os; os.remove({str(file)!r})")
    action = Command(kind="command", at_s=0, command=write, undo=remove, for_s=0.01)
    check_action(action, NOWHERE)
    done(action)
    assert not file.exists()
    done(Command(kind="command", at_s=0, command=write))
    assert file.exists()


@pytest.mark.parametrize(
    ("text", "timeout_s", "message"),
    [
        ("import sys; print('no pod x'); sys.exit(3)", 10.0, "ended with 3: no pod x"),
        ("import time; time.sleep(60)", 0.1, r"didn't end within 0\.1 s"),
    ],
    ids=["it fails", "it hangs"],
)
def test_command_is_undone_and_has_failed_when(
    tmp_path: Path, text: str, timeout_s: float, message: str
) -> None:
    file = tmp_path / "undone"
    action = Command(
        kind="command", at_s=0, command=script(text), timeout_s=timeout_s, for_s=0.01,
        undo=script(f"open({str(file)!r}, 'w')"),
    )  # fmt: skip
    with pytest.raises(ActionFailed, match=message):
        done(action if timeout_s > 1 else action.model_copy(update={"undo": None, "for_s": None}))
    assert file.exists() == (timeout_s > 1)


def test_command_is_refused_when_its_program_is_missing() -> None:
    action = Command(kind="command", at_s=0, command=("no-such-program-here",))
    with pytest.raises(ActionFailed, match="want a program that is installed"):
        check_action(action, NOWHERE)


# --- the conductor


class Clock:
    """A clock that stands still unless it is set."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


KILL = Kill(kind="kill", at_s=1, pid=7)


def test_conductor_tells_when_an_action_began_and_ended() -> None:
    clock = Clock()

    def act(action: AnyAction, stage: Stage) -> None:
        stage.on_begin()
        clock.now_s = 100.75
        stage.on_end()
        clock.now_s = 103.0

    conductor = Conductor((KILL,), NOWHERE, act, clock)
    conductor.start(99.0)
    (one,) = conductor.finish()
    assert (one.started_s, one.ended_s, one.error) == (1.0, 1.75, "")


@pytest.mark.parametrize(
    ("start_s", "raised", "error"),
    [
        pytest.param(99.0, ActionFailed("gone"), "gone", id="it fails"),
        pytest.param(97.5, None, "began 1.5 s late, want at most 1 s", id="it is late"),
        pytest.param(99.0, KeyError("x"), "KeyError: 'x'", id="it has a defect"),
    ],
)
def test_conductor_keeps_why_an_action_failed_when(
    start_s: float, raised: Exception | None, error: str
) -> None:
    def act(action: AnyAction, stage: Stage) -> None:
        stage.on_begin()
        if raised is not None:
            raise raised

    conductor = Conductor((KILL,), NOWHERE, act, Clock())
    conductor.start(start_s)
    (one,) = conductor.finish()
    assert one.error == error


def test_conductor_begins_nothing_when_it_is_closed_before() -> None:
    def act(action: AnyAction, stage: Stage) -> None:
        raise AssertionError("not any more")

    conductor = Conductor((KILL,), NOWHERE, act, Clock())
    conductor.start(160.0)
    conductor.close()
    assert [one.error for one in conductor.finish()] == ["the window didn't begin"]
