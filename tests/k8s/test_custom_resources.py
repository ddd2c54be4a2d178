"""Custom resources by models of their projects' CRDs, which npm has but for KServe's and
KubeRay's."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.kustomizations import APPLIED, COMPONENTS, written
from tests.k8s.resolved import Document, resolved
from tests.k8s.test_schemas import CUSTOM

pytestmark = pytest.mark.full

PACKAGES = (
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/gateway-api@2.0.0",
    "@kubernetes-models/argo-rollouts@2.0.0",
)
"""Under the MIT licence."""
MODELLED = CUSTOM - {"ray.io", "serving.kserve.io"}
SCRIPT = Path(__file__).with_name("custom_resources.mjs")
Validate = Callable[[list[Document]], list[list[str]]]


@pytest.fixture(scope="module")
def validate(tmp_path_factory: pytest.TempPathFactory) -> Validate:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("npm and node aren't there, by which custom resources are validated")
    folder = tmp_path_factory.mktemp("models")
    installing = [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit"]
    run([*installing, "--no-fund", "--loglevel=error", *PACKAGES], "")
    script = folder / SCRIPT.name
    shutil.copy(SCRIPT, script)

    def validated(documents: list[Document]) -> list[list[str]]:
        found: list[list[str]] = json.loads(run([node, str(script)], json.dumps(documents)))
        assert len(found) == len(documents)
        return found

    return validated


def run(command: list[str], given: str) -> str:
    ended = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_UPDATE_NOTIFIER": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def custom(name: str, folder: Path) -> list[Document]:
    documents = resolved(written(name, folder))
    return [one for one in documents if one["apiVersion"].partition("/")[0] in MODELLED]


def test_custom_resources_are_what_their_projects_define(
    validate: Validate, tmp_path: Path
) -> None:
    documents = [one for name in (*APPLIED, *COMPONENTS) for one in custom(name, tmp_path)]
    kinds = {one["kind"] for one in documents}
    assert {"PrometheusRule", "ServiceMonitor", "ScaledObject", "HTTPRoute", "GRPCRoute",
            "Rollout", "AnalysisTemplate"} <= kinds  # fmt: skip
    problems = {
        (one["kind"], text)
        for one, found in zip(documents, validate(documents), strict=True)
        for text in found
    }
    assert not problems


def changed(document: Document, way: tuple[str | int, ...], value: object) -> Document:
    made: Document = json.loads(json.dumps(document))
    place: Any = made
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    return made


@pytest.mark.parametrize(
    ("kind", "way", "value"),
    [
        pytest.param("ScaledObject", ("spec", "triggers"), None, id="what is required is missing"),
        pytest.param("ScaledObject", ("spec", "maxReplicaCount"), "20", id="a number is a text"),
        pytest.param("ScaledObject", ("spec", "maxReplicas"), 20, id="a field has another name"),
        pytest.param(
            "PrometheusRule", ("spec", "groups", 0, "rules", 0, "severity"), "page",
            id="a field is a level too high",
        ),
        pytest.param("ScaledObject", ("kind",), "ScaledThing", id="the kind is unknown"),
    ],
)  # fmt: skip
def test_validation_fails_when(
    kind: str, way: tuple[str | int, ...], value: object, validate: Validate, tmp_path: Path
) -> None:
    (document,) = [one for one in custom("keda", tmp_path) if one["kind"] == kind]
    ((*problems,),) = validate([changed(document, way, value)])
    assert problems
