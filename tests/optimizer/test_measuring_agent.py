"""The agent over loopback, as another process: what it measures, and what it refuses."""

import http.client
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from onnx import TensorProto, helper

from optimizer.block_times import StoredTimes
from optimizer.blocks import Block
from optimizer.errors import MeasurerUnavailable
from optimizer.estimates import Estimates
from optimizer.latency_table import table_blocks
from optimizer.measuring import ContenderFailed
from optimizer.measuring.artifact_cache import ArtifactCache
from optimizer.measuring.bearer import TokenInvalid, read_token
from optimizer.measuring.calls import PROTOCOL_VERSION, Call, Named, header_of
from optimizer.measuring.frames import Frame, encode
from optimizer.measuring.onnx_files import check_onnx
from optimizer.measuring.remote import RemoteMeasurer
from optimizer.spec import read_spec
from optimizer.store import Store
from optimizer.timing import Contender, Effort
from optimizer.variant import directory_digest
from serve.engines import EngineSpec
from serve.errors import ArtifactInvalid
from serve.machine import this_machine
from tests.optimizer.tiny_study import write_study
from tests.serve.onnx_models import linear, linear_by_hand, work

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
QUICK = Effort(
    min_passes=3, max_passes=3, seconds=0.0, max_warmup_passes=1, max_warmup_s=0.1, max_retries=0
)
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class RunningAgent:
    url: str
    process: subprocess.Popen[str]

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        token: str = TOKEN,
    ) -> tuple[int, dict[str, object]]:
        """Status and JSON of the answer; {} where it has none."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            authorized = {
                "Authorization": f"Bearer {token}",
                "TrimServe-Protocol": str(PROTOCOL_VERSION),
                **(headers or {}),
            }
            connection.request(method, path, body, authorized)
            response = connection.getresponse()
            read = response.read()
            is_json = response.getheader("Content-Type") == "application/json"
            return response.status, json.loads(read) if read and is_json else {}
        finally:
            connection.close()


@contextmanager
def running_agent(directory: Path, *options: str) -> Iterator[RunningAgent]:
    runtime = directory / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    environment = {
        **os.environ, "TRIMSERVE_AGENT_TOKEN": TOKEN, "XDG_RUNTIME_DIR": str(runtime),
    }  # fmt: skip
    command = [sys.executable, "-m", "trimserve", "measure", "--listen", "127.0.0.1:0"]
    with (
        (directory / "agent.log").open("w") as log,
        subprocess.Popen(
            [*command, "--cache", str(directory / "cache"), *options], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=log, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready, (directory / "agent.log").read_text()
            yield RunningAgent(json.loads(ready)["url"], process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    limits = ("--max-artifact-bytes", "100000", "--max-call-s", "20")
    with running_agent(tmp_path_factory.mktemp("agent"), *limits) as running:
        yield running


@pytest.fixture
def contender(tmp_path: Path) -> Contender:
    directory = tmp_path / "linear"
    directory.mkdir()
    linear(directory / "model.onnx")
    return Contender(directory, EngineSpec("onnxruntime", "model.onnx"))


@pytest.fixture
def endless(tmp_path: Path) -> Contender:
    directory = tmp_path / "endless"
    directory.mkdir()
    work(directory / "model.onnx")
    return Contender(directory, EngineSpec("onnxruntime", "model.onnx"))


def upload(files: Mapping[str, bytes]) -> bytes:
    sizes = {name: len(content) for name, content in files.items()}
    return json.dumps(sizes).encode() + b"\n" + b"".join(files.values())


# --- measuring


def test_remote_measurer_gives_what_the_engine_computes_when_the_agent_runs_it(
    agent: RunningAgent, contender: Contender
) -> None:
    measurer = RemoteMeasurer(agent.url, TOKEN)
    outputs = list(measurer.outputs(contender, [{"x": X[:3]}, {"x": X[3:]}]))
    got = np.concatenate([output["y"] for output in outputs])
    np.testing.assert_allclose(got, linear_by_hand(X), rtol=1e-5)


def test_remote_measurer_gives_timings_kernels_and_memory_when_asked(
    agent: RunningAgent, contender: Contender
) -> None:
    measurer = RemoteMeasurer(agent.url, TOKEN)
    timing = measurer.time(contender, contender, {"x": X}, (1, 8), effort=QUICK, seed=0)
    assert [time.batch_size for time in timing.times.times] == [1, 8]
    assert all(0 < time.p50_s < 10 for time in timing.times.times)
    assert timing.speedup is not None
    assert any("Gemm" in time.operator for time in measurer.kernels(contender, {"x": X}, 2))
    assert measurer.memory_bytes(contender, {"x": X}) > 1e6
    joules = measurer.joules(contender, {"x": X}, 0.01)
    assert joules is None or joules > 0


def test_layers_for_techniques_are_timed_by_the_agent_and_found_under_its_machine(
    agent: RunningAgent, tmp_path: Path
) -> None:
    spec = read_spec(write_study(tmp_path))
    measurer = RemoteMeasurer(agent.url, TOKEN)
    layers = table_blocks([Block("conv", (16, 4, 4), 16, (3, 3), (1, 1), (1,) * 4, (1, 1), 16)])
    with Store(tmp_path / "store.sqlite") as store:
        estimates = Estimates(spec, store, measurer, "base", 1, lambda _recipe: None)
        assert estimates.measure(layers, lambda: True) == len(layers) == 2
        found = StoredTimes(store, measurer.machine, 1)
        assert all((seconds := found(layer)) and 0 < seconds < 10 for layer in layers)


def test_remote_machine_is_the_agents_when_asked(agent: RunningAgent) -> None:
    assert RemoteMeasurer(agent.url, TOKEN).machine == this_machine()


@pytest.mark.full  # takes a while
def test_agent_goes_on_when_an_engine_fails_or_hangs(
    agent: RunningAgent, contender: Contender, endless: Contender
) -> None:
    measurer = RemoteMeasurer(agent.url, TOKEN)
    with pytest.raises(ContenderFailed, match="Unexpected input data type"):
        list(measurer.outputs(contender, [{"x": X.astype(np.float64)}]))
    with pytest.raises(ContenderFailed, match="no answer within 20 s"):
        list(measurer.outputs(endless, [{"n": np.array(10**12)}]))
    assert len(list(measurer.outputs(contender, [{"x": X}]))) == 1


def test_artifact_is_sent_again_when_the_agent_let_it_go(
    tmp_path: Path, contender: Contender
) -> None:
    with running_agent(tmp_path) as agent:
        measurer = RemoteMeasurer(agent.url, TOKEN)
        list(measurer.outputs(contender, [{"x": X}]))
        for kept in (tmp_path / "cache").iterdir():
            shutil.rmtree(kept)
        assert len(list(measurer.outputs(contender, [{"x": X}]))) == 1


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "agent")])
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(
        now + timedelta(days=1)
    )
    certificate = builder.add_extension(host, critical=False).sign(key, hashes.SHA256())
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return directory / "cert.pem", directory / "key.pem"


def test_agent_is_trusted_over_tls_exactly_when_its_certificate_is(
    tmp_path: Path, contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = write_certificate(tmp_path)
    options = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with running_agent(tmp_path, *options) as agent:
        assert agent.url.startswith("https://")
        with pytest.raises(MeasurerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            assert RemoteMeasurer(agent.url, TOKEN).machine
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        measurer = RemoteMeasurer(agent.url, TOKEN)
        assert len(list(measurer.outputs(contender, [{"x": X}]))) == 1


# --- who may, and what


def test_health_is_told_to_all_and_nothing_else_when_there_is_no_token(
    agent: RunningAgent,
) -> None:
    status, said = agent.ask("GET", "/health", token="")
    assert (status, said["status"], said["protocol"]) == (200, "ok", PROTOCOL_VERSION)
    for path in ("/v1/machine", f"/v1/artifacts/{NO_DIGEST}", "/v1/calls", "/openapi.json"):
        assert agent.ask("GET", path, token="")[0] == 401


def test_remote_measurer_says_why_when_the_token_is_wrong(
    agent: RunningAgent, contender: Contender
) -> None:
    wrong = RemoteMeasurer(agent.url, TOKEN[::-1])
    with pytest.raises(MeasurerUnavailable, match="401: want the agent's token"):
        list(wrong.outputs(contender, [{"x": X}]))
    with pytest.raises(MeasurerUnavailable, match="401"):
        assert wrong.machine


def test_request_is_refused_with_both_versions_when_the_protocol_is_another(
    agent: RunningAgent,
) -> None:
    status, said = agent.ask("GET", "/v1/machine", headers={"TrimServe-Protocol": "999"})
    assert status == 400
    assert said["message"].startswith(f"protocol: got '999', want {PROTOCOL_VERSION}")  # type: ignore[attr-defined]


def test_remote_measurer_says_so_when_nobody_listens() -> None:
    with pytest.raises(MeasurerUnavailable, match="can't be reached"):
        assert RemoteMeasurer("http://127.0.0.1:9", TOKEN).machine


@pytest.mark.parametrize("url", ["ftp://host:1", "localhost:8010", "http://host/path"])
def test_remote_measurer_refuses_what_is_no_agents_url(url: str) -> None:
    with pytest.raises(ValueError, match="want http://HOST:PORT"):
        RemoteMeasurer(url, TOKEN)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({"model.onnx": b"x"}, "digest of what came", id="another digest"),
        pytest.param({"../model.onnx": b"x"}, "leads out", id="a path that leads out"),
        pytest.param({"/etc/model.onnx": b"x"}, "leads out", id="an absolute path"),
        pytest.param({"model.pt2": b"x"}, "may carry code", id="a torch package"),
        pytest.param({"custom.so": b"x"}, "may carry code", id="a library"),
        pytest.param({"model.onnx": b"x" * 100_001}, "at most 100000", id="too large"),
        pytest.param({}, "0 files", id="no file"),
        pytest.param({"a.bin": b"x", "a.bin/b.bin": b"x"}, "can't be kept", id="a file as folder"),
        pytest.param({"\ud800.bin": b"x"}, "can't be kept", id="a name that is no text"),
    ],
)
def test_upload_is_refused_with_the_reason_when_it_is_not_allowed(
    agent: RunningAgent, files: Mapping[str, bytes], message: str
) -> None:
    status, said = agent.ask("PUT", f"/v1/artifacts/{NO_DIGEST}", upload(files))
    assert status == 422
    assert message in str(said["message"])
    assert agent.ask("HEAD", f"/v1/artifacts/{NO_DIGEST}")[0] == 404


def test_upload_is_cut_off_when_it_is_larger_than_any_artifact(agent: RunningAgent) -> None:
    status, said = agent.ask("PUT", f"/v1/artifacts/{NO_DIGEST}", b"x" * 500_000)
    assert (status, said["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        pytest.param({"name": "torch_compiled"}, 422, "engine_refused", id="another engine"),
        pytest.param({"file": "../model.onnx"}, 422, "artifact_invalid", id="a file elsewhere"),
        pytest.param({"file": "other.onnx"}, 422, "artifact_invalid", id="a file it lacks"),
        pytest.param({"threads": 10_000}, 400, "too_many_cores", id="more cores than it has"),
    ],
)
def test_call_is_refused_with_the_reason_when_the_engine_is_not_allowed(
    agent: RunningAgent,
    contender: Contender,
    changed: dict[str, str],
    status: int,
    code: str,
) -> None:
    named = RemoteMeasurer(agent.url, TOKEN).named(contender)
    spec = replace(named.spec, **changed)  # type: ignore[arg-type]
    call = Call("outputs", (Named(named.files, spec),))
    body = b"".join(encode(Frame(header_of(call), [{"x": X}])))
    got, said = agent.ask("POST", "/v1/calls", body)
    assert (got, said["code"]) == (status, code)


def test_call_is_refused_when_it_is_none(agent: RunningAgent) -> None:
    got, said = agent.ask("POST", "/v1/calls", b"\x80\x04pickle")
    assert (got, said["code"]) == (400, "call_invalid")


def test_remote_measurer_drops_the_contender_when_the_agent_refuses_its_files(
    agent: RunningAgent, tmp_path: Path
) -> None:
    (tmp_path / "model.pt2").write_bytes(b"code")
    contender = Contender(tmp_path, EngineSpec("onnxruntime", "model.pt2"))
    with pytest.raises(ContenderFailed, match="may carry code"):
        RemoteMeasurer(agent.url, TOKEN).kernels(contender, {"x": X}, 1)


@pytest.mark.full  # takes a while
def test_request_is_put_off_when_the_queue_is_full(
    tmp_path: Path, contender: Contender, endless: Contender
) -> None:
    with running_agent(tmp_path, "--max-waiting", "0", "--max-call-s", "5") as agent:
        measurer = RemoteMeasurer(agent.url, TOKEN)
        named = measurer.named(contender)
        list(measurer.outputs(endless, [{"n": np.array(1)}]))
        failed: list[ContenderFailed] = []

        def hang() -> None:
            try:
                list(measurer.outputs(endless, [{"n": np.array(10**12)}]))
            except ContenderFailed as error:
                failed.append(error)

        hanging = threading.Thread(target=hang)
        hanging.start()
        body = b"".join(encode(Frame(header_of(Call("outputs", (named,))), [{"x": X}])))
        statuses = []
        while hanging.is_alive() and 429 not in statuses:
            statuses.append(agent.ask("POST", "/v1/calls", body)[0])
        hanging.join()
        assert 429 in statuses
        assert failed
        waits: list[float] = []
        patient = RemoteMeasurer(agent.url, TOKEN, sleep=waits.append)
        assert len(list(patient.outputs(contender, [{"x": X}]))) == 1


# --- its end


def test_remote_measurer_says_so_when_the_agent_dies_in_the_middle(
    tmp_path: Path, contender: Contender, endless: Contender
) -> None:
    with running_agent(tmp_path) as agent:
        measurer = RemoteMeasurer(agent.url, TOKEN)
        list(measurer.outputs(contender, [{"x": X}]))
        killing = threading.Timer(1.0, agent.process.kill)
        killing.start()
        with pytest.raises(MeasurerUnavailable, match="can't be reached"):
            list(measurer.outputs(endless, [{"n": np.array(10**12)}]))
        killing.join()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_exit_code_says_how_it_ended_when_a_signal_comes_in_the_middle_of_a_call(
    tmp_path: Path, endless: Contender, number: signal.Signals, code: int
) -> None:
    with running_agent(tmp_path) as agent:
        measurer = RemoteMeasurer(agent.url, TOKEN, max_wait_s=0.0)
        measurer.named(endless)
        ending = threading.Timer(1.5, agent.process.send_signal, (number,))
        ending.start()
        with pytest.raises((ContenderFailed, MeasurerUnavailable)):
            list(measurer.outputs(endless, [{"n": np.array(10**12)}]))
        ending.join()
        assert agent.process.wait(30) == code


# --- the command line


def run(*options: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIMSERVE_AGENT")}
    if token is not None:
        environment["TRIMSERVE_AGENT_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-m", "trimserve", "measure", *options], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        pytest.param((), None, "no token", id="no token"),
        pytest.param((), "short", "got 5 characters, want 32", id="a short token"),
        pytest.param(("--token-file", "none"), TOKEN, "none: can't be read", id="no file"),
        pytest.param(("--listen", "8010"), TOKEN, "want HOST:PORT", id="no host"),
        pytest.param(("--tls-cert", "c.pem"), TOKEN, "together", id="no key"),
        pytest.param(
            ("--tls-cert", "c.pem", "--tls-key", "k.pem"),
            TOKEN,
            "c.pem and k.pem can't be used",
            id="no such certificate",
        ),
        pytest.param(("--listen", "192.0.2.1:1"), TOKEN, "can't listen on", id="not its address"),
    ],
)
def test_exit_code_is_2_and_the_message_says_what_to_mend(
    options: tuple[str, ...], token: str | None, message: str
) -> None:
    done = run(*options, token=token)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr


def test_listening_beyond_loopback_without_tls_is_warned_of() -> None:
    done = run("--listen", "192.0.2.1:1", "--log-format", "json")
    assert json.loads(done.stderr.splitlines()[0])["level"] == "warning"


@pytest.mark.parametrize(
    ("environ", "with_file"),
    [
        pytest.param({"TRIMSERVE_AGENT_TOKEN": TOKEN}, False, id="the environment"),
        pytest.param({"TRIMSERVE_AGENT_TOKEN": "x"}, True, id="a file before the environment"),
        pytest.param({"TRIMSERVE_AGENT_TOKEN_FILE": "named"}, False, id="a file it names"),
    ],
)
def test_token_is_read_from_where_it_is(
    environ: dict[str, str], with_file: bool, tmp_path: Path
) -> None:
    (tmp_path / "named").write_text(f"{TOKEN}\n")
    if "TRIMSERVE_AGENT_TOKEN_FILE" in environ:
        environ = {"TRIMSERVE_AGENT_TOKEN_FILE": str(tmp_path / "named")}
    assert read_token(environ, tmp_path / "named" if with_file else None) == TOKEN


@pytest.mark.parametrize("token", ["", "a" * 31, "ä" * 40, "a b" * 20])
def test_token_is_refused_without_being_shown_when_it_is_weak(token: str) -> None:
    with pytest.raises(TokenInvalid) as caught:
        read_token({"TRIMSERVE_AGENT_TOKEN": token})
    assert not token or token not in str(caught.value)


# --- artifacts


def add(cache: ArtifactCache, directory: Path, content: bytes) -> str:
    directory.mkdir()
    (directory / "model.bin").write_bytes(content)
    digest = directory_digest(directory)
    with (directory / "model.bin").open("rb") as file:
        cache.add(digest, {"model.bin": len(content)}, file.read)
    return digest


def test_least_recently_used_artifact_goes_when_room_is_needed(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "cache", max_bytes=250, max_artifact_bytes=100)
    cache.prepare()
    first = add(cache, tmp_path / "a", b"a" * 100)
    second = add(cache, tmp_path / "b", b"b" * 100)
    os.utime(tmp_path / "cache" / first, (1, 1))
    os.utime(tmp_path / "cache" / second, (2, 2))
    assert cache.find(first)  # which makes it the more recent one
    third = add(cache, tmp_path / "c", b"c" * 100)
    assert [bool(cache.find(one)) for one in (first, second, third)] == [True, False, True]


def test_leftovers_of_an_interrupted_upload_go_when_the_cache_is_prepared(tmp_path: Path) -> None:
    (tmp_path / ".upload-x").mkdir()
    ArtifactCache(tmp_path, 1, 1).prepare()
    assert list(tmp_path.iterdir()) == []


def save_external(path: Path, location: str, op_type: str = "Neg") -> Path:
    """A graph inside of a branch names data at `location`."""
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    branch = helper.make_graph(
        [helper.make_node(op_type, ["w"], ["y"])], "b", [], [value], [tensor]
    )
    choice = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "g", [choice], [value])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.data", "a/../../b.data", ""])
def test_onnx_is_refused_when_its_external_data_lead_out(location: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match="leads out"):
        check_onnx(save_external(tmp_path / "model.onnx", location))


def test_onnx_is_refused_when_its_external_data_are_missing(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx", "weights.data")
    with pytest.raises(ArtifactInvalid, match="aren't beside it"):
        check_onnx(path)
    (tmp_path / "weights.data").write_bytes(b"1234")
    check_onnx(path)


def test_onnx_is_refused_when_it_holds_a_compiled_blob_or_is_none(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"1234")
    with pytest.raises(ArtifactInvalid, match="EPContext"):
        check_onnx(save_external(tmp_path / "model.onnx", "w", op_type="EPContext"))
    (tmp_path / "text.onnx").write_bytes(b"\xff\xff no model")
    with pytest.raises(ArtifactInvalid, match="no ONNX file"):
        check_onnx(tmp_path / "text.onnx")


def test_onnx_is_taken_when_its_data_are_its_own(tmp_path: Path) -> None:
    check_onnx(linear(tmp_path / "model.onnx"))
