"""The images of server and load test as a node runs them: built, started without rights, asked."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from packaging.utils import canonicalize_name

from serve import oip_pb2 as pb
from serve.engines import EngineSpec
from serve.storage.digest import version_digest
from tests.images.podman import BASE, Podman, built, image_of
from tests.images.test_sbom import LABEL
from tests.k8s.kustomizations import K8S
from tests.k8s.resolved import resolved
from tests.k8s.test_manifests import server
from tests.serve import encoded_models, onnx_models
from tests.serve.onnx_models import linear_by_hand
from tests.serve.running_server import (
    PATIENCE_S,
    RunningServer,
    ask,
    channel_to,
    connect,
    fetch,
    method,
    running,
)
from tests.serve.versions import publish, rows

pytestmark = pytest.mark.full

X = rows(2)
MAX_MB = {"serve": 300, "serve-onnxruntime": 193, "loadtest": 265}
"""Target -> what it may add to its base. Of 157 MB as here, ONNX Runtime alone makes 350."""
SERVERS = ("serve", "serve-onnxruntime")
RAW = {"Inference-Header-Content-Length": "0"}
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": X.tolist()}]}


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with built(*MAX_MB) as one:
        yield one


def repository(folder: Path, engine: str) -> tuple[Path, str]:
    """A repository that others may read, and the digest of its one version."""
    folder.chmod(0o755)
    spec = EngineSpec(engine, "model.onnx", threads=1)
    version = publish(folder / "models", onnx_models.linear, folder, engine=spec)
    for path in (folder / "models").rglob("*"):
        path.chmod(0o755)
    return folder / "models", version_digest(version)


def arguments(digest: str) -> list[str]:
    """Of the server in the manifests, on free ports of the loopback."""
    _, container = server(resolved(K8S / "base"))
    told = [one for one in container["args"][1:] if not re.match(r"--(host|\w+-port)=", one)]
    values = {"$(REPOSITORY)": "/models", "$(LOAD_MODEL)": f"linear@{digest}"}
    for name, value in values.items():
        told = [one.replace(name, value) for one in told]
    return [one for one in told if not one.startswith("--drain-delay-s=")]


def mounts(models: Path) -> list[str]:
    """Those of the manifests: the SLO, a folder for copies of versions, and the models."""
    slo = K8S / "config/slo.yaml"
    return [f"--volume={slo}:/etc/trimserve/slo.yaml:ro", f"--volume={models}:/models:ro",
            "--tmpfs=/cache:rw,mode=1777"]  # fmt: skip


def status_of(podman: Podman) -> dict[str, str]:
    """The fields of /proc/PID/status of the one container's first process."""
    pid = podman.run("inspect", "--latest", "--format={{.State.Pid}}").strip()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: " ".join(rest.split()) for name, _, rest in (one.partition(":") for one in lines)}


def assert_answers(one: RunningServer) -> None:
    answer = fetch(one.http_port, "POST", "/v2/models/linear/infer", BODY)
    assert answer.status == 200, answer.body
    (output,) = answer.json["outputs"]
    got = np.reshape(output["data"], output["shape"])
    np.testing.assert_allclose(got, linear_by_hand(X), atol=1e-4)
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=X.shape)
    request = pb.ModelInferRequest(
        model_name="linear", inputs=[tensor], raw_input_contents=[X.tobytes()]
    )
    with channel_to(one.grpc_port) as channel:
        reply = method(channel, "ModelInfer")(request, timeout=PATIENCE_S)
    got = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(2, 3)
    np.testing.assert_allclose(got, linear_by_hand(X), atol=1e-4)


def asked(podman: Podman, target: str, script: str, *arguments: str) -> str:
    """What the Python program prints in a container of the target's."""
    program = podman.program(target, "--entrypoint=/opt/trimserve/bin/python")
    ended = subprocess.run(
        [*program, "-c", script, *arguments],
        capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize(
    ("target", "engine"),
    [
        ("serve", "onnxruntime"),
        ("serve", "openvino"),
        ("serve-onnxruntime", "onnxruntime"),
    ],
)
def test_image_serves_and_drains_without_rights_by_the_manifests_command(
    target: str, engine: str, podman: Podman, tmp_path: Path
) -> None:
    models, digest = repository(tmp_path, engine)
    program = podman.program(target, *mounts(models))
    with running(tmp_path / "log", *arguments(digest), program=program) as one:
        assert_answers(one)
        status = status_of(podman)
        assert (status["Uid"], status["Gid"]) == (" ".join(["10001"] * 4),) * 2
        assert (int(status["CapEff"], 16), status["NoNewPrivs"], status["Seccomp"]) == (0, "1", "2")
        one.terminate()
        assert one.wait() == 0, (tmp_path / "log").read_text()


@pytest.mark.parametrize("target", SERVERS)
def test_image_takes_pictures_and_texts(target: str, podman: Podman, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    models = encoded_models.repository(tmp_path)
    for path in models.rglob("*"):
        path.chmod(0o755)
    program = podman.program(target, f"--volume={models}:/models:ro")
    with running(tmp_path / "log", "--repository=/models", program=program) as one:
        for kind in ("JPEG", "PNG", "WEBP"):
            rest, picture = connect(one.http_port), encoded_models.encoded((0, 40, 250), kind)
            answer = ask(rest, "POST", "/v2/models/colours/infer", picture, RAW)
            rest.close()
            assert (answer.status, b"blue" in answer.body) == (200, True), answer.body
        tensor = pb.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[1, 1])
        tensor.contents.bytes_contents.append(b"a b c")
        request = pb.ModelInferRequest(model_name="texts", inputs=[tensor])
        with channel_to(one.grpc_port) as channel:
            reply = method(channel, "ModelInfer")(request, timeout=PATIENCE_S)
        total = [one.name for one in reply.outputs].index("total")
        assert np.frombuffer(reply.raw_output_contents[total], np.float32) == [9.0]


def test_image_without_openvino_says_so(podman: Podman, tmp_path: Path) -> None:
    models, digest = repository(tmp_path, "openvino")
    program = podman.program("serve-onnxruntime", *mounts(models))
    log = tmp_path / "log"
    with running(log, *arguments(digest), program=program, event="not_ready") as one:
        assert fetch(one.http_port, "GET", "/v2/health/ready").status == 503
    assert "trimserve[openvino]" in log.read_text()


def test_image_says_not_ready_when_the_digest_is_of_no_version(
    podman: Podman, tmp_path: Path
) -> None:
    models, _ = repository(tmp_path, "onnxruntime")
    program = podman.program("serve", *mounts(models))
    told = arguments(f"sha256:{'0' * 64}")
    with running(tmp_path / "log", *told, program=program, event="not_ready") as one:
        assert fetch(one.http_port, "GET", "/v2/health/live").status == 200
        assert fetch(one.http_port, "GET", "/v2/health/ready").status == 503


def test_load_test_ends_with_the_code_of_its_verdict(podman: Podman, tmp_path: Path) -> None:
    models, digest = repository(tmp_path, "onnxruntime")
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    server = podman.program("serve", *mounts(models))
    slo = f"--volume={K8S / 'config/slo.yaml'}:/etc/trimserve/slo.yaml:ro"
    command = [
        *podman.program("loadtest", slo, f"--volume={out}:/out"),
        "loadtest", "run", "/etc/trimserve/slo.yaml", "--model=linear", "--no-server-metrics",
        "--json=/out/report.json", "--warmup-s=0", "--duration-s=3",
    ]  # fmt: skip
    with running(tmp_path / "log", *arguments(digest), program=server) as one:
        told = [*command, f"--target=http://127.0.0.1:{one.http_port}"]
        code = subprocess.run(told, capture_output=True, timeout=PATIENCE_S, check=False).returncode
        report = json.loads((out / "report.json").read_text())
        assert code == {"met": 0, "violated": 1, "inconclusive": 3}[report["verdict"]]
        assert one.metric("trimserve_request_duration_seconds_count", code="ok") >= 20
    ended = subprocess.run(
        [*command, "--target=http://127.0.0.1:1"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr


@pytest.mark.parametrize("target", MAX_MB)
def test_image_is_not_larger_than_it_was(target: str, podman: Podman) -> None:
    sizes = [
        int(podman.run("image", "inspect", "--format={{.Size}}", one))
        for one in (image_of(target), BASE)
    ]
    assert sizes[0] - sizes[1] < MAX_MB[target] * 1_000_000


@pytest.mark.parametrize("target", MAX_MB)
def test_only_tmp_can_be_written(target: str, podman: Podman) -> None:
    script = (
        "import os, pathlib; pathlib.Path('/tmp/x').touch()\n"
        "[print(f) for f in ('/opt/trimserve/x', '/x', '/var/tmp/x', '/run/x') "
        "if os.access(os.path.dirname(f) or '/', os.W_OK)]"
    )
    assert asked(podman, target, script) == ""


@pytest.mark.parametrize("target", MAX_MB)
def test_list_of_packages_at_the_labels_path_is_what_is_installed(
    target: str, podman: Podman
) -> None:
    told = podman.run("inspect", "--format={{json .Config.Labels}}", image_of(target))
    script = (
        "import importlib.metadata as m, json, pathlib as p, sys; "
        "print(json.dumps([json.loads(p.Path(sys.argv[1]).read_text())['components'], "
        "[[one.name, one.version] for one in m.distributions()]]))"
    )
    listed, installed = json.loads(asked(podman, target, script, json.loads(told)[LABEL]))
    names = {(canonicalize_name(one["name"]), one["version"]) for one in listed}
    assert names == {(canonicalize_name(name), version) for name, version in installed}
    assert "trimserve" in dict(names)


@pytest.mark.parametrize("target", MAX_MB)
def test_image_holds_neither_pip_nor_the_builders_settings(target: str, podman: Podman) -> None:
    script = (
        "import importlib.util as u, pathlib as p; "
        "print([n for n in ('pip', 'setuptools', 'torch', 'huggingface_hub') if u.find_spec(n)], "
        "[f for f in ('/etc/pip.conf', '/etc/apt/sources.list', '/src') if p.Path(f).exists()])"
    )
    assert asked(podman, target, script) == "[] []"


@pytest.mark.parametrize("target", SERVERS)
def test_all_that_the_start_of_a_server_loads_is_compiled(target: str, podman: Podman) -> None:
    script = (
        "import os, sys, trimserve, serve.cli, serve.server, onnxruntime, tokenizers, s3fs\n"
        "kept = [getattr(one, '__cached__', None) or '' for one in sys.modules.values()]\n"
        "print([one for one in kept if 'site-packages' in one and not os.path.exists(one)])"
    )
    assert asked(podman, target, script) == "[]"
