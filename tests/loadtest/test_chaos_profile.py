from pathlib import Path

import pytest

from loadtest.chaos.profile import ChaosProfile, Kill, Pause, label_of, misfit, read_chaos
from loadtest.document import DocumentInvalid, parse_document

HEAD = "{apiVersion: trimserve/v1, kind: ChaosProfile, objectives: {max_recovery_s: 3}, actions: "


def profile(actions: str) -> ChaosProfile:
    return parse_document(HEAD + actions + "}", ChaosProfile, "chaos.yaml")


def test_profile_has_its_actions_when_read(tmp_path: Path) -> None:
    path = tmp_path / "chaos.yaml"
    actions = (
        "[{kind: kill, at_s: 2, pid_file: run/server.pid},"
        " {kind: pause, at_s: 4, pid: 7, for_s: 1},"
        " {kind: stop, at_s: 6, pid: 7}, {kind: slow, at_s: 8, pid: 7, for_s: 1, share: 0.5},"
        " {kind: command, at_s: 9, command: [a, b], undo: [c], for_s: 1}]"
    )
    path.write_text(HEAD + actions + "}", "utf-8")
    found = read_chaos(path)
    kill, pause = found.actions[:2]
    assert isinstance(kill, Kill)
    assert kill.pid_file == str(tmp_path / "run" / "server.pid")
    assert isinstance(pause, Pause)
    assert (pause.pid, pause.for_s, label_of(pause)) == (7, 1.0, "pause at 4 s")
    assert (found.objectives.hold_s, found.objectives.max_lost) == (5.0, None)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        pytest.param("[]", "actions: got [], want 1 or more values", id="no action"),
        pytest.param(
            "[{kind: burn, at_s: 1}]",
            "actions.0.kind: got 'burn', want kill, stop, pause, slow or command",
            id="an unknown kind",
        ),
        pytest.param(
            "[{at_s: 1}]", "actions.0.kind: missing, want kill, stop, pause, slow", id="no kind"
        ),
        pytest.param(
            "[{kind: kill, at_s: 1, pid: 7, for_s: 2}]",
            "actions.0.kill.for_s: unknown key, ",
            id="a field of another kind",
        ),
        pytest.param("[{kind: kill, pid: 7}]", "actions.0.kill.at_s: missing", id="no time"),
        pytest.param(
            "[{kind: kill, at_s: 1}]", "want one of pid and pid_file, not neither", id="no process"
        ),
        pytest.param(
            "[{kind: kill, at_s: 1, pid: 7, pid_file: x}]",
            "want one of pid and pid_file, not both",
            id="two processes",
        ),
        pytest.param("[{kind: kill, at_s: 1, pid: 1}]", "actions.0.kill.pid: got 1", id="init"),
        pytest.param(
            "[{kind: slow, at_s: 1, pid: 7, for_s: 2, share: 50}]",
            "actions.0.slow.share: got 50",
            id="a share in percent",
        ),
        pytest.param(
            "[{kind: command, at_s: 1, command: 'rm x'}]",
            "actions.0.command.command: got 'rm x'",
            id="a command line",
        ),
        pytest.param(
            "[{kind: command, at_s: 1, command: [a], undo: [b]}]",
            "want both undo and for_s, or neither",
            id="undo at no time",
        ),
        pytest.param(
            "[{kind: pause, at_s: 1, pid: 7, for_s: 2},"
            " {kind: slow, at_s: 2.5, pid: 7, for_s: 1, share: 0.5}]",
            "actions.0 and actions.1 hold process 7 at the same time",
            id="two that hold one process",
        ),
    ],
)
def test_profile_is_refused_when(actions: str, message: str) -> None:
    with pytest.raises(DocumentInvalid) as caught:
        profile(actions)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("actions", "window_s", "message"),
    [
        pytest.param("[{kind: kill, at_s: 11, pid: 7}]", 20, None, id="fits"),
        pytest.param("[{kind: kill, at_s: 12, pid: 7}]", 20, "want at most 11", id="too late"),
        pytest.param(
            "[{kind: pause, at_s: 1, pid: 7, for_s: 19}]", 20, "takes 20 s", id="lasts too long"
        ),
        pytest.param("[{kind: kill, at_s: 0, pid: 7}]", 5, "takes 9 s", id="a short window"),
    ],
)
def test_profile_fits_a_window_when_each_action_can_be_judged(
    actions: str, window_s: float, message: str | None
) -> None:
    found = misfit(profile(actions), window_s)
    assert (found is None) == (message is None)
    assert message is None or message in str(found)
