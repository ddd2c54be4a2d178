"""The optimizer's image without CUDA: built, and run on a small study as the Job of the manifests.

Takes minutes and 6 GB of disk, so only `make image-optimizer` runs it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.images.podman import Podman, built, run, torch_page
from tests.k8s.kustomizations import K8S, ROOT
from tests.k8s.resolved import containers, pods, resolved

TARGET = "optimizer-cpu"
WANTED = "TRIMSERVE_IMAGE_OPTIMIZER"
TIMEOUT_S = 900
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(WANTED not in os.environ, reason="takes minutes: make image-optimizer"),
]


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with built() as one:
        one.build(TARGET, *torch_page())
        yield one


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The digits, held to an SLO that any machine keeps, with two trials."""
    folder = tmp_path / "study"
    shutil.copytree(ROOT / "examples/digits", folder)
    run([sys.executable, str(folder / "train.py"), "--out", str(folder)])
    spec = yaml.safe_load((folder / "spec.yaml").read_text())
    spec["slo"] = "/etc/trimserve/slo.yaml"
    spec["budget"] = {"wall_clock_s": 400, "trials": 2}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    slo = yaml.safe_load((folder / "slo.yaml").read_text())
    slo["latency"]["threshold_ms"] = 5000
    slo["workload"]["rate_per_s"] = 20
    (folder / "slo.yaml").write_text(yaml.safe_dump(slo | {"window_s": 20}))
    return folder


def test_image_finishes_a_study_by_the_jobs_command(
    podman: Podman, study: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for path in (tmp_path, models, study, *study.rglob("*")):
        path.chmod(0o777)
    ((_, job),) = pods(resolved(K8S / "jobs/optimize"))
    (container,) = containers(job)
    volumes = {study: "/study", models: "/models", study / "slo.yaml": "/etc/trimserve/slo.yaml"}
    program = podman.program(TARGET, *(f"--volume={one}:{at}" for one, at in volumes.items()))
    ended = subprocess.run(
        [*program, *container["args"]],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads((study / "result.json").read_text())
    assert (study / "report.html").read_text().startswith("<!")
    (version,) = (models / "digits").glob("*/manifest.json")
    assert version.stat().st_uid == 10001


def test_image_has_the_command_and_no_library_of_cuda(podman: Podman) -> None:
    script = (
        "import importlib.metadata as m, torch; print(torch.version.cuda, "
        "[one.name for one in m.distributions() if one.name.startswith(('nvidia', 'cuda'))])"
    )
    program = podman.program(TARGET, "--entrypoint=/opt/trimserve/bin/python")
    assert run([*program, "-c", script]).decode().strip() == "None []"
    assert b"Find the cheapest variant" in run([*podman.program(TARGET), "optimize", "--help"])
