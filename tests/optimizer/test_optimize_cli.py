"""The command `trimserve optimize`: exit codes, messages, and what it leaves behind."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optimizer.cli import main
from tests.optimizer.tiny_study import write_study


def edited(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(edited("seed: 0", "sede: 0"), "did you mean 'seed'", id="an unknown key"),
        pytest.param(edited("trials: 3", "trials: 0"), "budget.trials", id="an impossible value"),
        pytest.param(edited("train.npz", "trian.npz"), "trian.npz", id="a missing file"),
        pytest.param(edited("tiny:build", "tiny:bild"), "tiny:bild", id="no such factory"),
        pytest.param(edited("n_classes: 4", "n_classes: 5"), "logits", id="labels don't fit"),
    ],
)
def test_exit_code_is_2_and_nothing_is_written_when_the_spec_is_bad(
    edit: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = write_study(tmp_path)
    spec.write_text(spec.read_text() + "seed: 0\n")
    edit(spec)
    repository = tmp_path / "models"
    code = main([str(spec), "--repository", str(repository), "--store", str(tmp_path / "s")])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not repository.exists()


def test_exit_code_is_2_when_the_spec_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.yaml"), "--repository", str(tmp_path / "models")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_exit_code_is_2_when_the_repository_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_study(tmp_path)
    (tmp_path / "models").write_text("")
    code = main([str(spec), "--repository", str(tmp_path / "models")])
    assert code == 2
    assert "want a directory for the repository" in capsys.readouterr().err


def test_exit_code_is_2_when_the_store_is_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_study(tmp_path)
    (tmp_path / "s").write_text("text, and enough of it to be looked at as a database" * 20)
    code = main([str(spec), "--repository", str(tmp_path / "m"), "--store", str(tmp_path / "s")])
    assert code == 2
    assert "--store" in capsys.readouterr().err


def test_exit_code_is_2_when_the_report_has_nowhere_to_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_study(tmp_path)
    html = tmp_path / "none" / "report.html"
    assert main([str(spec), "--repository", str(tmp_path / "m"), "--html", str(html)]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_exit_code_is_2_when_the_repository_is_not_given(tmp_path: Path) -> None:
    assert main([str(tmp_path / "spec.yaml")]) == 2


def test_exit_code_is_3_when_samples_are_too_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_study(tmp_path, max_drop_points=0.1)
    code = main([str(spec), "--repository", str(tmp_path / "m"), "--store", str(tmp_path / "s")])
    assert code == 3
    assert "data.validation has 96 samples" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_exit_code_is_0_and_files_are_written_when_unverified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_study(tmp_path)
    edited("trials: 3", "trials: 1")(spec)
    json_file, html_file = tmp_path / "r.json", tmp_path / "r.html"
    code = main(
        [
            str(spec), "--repository", str(tmp_path / "m"), "--store", str(tmp_path / "s"),
            "--no-verify", "--json", str(json_file), "--html", str(html_file),
        ]
    )  # fmt: skip
    assert code == 0
    assert json_file.is_file()
    assert html_file.is_file()
    assert (tmp_path / "m" / "tiny" / "1" / "manifest.json").is_file()
    assert "ONNX Runtime" in capsys.readouterr().out


def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--repository models" in shown
    assert "Exit code" in shown


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import optimizer, optimizer.cli, optimizer.store, optimizer.study, optimizer.timing
import optimizer.search.coordinator, optimizer.evaluator, optimizer.techniques.compilation
"""


def test_the_torch_free_part_imports_without_torch() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH]
    done = subprocess.run(command, check=False, cwd=root, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    code = main([str(tmp_path / "spec.yaml"), "--repository", str(tmp_path)])
    assert code == 2
    assert "pip install 'trimserve[optimizer]'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_exit_code_is_130_and_nothing_is_published_when_a_study_is_interrupted(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "trimserve", "optimize", str(write_study(tmp_path))]
    command += ["--repository", str(tmp_path / "models"), "--store", str(tmp_path / "s.sqlite")]
    command += ["--no-verify"]  # else it would measure the server first, for half a minute
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as study:
        assert study.stderr is not None
        assert any(line.startswith("searching") for line in study.stderr)
        study.send_signal(number)
        study.stderr.read()
        assert study.wait(60) == 130
    assert not (tmp_path / "models").exists()
