"""The whole loop by the public commands, on a network trained here: minutes, not seconds.

The SLO is so loose that only a defect breaks it: whether the demo's own is met is measured by
`make demo`, since a busy machine may say no.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from serve.artifact import read_golden, read_manifest
from serve.engines import load_engine
from tests.serve.running_server import HOST, running

pytestmark = [pytest.mark.full, pytest.mark.alone]

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
TIMEOUT_S = 900.0
SLO = {
    "apiVersion": "trimserve/v1",
    "kind": "SLO",
    "name": "loose",
    "latency": {"quantile": 0.9, "threshold_ms": 2000},
    "workload": {"rate_per_s": 40},
    "success_ratio": 0.9,
    "window_s": 10,
    "accuracy": {"max_drop_points": 5},
}


def test_loop_publishes_a_verified_variant_that_the_server_answers_with(tmp_path: Path) -> None:
    for name in ("model.py", "train.py", "spec.yaml"):
        shutil.copy(DIGITS / name, tmp_path)
    (tmp_path / "slo.yaml").write_text(json.dumps(SLO))
    spec = (tmp_path / "spec.yaml").read_text()
    assert "trials: 12" in spec
    (tmp_path / "spec.yaml").write_text(spec.replace("trials: 12", "trials: 5"))
    run(tmp_path, "train.py")

    models = tmp_path / "models"
    reports = ("--json", "study.json", "--html", "study.html")
    arguments = ("spec.yaml", "--repository", "models", "--store", "store.sqlite", *reports)
    run(tmp_path, "-m", "trimserve", "optimize", *arguments)

    study = json.loads((tmp_path / "study.json").read_text())
    assert study["outcome"] == "met"
    assert (tmp_path / "study.html").read_text().startswith("<!doctype html>")
    version = models / "digits" / "1"
    manifest = read_manifest(version)
    assert manifest.slo is not None
    assert manifest.slo["name"] == "loose"
    assert manifest.quality is not None
    assert manifest.quality.drop_bound <= 0.05
    check_clients_get_the_engine_s_numbers(tmp_path, models, version)


def check_clients_get_the_engine_s_numbers(folder: Path, models: Path, version: Path) -> None:
    manifest = read_manifest(version)
    assert manifest.golden is not None
    images = read_golden(version / manifest.golden.file)[0]["image"].astype(np.float32)
    engine = load_engine(version, manifest.engine)
    want = engine.run({"image": images})["logits"]
    engine.close()
    with running(folder / "log", "--repository", str(models)) as server:
        for module, port in (
            (tritonclient.http, server.http_port),
            (tritonclient.grpc, server.grpc_port),
        ):
            client = module.InferenceServerClient(f"{HOST}:{port}")
            given = module.InferInput("image", list(images.shape), "FP32")
            given.set_data_from_numpy(images)
            got = client.infer("digits", [given]).as_numpy("logits")
            client.close()
            np.testing.assert_array_equal(got, want)


def run(folder: Path, *arguments: str) -> None:
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
