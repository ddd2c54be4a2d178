"""What kubectl's kustomize makes of the manifests, beside what resolved.py reads them as."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.kustomizations import APPLIED, COMPONENTS, K8S, written
from tests.k8s.resolved import Document, containers, pods, resolved
from tests.k8s.test_schemas import NEWEST, validated


def kustomize(folder: Path) -> list[Document]:
    found_at = shutil.which("kubectl")
    if found_at is None:
        pytest.skip("kubectl isn't there, whose kustomize this compares with")
    ended = subprocess.run(
        [found_at, "kustomize", str(folder)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return [one for one in yaml.safe_load_all(ended.stdout) if one]


def key(document: Document) -> tuple[str, str]:
    """Kind and name; of ConfigMaps without the hash, which the reader in resolved.py leaves out."""
    name = document["metadata"]["name"]
    if document["kind"] == "ConfigMap":
        name = re.sub(r"-[a-z0-9]{10}$", "", name)
    return document["kind"], name


def without_hashes(document: Document, built: list[Document]) -> Document:
    """With the names of ConfigMaps as they are before kustomize appends the hash."""
    text = json.dumps(document)
    for one in built:
        if one["kind"] == "ConfigMap":
            text = text.replace(f'"{one["metadata"]["name"]}"', f'"{key(one)[1]}"')
    read: Document = json.loads(text)
    return read


def assert_same(built: list[Document], ours: list[Document]) -> None:
    """Every field but the order of lists of named things, which a strategic merge may change."""
    by_key = {key(one): one for one in ours}
    assert {key(one) for one in built} == set(by_key)
    for one in built:
        assert sorted_names(without_hashes(one, built)) == sorted_names(by_key[key(one)])


def sorted_names(value: object) -> object:
    if isinstance(value, dict):
        return {name: sorted_names(inner) for name, inner in value.items()}
    if isinstance(value, list):
        inner = [sorted_names(one) for one in value]
        named = all(isinstance(one, dict) and "name" in one for one in inner)
        return sorted(inner, key=lambda one: json.dumps(one, sort_keys=True)) if named else inner
    return value


@pytest.mark.parametrize("name", [*APPLIED, *COMPONENTS])
def test_kustomize_makes_what_is_read_here(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    built = kustomize(folder)
    assert_same(built, resolved(folder))
    for one in built:
        validated(json.dumps(one, sort_keys=True), NEWEST)


def test_images_are_pinned_by_the_documentations_kustomization(tmp_path: Path) -> None:
    text = (K8S.parent / "docs/kubernetes.md").read_text()
    (block,) = (
        one for one in re.findall(r"^```yaml\n(.+?)^```$", text, re.M | re.S) if "digest:" in one
    )
    digest = "0123456789abcdef" * 4
    service = os.path.relpath(K8S / "service", tmp_path)
    block = block.replace("[../service]", f"[{service}]").replace("DIGEST", digest)
    (tmp_path / "kustomization.yaml").write_text(block)
    images = {c["image"] for _, pod in pods(kustomize(tmp_path)) for c in containers(pod)}
    tag = {c["image"] for _, pod in pods(resolved(K8S / "service")) for c in containers(pod)}
    (postgres,) = (one for one in tag if one.startswith("postgres:"))
    assert images == tag - {postgres} | {f"{postgres}@sha256:{digest}"}


@pytest.mark.parametrize("name", APPLIED)
def test_config_maps_that_pods_name_are_those_with_the_hash(name: str, tmp_path: Path) -> None:
    built = kustomize(written(name, tmp_path))
    names = {one["metadata"]["name"] for one in built if one["kind"] == "ConfigMap"}
    for _, pod in pods(built):
        used = [v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v]
        used += [
            source["configMapRef"]["name"]
            for container in containers(pod)
            for source in container.get("envFrom", ())
            if "configMapRef" in source
        ]
        assert set(used) <= names
