"""What checkov finds in the manifests: nothing, but for what is passed over with a reason.

checkov wants a hundred packages in versions of its own, so it is installed apart.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from uv import find_uv_bin

from tests.k8s.kustomizations import APPLIED, COMPONENTS, written
from tests.k8s.resolved import resolved

pytestmark = pytest.mark.full

CHECKOV = "checkov==3.3.30"
MIN_REASON = 20
"""Characters, below which none is said."""


@pytest.fixture(scope="module")
def checkov(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkov")
    uv = find_uv_bin()
    run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
    run([uv, "pip", "install", "--quiet", "--python", str(folder), CHECKOV])
    return folder / "bin/checkov"


def run(command: Sequence[str], allowed: Sequence[int] = (0,)) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode in allowed, ended.stdout + ended.stderr
    return ended.stdout


BAD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "bad", "namespace": "default"},
    "spec": {
        "containers": [{"name": "a", "image": "a", "securityContext": {"privileged": True}}],
    },
}
"""So that a checkov that finds nothing is seen."""


@pytest.fixture(scope="module")
def results(checkov: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every document that is made anywhere, each once, and of a bad one: starting it is what
    takes long."""
    folder, made = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("made")
    documents = {
        json.dumps(one, sort_keys=True): one
        for name in (*APPLIED, *COMPONENTS)
        for one in resolved(written(name, folder))
    }
    for name, held in (("manifests", list(documents.values())), ("bad", [BAD])):
        text = yaml.safe_dump_all(held, sort_keys=False)
        (made / f"{name}.yaml").write_text(text)
    command = [str(checkov), "--directory", str(made), "--framework", "kubernetes"]
    command += ["--skip-download", "--output", "json", "--compact"]
    found: dict[str, Any] = json.loads(run(command, (0, 1)))["results"]
    assert not found["parsing_errors"]
    return found


def test_manifests_pass_but_for_what_is_passed_over_with_a_reason(results: dict[str, Any]) -> None:
    failed = {
        (one["resource"], one["check_id"], one["check_name"])
        for one in results["failed_checks"]
        if one["file_path"] == "/manifests.yaml"
    }
    assert not failed
    passed = {one["resource"] for one in results["passed_checks"]}
    assert {"Deployment.trimserve.serve", "StatefulSet.trimserve.postgres"} <= passed
    for one in results["skipped_checks"]:
        reason = one["check_result"]["suppress_comment"]
        assert len(reason) >= MIN_REASON, one["check_id"]


def test_a_pod_that_may_do_everything_fails(results: dict[str, Any]) -> None:
    failed = {
        one["check_id"] for one in results["failed_checks"] if one["file_path"] == "/bad.yaml"
    }
    assert {"CKV_K8S_16", "CKV_K8S_20", "CKV_K8S_22"} <= failed
