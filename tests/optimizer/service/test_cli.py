"""`trimserve service`: what it refuses, by the option that names it, before anything is started."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimserve import main


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files that are no database and no folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin.yaml").write_bytes(b"nothing that SQLite would know\n" * 200)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["run", "--database=foo://x"],
                     "--database: foo://x: got foo://, want a path, sqlite:///PATH or",
                     id="run names a database of another kind"),
        pytest.param(["run", "--database=bin.yaml"],
                     "--database: bin.yaml: is no database of SQLite, want one, or a new file",
                     id="run names a file that is no database"),
        pytest.param(["run", "--data=bin.yaml"],
                     "--data: got bin.yaml (File exists), want a folder, or a place for a new one",
                     id="run names a file as its folder"),
        pytest.param(["run", "--blobs=bin.yaml"],
                     "--blobs or --repository: bin.yaml: File exists, want a folder",
                     id="run names a file for uploads"),
        pytest.param(["run", "--repository=prod=bin.yaml"],
                     "bin.yaml: is a file, want a folder", id="run names a file as repository"),
        pytest.param(["run", "--allow-factory=nocolon"],
                     "--allow-factory: got 'nocolon', want MODULE:FUNCTION",
                     id="run allows a function without its module"),
        pytest.param(["migrate", "--database=bin.yaml"], "--database: bin.yaml: is no database",
                     id="migrate names a file that is no database"),
        pytest.param(["migrate", "--database=bin.yaml/jobs.sqlite"],
                     "bin.yaml can be made (File exists), want a file in one",
                     id="migrate names a place below a file"),
        pytest.param(["migrate", "--data=bin.yaml"], "--data: got bin.yaml (File exists)",
                     id="migrate names a file as its folder"),
        pytest.param(["migrate", "--revision=zzz"],
                     "--revision: got 'zzz', want head or 0001 … 0008",
                     id="migrate names no revision"),
        pytest.param(["migrate", "--revision=-1"], "--revision: got '-1', want head or 0001",
                     id="migrate names a step"),
        pytest.param(["key", "list", "--database=bin.yaml"], "--database: bin.yaml: is no database",
                     id="key names a file that is no database"),
        pytest.param(["key", "make", "ci", "--scope=all"],
                     "--scope: got 'all', want read, submit, publish, admin",
                     id="key names no scope"),
    ],
)  # fmt: skip
def test_service_exits_2_with_one_line_when(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (folder / "bin.yaml").read_bytes()
    assert main(["service", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *logged, line = err.splitlines()
    assert message in line
    assert line.startswith("error: ")
    assert all(one.startswith("{") for one in logged)  # the log's lines
    assert (folder / "bin.yaml").read_bytes() == content


def test_migrate_goes_to_the_revision_and_back_when_it_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for revision in ("0003", "base", "head"):
        assert main(["service", "migrate", "--revision", revision, "--data", "d"]) == 0
        assert capsys.readouterr().out == f"d/jobs.sqlite: {revision}\n"


def test_key_is_made_listed_and_revoked_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["service", "key", "make", "ci", "--scope=submit", "--data=d"]) == 0
    made = capsys.readouterr()
    assert made.out.startswith("ts_")
    assert ": read, submit" in made.err
    key_id = made.out.split("_")[1]
    assert main(["service", "key", "revoke", key_id, "--data=d"]) == 0
    assert main(["service", "key", "list", "--data=d"]) == 0
    assert capsys.readouterr().out == f"{key_id}  ci  read,submit  revoked\n"
    assert main(["service", "key", "revoke", key_id, "--data=d"]) == 2
    assert f"there is no good key {key_id}" in capsys.readouterr().err
