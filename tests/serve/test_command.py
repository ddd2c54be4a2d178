"""`trimserve serve` as a process: usage errors, and its way from ready to drained."""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from serve import oip_pb2 as pb
from tests.serve import onnx_models
from tests.serve.running_server import (
    HOST,
    PATIENCE_S,
    RunningServer,
    ask,
    channel_to,
    command,
    connect,
    fetch,
    method,
    running,
    until,
)
from tests.serve.under_load import (
    INFER,
    LINEAR,
    Client,
    GrpcClient,
    RestClient,
    infer_message,
)
from tests.serve.versions import publish, slo_document
from trimserve import main

MUCH_WORK = 60_000  # turns of the model `work`: about half a second


# --- usage

Arguments = Callable[[Path], list[str]]


def good_model(folder: Path) -> list[str]:
    return ["--model", str(onnx_models.linear(folder / "linear.onnx"))]


def written(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def empty_folder(folder: Path) -> str:
    (folder / "models").mkdir()
    return str(folder / "models")


def slo_with(**changes: object) -> str:
    return json.dumps({**slo_document(50.0), **changes})


def broken_repository(folder: Path) -> str:
    root = folder / "models"
    (publish(root, onnx_models.linear, folder) / "model.onnx").write_bytes(b"tampered")
    return str(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(lambda folder: [], "--repository DIR|URL or --model FILE.onnx",
                     id="no source is given"),
        pytest.param(lambda folder: [*good_model(folder), "--repository", str(folder)],
                     "--repository DIR|URL or --model FILE.onnx", id="two sources are given"),
        pytest.param(lambda folder: [*good_model(folder), "--version-policy=newest"],
                     "latest:N (for example", id="the version policy is unknown"),
        pytest.param(lambda folder: [*good_model(folder), "--load-model=m"],
                     "want --model-control explicit", id="a model is named and all are loaded"),
        pytest.param(lambda folder: [*good_model(folder), "--model-control=explicit",
                                     "--load-model=m@sha1:33"],
                     "digest: got 'sha1:33'", id="a digest is none"),
        pytest.param(lambda folder: [*good_model(folder), "--shared-memory-prefix=a/b"],
                     "--shared-memory-prefix: got 'a/b'", id="the prefix is a path"),
        pytest.param(lambda folder: [*good_model(folder), "--tenant-header", "a b"],
                     "--tenant-header: got 'a b', want the name of a header",
                     id="a header's name has a space"),
        pytest.param(lambda folder: [*good_model(folder), "--tenant-header", "x-tenant:"],
                     "--tenant-header: got 'x-tenant:'", id="a header's name has a colon"),
        pytest.param(lambda folder: [*good_model(folder), "--poll-interval-s=5"],
                     "--poll-interval-s: want --model-control poll with it",
                     id="an interval is given and nothing is polled"),
        pytest.param(lambda folder: [*good_model(folder), "--slo", str(folder / "absent.yaml")],
                     "absent.yaml: No such file", id="the SLO is missing"),
        pytest.param(lambda folder: [*good_model(folder), "--slo",
                                     written(folder / "slo.yaml", slo_with(colour="red"))],
                     "slo.yaml:1: colour: unknown key", id="the SLO has an unknown key"),
        pytest.param(lambda folder: [*good_model(folder), "--http-port", "70000"],
                     "less than or equal to 65535", id="a port is out of range"),
        pytest.param(lambda folder: [*good_model(folder), "--colour", "red"],
                     "--colour", id="an option is unknown"),
    ],
)  # fmt: skip
def test_serve_exits_2_with_one_message_when_it_is_called_so_that(
    tmp_path: Path,
    arguments: Arguments,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    code = main(["serve", *arguments(tmp_path)])
    assert_usage_error(code, *capsys.readouterr(), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(lambda folder: ["--repository=s3x://bucket"], "s3x://bucket",
                     id="the address is of an unknown kind"),
        pytest.param(lambda folder: ["--model", str(folder / "absent.onnx")],
                     "absent.onnx: not a file, want an ONNX model", id="the file is missing"),
        pytest.param(lambda folder: ["--repository", broken_repository(folder)],
                     "no model could be loaded", id="no model can be loaded"),
        pytest.param(lambda folder: ["--model", written(folder / "m.onnx", "nonsense")],
                     "m.onnx: ONNX Runtime can't load it", id="the file is no model"),
    ],
)  # fmt: skip
def test_serve_exits_2_with_one_message_when(
    tmp_path: Path, arguments: Arguments, message: str
) -> None:
    ended = subprocess.run(
        command(*arguments(tmp_path)), capture_output=True, text=True, timeout=PATIENCE_S,
        check=False, env={"COLUMNS": "200", "NO_COLOR": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert_usage_error(ended.returncode, ended.stdout, ended.stderr, message)


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        pytest.param(lambda folder: str(folder / "absent"),
                     "absent: No such file or directory; want a folder", id="it is missing"),
        pytest.param(empty_folder, "no model version, want <model>/<version>/manifest.json",
                     id="it is empty"),
    ],
)  # fmt: skip
def test_serve_exits_2_and_opens_no_port_when_the_folder_has_no_model_since(
    tmp_path: Path, repository: Callable[[Path], str], message: str
) -> None:
    ended = subprocess.run(
        command("--repository", repository(tmp_path), "--host=256.0.0.1"),  # can't be listened on
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert_usage_error(ended.returncode, ended.stdout, ended.stderr, message)
    assert len(ended.stderr.splitlines()) == 1


def assert_usage_error(code: int, out: str, err: str, message: str) -> None:
    assert code == 2, err
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_serve_exits_2_when_the_port_is_taken(tmp_path: Path, name: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            command(*good_model(tmp_path), f"--{name}-port", str(port)),
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert f"can't listen on {HOST}:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


# --- a plain ONNX file, and a broken version beside a good one


def test_serve_serves_a_plain_file_when_an_slo_is_given(tmp_path: Path) -> None:
    slo = written(tmp_path / "slo.yaml", json.dumps(slo_document(12.5)))
    with running(tmp_path / "log", *good_model(tmp_path), "--slo", slo) as server:
        rest = connect(server.http_port)
        assert ask(rest, "POST", INFER, LINEAR).status == 200
        rest.close()
        edges = fetch(server.metrics_port, "GET", "/metrics").body
        assert b"trimserve_request_duration_seconds_bucket{" in edges
        assert b'le="0.0125"' in edges
        server.terminate()
        assert server.wait() == 0


def test_serve_serves_the_others_when_one_version_is_broken(tmp_path: Path) -> None:
    root = tmp_path / "models"
    publish(root, onnx_models.linear, tmp_path)
    broken = publish(root, onnx_models.pair, tmp_path, slo={"latency": "fast"})
    file = broken / "model.onnx"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    with running(tmp_path / "log", "--repository", str(root)) as server:
        rest = connect(server.http_port)
        assert ask(rest, "POST", INFER, LINEAR).status == 200
        answer = ask(rest, "POST", "/v2/models/pair/infer", {"inputs": []})
        assert (answer.status, "sha256" in answer.error) == (503, True)
        ready = ask(rest, "GET", "/v2/models/pair/ready")
        assert (ready.status, "sha256" in ready.error) == (503, True)
        index = {entry["name"]: entry for entry in ask(rest, "POST", "/v2/repository/index").json}
        assert index["pair"]["state"] == "UNAVAILABLE"
        assert "sha256" in index["pair"]["reason"]
        assert str(root) not in index["pair"]["reason"]  # clients see no folder of this machine
        assert index["linear"] == {
            "name": "linear", "version": "1", "state": "READY", "reason": "",
        }  # fmt: skip
        assert ask(rest, "GET", "/v2/models/linear/ready").status == 200
        assert ask(rest, "GET", "/v2/health/ready").status == 200
        rest.close()
        with channel_to(server.grpc_port) as channel:
            asked = pb.ModelReadyRequest(name="pair")
            assert not method(channel, "ModelReady")(asked, timeout=PATIENCE_S).ready


def test_serve_ends_without_turning_ready_when_it_is_told_to_while_loading(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for n in range(1, 301):
        publish(root, onnx_models.linear, tmp_path, version=str(n))
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command("--repository", str(root), "--version-policy=all"),
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    until(lambda: '"ready"' in log.read_text())  # the first of them
    process.terminate()
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (0, b"")
    assert log.read_text().count('"message": "ready"') < 300


# --- draining


@pytest.fixture
def draining(models: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server that keeps on answering for some seconds after SIGTERM."""
    arguments = ("--repository", str(models), "--drain-delay-s=2.5")
    with running(tmp_path / "log", *arguments) as server:
        yield server


def test_server_turns_not_ready_but_answers_when_it_drains(draining: RunningServer) -> None:
    kept = connect(draining.http_port)
    assert ask(kept, "GET", "/v2/health/ready").status == 200
    with channel_to(draining.grpc_port) as channel:
        health = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        assert method(channel, "ModelInfer")(infer_message(), timeout=PATIENCE_S)
        draining.terminate()
        until(lambda: fetch(draining.http_port, "GET", "/v2/health/ready").status == 503)
        assert fetch(draining.http_port, "GET", "/v2/models/linear/ready").status == 503
        assert fetch(draining.http_port, "GET", "/v2/health/live").status == 200
        state = health(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert state.status == health_pb2.HealthCheckResponse.NOT_SERVING
        ready = method(channel, "ServerReady")(pb.ServerReadyRequest(), timeout=PATIENCE_S)
        assert not ready.ready
        answer = ask(kept, "POST", INFER, LINEAR)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert method(channel, "ModelInfer")(infer_message(), timeout=PATIENCE_S).outputs
    assert draining.wait() == 0


DRAIN_DELAY_S = 0.5


def test_server_loses_no_accepted_request_when_it_is_terminated_under_load(
    models: Path, tmp_path: Path
) -> None:
    arguments = ("--repository", str(models), f"--drain-delay-s={DRAIN_DELAY_S}")
    with running(tmp_path / "log", *arguments) as server:
        clients: list[Client] = [*(RestClient(server) for _ in range(8))]
        clients += [GrpcClient(server) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            assert client.is_going.wait(PATIENCE_S)
        terminated_s = time.monotonic()
        server.terminate()
        for client in clients:
            client.join(PATIENCE_S)
        assert server.wait() == 0
    assert [client.lost for client in clients] == [[]] * len(clients)
    # Until the listeners close, which is not before the delay is over, nothing is refused. A call
    # may have been on its way for as long as an answer takes.
    on_its_way_s = 0.1
    assert min(c.refused_s for c in clients) > terminated_s + DRAIN_DELAY_S - on_its_way_s


def work_json(turns: int) -> str:
    given = {"name": "n", "datatype": "INT64", "shape": [], "data": turns}
    return json.dumps({"inputs": [given]})


def n_in_flight(server: RunningServer) -> float:
    return server.metric("trimserve_requests_in_flight", model="work")


@pytest.mark.parametrize("first", ["rest", "grpc"])
def test_server_answers_what_runs_and_waits_when_it_is_terminated(
    models: Path, tmp_path: Path, first: str
) -> None:
    """One request is in the engine and one, of the other transport, in the queue."""
    arguments = ("--repository", str(models), "--drain-delay-s=0")
    message = pb.ModelInferRequest(model_name="work")
    message.inputs.add(name="n", datatype="INT64", shape=[])
    message.raw_input_contents.append(MUCH_WORK.to_bytes(8, "little"))
    with (
        running(tmp_path / "log", *arguments) as server,
        channel_to(server.grpc_port) as channel,
    ):
        rest = connect(server.http_port)
        calls = []
        senders: dict[str, Callable[[], None]] = {
            "rest": lambda: rest.request("POST", "/v2/models/work/infer", work_json(MUCH_WORK)),
            "grpc": lambda: calls.append(
                method(channel, "ModelInfer").future(message, timeout=PATIENCE_S)
            ),
        }
        for n, transport in enumerate(sorted(senders, key=lambda name: name != first), start=1):
            senders[transport]()
            until(lambda n=n: n_in_flight(server) == n)
        server.terminate()
        response = rest.getresponse()
        assert json.loads(response.read())["outputs"][0]["data"] == [MUCH_WORK]
        assert calls[0].result().raw_output_contents[0] == MUCH_WORK.to_bytes(8, "little")
        rest.close()
        assert server.wait() == 0


def test_server_exits_1_when_the_drain_takes_too_long(models: Path, tmp_path: Path) -> None:
    arguments = ("--repository", str(models), "--drain-delay-s=0", "--drain-timeout-s=1")
    with running(tmp_path / "log", *arguments) as server:
        rest = connect(server.http_port)
        rest.request("POST", "/v2/models/work/infer", work_json(10 * MUCH_WORK))
        until(lambda: n_in_flight(server) == 1)
        server.terminate()
        assert server.wait() == 1
        rest.close()
    assert "gave up draining" in server.log.read_text()


def test_server_ends_at_once_when_a_second_signal_comes(draining: RunningServer) -> None:
    draining.terminate()
    until(lambda: "draining" in draining.log.read_text())
    draining.terminate()
    assert draining.wait() != 0
