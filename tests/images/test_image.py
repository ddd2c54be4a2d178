"""The image of the server as a node runs it: built, started without rights, asked, ended."""

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
from tests.images.podman import IMAGE, Podman, built
from tests.images.test_sbom import LABEL
from tests.k8s.kustomizations import K8S
from tests.k8s.resolved import resolved
from tests.k8s.test_manifests import server
from tests.serve import onnx_models
from tests.serve.onnx_models import linear_by_hand
from tests.serve.running_server import (
    PATIENCE_S,
    RunningServer,
    channel_to,
    fetch,
    method,
    running,
)
from tests.serve.versions import publish, rows

pytestmark = pytest.mark.full

X = rows(2)
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": X.tolist()}]}


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with built() as one:
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


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_image_serves_and_drains_without_rights_by_the_manifests_command(
    engine: str, podman: Podman, tmp_path: Path
) -> None:
    models, digest = repository(tmp_path, engine)
    program = podman.program(*mounts(models))
    with running(tmp_path / "log", *arguments(digest), program=program) as one:
        assert_answers(one)
        status = status_of(podman)
        assert (status["Uid"], status["Gid"]) == (" ".join(["10001"] * 4),) * 2
        assert (int(status["CapEff"], 16), status["NoNewPrivs"], status["Seccomp"]) == (0, "1", "2")
        one.terminate()
        assert one.wait() == 0, (tmp_path / "log").read_text()


def test_image_says_not_ready_when_the_digest_is_of_no_version(
    podman: Podman, tmp_path: Path
) -> None:
    models, _ = repository(tmp_path, "onnxruntime")
    program = podman.program(*mounts(models))
    told = arguments(f"sha256:{'0' * 64}")
    with running(tmp_path / "log", *told, program=program, event="not_ready") as one:
        assert fetch(one.http_port, "GET", "/v2/health/live").status == 200
        assert fetch(one.http_port, "GET", "/v2/health/ready").status == 503


def test_only_tmp_can_be_written(podman: Podman) -> None:
    script = (
        "import os, pathlib; pathlib.Path('/tmp/x').touch()\n"
        "[print(f) for f in ('/opt/trimserve/x', '/x', '/var/tmp/x', '/run/x') "
        "if os.access(os.path.dirname(f) or '/', os.W_OK)]"
    )
    program = podman.program("--entrypoint=/opt/trimserve/bin/python")
    ended = subprocess.run(
        [*program, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


def test_list_of_packages_at_the_labels_path_is_what_is_installed(podman: Podman) -> None:
    told = podman.run("inspect", "--format={{json .Config.Labels}}", IMAGE)
    script = (
        "import importlib.metadata as m, json, pathlib as p, sys; "
        "print(json.dumps([json.loads(p.Path(sys.argv[1]).read_text())['components'], "
        "[[one.name, one.version] for one in m.distributions()]]))"
    )
    program = podman.program("--entrypoint=/opt/trimserve/bin/python")
    ended = subprocess.run(
        [*program, "-c", script, json.loads(told)[LABEL]],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    listed, installed = json.loads(ended.stdout)
    names = {(canonicalize_name(one["name"]), one["version"]) for one in listed}
    assert names == {(canonicalize_name(name), version) for name, version in installed}
    assert "trimserve" in dict(names)


def test_image_holds_neither_pip_nor_the_builders_settings(podman: Podman) -> None:
    script = (
        "import importlib.util as u, pathlib as p; "
        "print([n for n in ('pip', 'setuptools', 'torch', 'locust') if u.find_spec(n)], "
        "[f for f in ('/etc/pip.conf', '/etc/apt/sources.list', '/src') if p.Path(f).exists()])"
    )
    program = podman.program("--entrypoint=/opt/trimserve/bin/python")
    ended = subprocess.run(
        [*program, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert ended.stdout.strip() == "[] []", ended.stderr
