"""Resources of Kubernetes itself, strictly by its schemas."""

import json
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions, major_minor

from tests.k8s.kustomizations import APPLIED, COMPONENTS, K8S, written
from tests.k8s.resolved import Document, ray_pods, resolved

OLDEST, NEWEST = "1.32", major_minor(all_versions()[-1])
SUPPORTED = [v for v in map(major_minor, all_versions()) if int(v.split(".")[1]) >= 32]
CUSTOM = {"argoproj.io", "gateway.networking.k8s.io", "keda.sh", "monitoring.coreos.com",
          "ray.io", "serving.kserve.io"}  # fmt: skip
"""Groups that Kubernetes has no schemas for: their resources are read for meaning alone."""


@cache
def validated(text: str, version: str) -> None:
    """Raises for what the schemas of that version don't know, unknown kinds included."""
    document = json.loads(text)
    if document["apiVersion"].partition("/")[0] not in CUSTOM:
        assert kubernetes_validate.validate(document, version, strict=True) == version


def pod_of(runtime: Document) -> Document:
    """A pod of KServe's runtime, so that Kubernetes' schemas judge what is in it."""
    spec = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": spec}


@pytest.mark.parametrize(
    "version",
    [
        version if version in (OLDEST, NEWEST) else pytest.param(version, marks=pytest.mark.full)
        for version in SUPPORTED
    ],
)
@pytest.mark.parametrize("name", [*APPLIED, *COMPONENTS])
def test_documents_are_valid_strictly(name: str, version: str, tmp_path: Path) -> None:
    documents = resolved(written(name, tmp_path))
    documents += [pod_of(one) for one in documents if one["kind"] == "ServingRuntime"]
    documents += [
        {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": name}}
        for one in documents
        for name, template in ray_pods(one).items()
    ]
    for one in documents:
        validated(json.dumps(one, sort_keys=True), version)


def test_every_component_is_validated() -> None:
    there = {path.parent.name for path in K8S.glob("components/*/kustomization.yaml")}
    assert there == set(COMPONENTS)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"spec": {"colour": "red"}}, id="a field is unknown"),
        pytest.param({"apiVersion": "autoscaling/v2beta2"}, id="the version is gone"),
        pytest.param({"kind": "Deploiment"}, id="the kind is unknown"),
    ],
)
def test_validation_fails_when(change: Document) -> None:
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}} | change
    with pytest.raises(
        (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
    ):
        validated(json.dumps(document), NEWEST)
