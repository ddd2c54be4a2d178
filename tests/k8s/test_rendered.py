"""What kustomize itself makes of the manifests, judged by programs of other projects.

`.ci/tools` installs them; a test whose program isn't there is skipped and says so.
"""

import copy
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.kserve_models import faults
from tests.k8s.kustomizations import APPLIED, COMPONENTS, ROOT, written
from tests.k8s.resolved import Document, found, resolved
from tests.k8s.test_schemas import CUSTOM, SUPPORTED, pod_of, validated

pytestmark = pytest.mark.full
TOOLS = ROOT / "build" / "tools"
OF_KSERVE = "serving.kserve.io"


def program(name: str) -> str:
    path = TOOLS / "bin" / name
    if not path.exists():
        pytest.skip(f"{name} isn't installed: run .ci/tools")
    return str(path)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Document]]:
    """Name -> the documents that `kubectl kustomize` makes."""
    kubectl = program("kubectl")
    made = {}
    for name in (*APPLIED, *COMPONENTS):
        folder = written(name, tmp_path_factory.mktemp("kustomization"))
        ended = subprocess.run(
            [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{name}: {ended.stderr}"
        assert not ended.stderr, f"{name}: {ended.stderr}"  # fields that are deprecated
        made[name] = list(yaml.safe_load_all(ended.stdout))
    return made


def custom(rendered: dict[str, list[Document]]) -> Iterator[Document]:
    """Resources that Kubernetes has no schemas for, each once."""
    seen = set()
    for documents in rendered.values():
        for one in documents:
            key = json.dumps(one, sort_keys=True)
            if one["apiVersion"].partition("/")[0] in CUSTOM and key not in seen:
                seen.add(key)
                yield one


def test_rendered_documents_are_valid_strictly_from_the_oldest_version_to_the_newest(
    rendered: dict[str, list[Document]],
) -> None:
    for documents in rendered.values():
        pods = [pod_of(one) for one in documents if one["kind"] == "ServingRuntime"]
        for one in [*documents, *pods]:
            for version in SUPPORTED:
                validated(json.dumps(one, sort_keys=True), version)


def without_hashes(text: str, maps: list[Document]) -> str:
    """Names of generated ConfigMaps as they were before kustomize put a hash at their ends."""
    for name in (one["metadata"]["name"] for one in maps if one["kind"] == "ConfigMap"):
        text = text.replace(f'"{name}"', f'"{name.rpartition("-")[0]}"')
    return text


@pytest.mark.parametrize("name", [*APPLIED, *COMPONENTS])
def test_own_resolver_makes_what_kustomize_makes(
    name: str, rendered: dict[str, list[Document]], tmp_path: Path
) -> None:
    """So that what the quick tests say of the one holds for the other."""
    text = without_hashes(json.dumps(rendered[name]), rendered[name])
    own = json.loads(json.dumps(resolved(written(name, tmp_path))))

    def by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
        return {(one["kind"], one["metadata"]["name"]): one for one in documents}

    ours, theirs = by_name(own), by_name(json.loads(text))
    assert set(ours) == set(theirs)
    for key, one in ours.items():
        assert ordered(one) == ordered(theirs[key]), key


def ordered(value: Any) -> Any:
    """Lists of named things by their names: kustomize puts what is patched in at the front."""
    if isinstance(value, dict):
        return {name: ordered(one) for name, one in value.items()}
    if isinstance(value, list):
        items = [ordered(one) for one in value]
        named = all(isinstance(one, dict) and "name" in one for one in items)
        return sorted(items, key=lambda one: str(one["name"])) if named else items
    return value


def judged(documents: list[Document]) -> subprocess.CompletedProcess[str]:
    script = TOOLS / "crds" / "validate.mjs"
    if not (TOOLS / "crds" / "node_modules").exists():
        pytest.skip("the models of custom resources aren't installed: run .ci/tools, with npm")
    return subprocess.run(
        ["node", str(script)],
        input=json.dumps(documents), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_custom_resources_are_as_their_definitions_want_them(
    rendered: dict[str, list[Document]],
) -> None:
    documents = [one for one in custom(rendered) if OF_KSERVE not in one["apiVersion"]]
    kinds = {"HTTPRoute", "GRPCRoute", "ScaledObject", "Rollout", "AnalysisTemplate",
             "ServiceMonitor", "PrometheusRule"}  # fmt: skip
    assert kinds <= {one["kind"] for one in documents}
    ended = judged(documents)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_custom_resources_with_a_fault_are_refused(rendered: dict[str, list[Document]]) -> None:
    (scaled,) = [one for one in rendered["keda"] if one["kind"] == "ScaledObject"]
    unknown, out_of_type = copy.deepcopy(scaled), copy.deepcopy(scaled)
    unknown["spec"]["triggers"][0]["colour"] = "red"
    out_of_type["spec"]["maxReplicaCount"] = "many"
    for one in (unknown, out_of_type):
        ended = judged([one])
        assert ended.returncode == 1, ended.stderr
        assert "colour" in ended.stdout or "maxReplicaCount" in ended.stdout


def test_kserves_resources_are_as_its_models_want_them(
    rendered: dict[str, list[Document]],
) -> None:
    models = TOOLS / "kserve" / "kserve" / "models"
    if not models.exists():
        pytest.skip("kserve isn't installed: run .ci/tools")
    documents = [one for one in custom(rendered) if OF_KSERVE in one["apiVersion"]]
    assert {one["kind"] for one in documents} == {"ServingRuntime", "InferenceService"}
    for one in documents:
        assert faults(models, one) == []
    service = copy.deepcopy(found(rendered["kserve"], "InferenceService", "trimserve"))
    service["spec"]["predictor"] |= {"colour": "red", "maxReplicas": "many"}
    assert len(faults(models, service)) == 2


def test_checkov_finds_nothing_that_isnt_explained(
    rendered: dict[str, list[Document]], tmp_path: Path
) -> None:
    """Explained is what an annotation `checkov.io/skipN: CHECK=reason` names."""
    checkov = program("checkov")
    for name, documents in rendered.items():
        tmp_path.joinpath(f"{name.replace('/', '-')}.yaml").write_text(
            yaml.safe_dump_all(documents)
        )
    tmp_path.joinpath("Dockerfile").write_bytes(ROOT.joinpath("Dockerfile").read_bytes())
    ended = subprocess.run(
        [checkov, "--directory", str(tmp_path), "--framework", "kubernetes", "dockerfile",
         "--output=json", "--compact", "--quiet", "--skip-download"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    reports = json.loads(ended.stdout)
    failed = {
        (one["check_id"], one["check_name"], one["resource"])
        for report in reports
        for one in report["results"]["failed_checks"]
    }
    assert {report["check_type"] for report in reports} == {"kubernetes", "dockerfile"}
    assert sum(report["summary"]["passed"] for report in reports) > 500
    assert not failed, "\n".join(map(str, sorted(failed)))


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    ended = subprocess.run(
        [program("hadolint"), "--config", ".hadolint.yaml", "Dockerfile"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
