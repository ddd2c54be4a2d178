"""`trimserve jobs`: what it refuses before anything is sent, and what it sends."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from trimserve import main

SPEC = """
name: tiny
slo: slo.yaml
model: {onnx: m.onnx}
data: {validation: {path: v.npz}, test: {path: v.npz}}
"""


@contextmanager
def service() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Takes everything; with its address and what it was sent."""
    sent: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent.append((self.path, body))
            answer = {"id": "j", "complete": True, "reference": f"upload:{body.get('name')}"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Not to standard error."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a spec and the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "slo.yaml").write_text("name: quick\n")
    (tmp_path / "m.onnx").write_bytes(b"model")
    (tmp_path / "v.npz").write_bytes(b"data")
    (tmp_path / "bin.yaml").write_bytes(b"a: \xff\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "lost.yaml").write_text(SPEC.replace("path: v.npz}}", "path: w.npz}}"))
    (tmp_path / "no_slo.yaml").write_text(SPEC.replace("slo.yaml", "none.yaml"))
    return tmp_path


def test_submit_sends_the_spec_with_its_slo_and_uploads_when_it_is_good(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with service() as (url, sent):
        assert main(["jobs", "submit", "spec.yaml", "--url", url, "--label", "team=a=b"]) == 0
    *uploads, (path, body) = sent
    assert [one["name"] for _, one in uploads] == ["m.onnx", "v.npz"]  # each once
    assert path == "/v1/jobs"
    assert body["labels"] == {"team": "a=b"}
    assert body["spec"] == {
        "name": "tiny",
        "slo": {"name": "quick"},
        "model": {"onnx": "upload:m.onnx"},
        "data": {"validation": {"path": "upload:v.npz"}, "test": {"path": "upload:v.npz"}},
    }
    assert capsys.readouterr().out == "j\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["spec.yaml", "--label", "foo"], "--label: got 'foo', want NAME=VALUE",
                     id="a label has no value"),
        pytest.param(["bin.yaml"], "bin.yaml: byte 3 is not UTF-8, want a UTF-8 text",
                     id="the spec is no text"),
        pytest.param(["empty.yaml"], "empty.yaml: the file is empty, want a mapping",
                     id="the spec is empty"),
        pytest.param(["none.yaml"], "none.yaml: No such file", id="there is no spec"),
        pytest.param(["no_slo.yaml"], "none.yaml: No such file", id="there is no SLO"),
        pytest.param(["lost.yaml"], "data.test.path: ", id="the last of its files isn't there"),
    ],
)  # fmt: skip
def test_submit_exits_2_and_sends_nothing_when(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with service() as (url, sent):
        assert main(["jobs", "submit", *arguments, "--url", url]) == 2
    assert sent == []
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("url", ["nohttp", "ftp://host", "http://", "http://host:port", ""])
def test_jobs_exits_2_with_one_line_when_the_url_is(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", "list", "--url", url]) == 2
    assert capsys.readouterr().err == (
        f"error: --url: got {url!r}, want http://HOST:PORT or https://HOST:PORT\n"
    )


def test_jobs_says_why_in_plain_words_when_no_service_answers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["jobs", "list", "--url", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == (
        "error: no service answers at http://127.0.0.1:1: Connection refused\n"
    )


def test_clone_exits_2_when_a_change_is_inside_of_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ["--set", "budget=1", "--set", "budget.trials=2"]
    assert main(["jobs", "clone", "j", "--url", "http://127.0.0.1:1", *changes]) == 2
    assert "--set: got budget.trials and a value of budget" in capsys.readouterr().err
