"""Kustomizations read the way these manifests use them: resources, components, ConfigMaps that are
generated, patches, images, replicas.

Not kustomize: names get no prefix and no suffix of a hash, and what isn't known here is refused.
"""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
KNOWN = {
    "apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator", "patches",
    "images", "replicas",
}  # fmt: skip


def resolved(folder: Path) -> list[Document]:
    """All documents of a kustomization, patched. Raises ValueError for fields unknown here."""
    return _apply(folder, [])


def _apply(folder: Path, documents: list[Document]) -> list[Document]:
    """`documents` and what the kustomization in `folder` adds to them, changed as it says."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(wanted) - KNOWN:
        raise ValueError(f"{folder}: got {sorted(unknown)}, want {sorted(KNOWN)}")
    for name in wanted.get("resources", ()):
        path = folder / name
        documents = documents + (resolved(path) if path.is_dir() else list(_documents(path)))
    for generated in wanted.get("configMapGenerator", ()):
        documents = _with_config_map(documents, _config_map(folder, generated), generated)
    for name in wanted.get("components", ()):
        documents = _apply((folder / name).resolve(), documents)
    for patch in wanted.get("patches", ()):
        _patch(folder, patch, documents)
    for count in wanted.get("replicas", ()):
        found(documents, "Deployment", count["name"])["spec"]["replicas"] = count["count"]
    for image in wanted.get("images", ()):
        holders = [pod for _, pod in pods(documents)]
        holders += [one for one in documents if one["kind"] == "ServingRuntime"]
        holders += [pod for one in documents for pod in ray_pods(one).values()]
        for container in (c for holder in holders for c in containers(holder)):
            _rename(container, image)
    for document in documents if "namespace" in wanted else ():
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = wanted["namespace"]
    return documents


def _documents(path: Path) -> Iterator[Document]:
    """Copies, since they are changed where they are used."""
    yield from copy.deepcopy(_parsed(path.resolve()))


@cache
def _parsed(path: Path) -> list[Document]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def _config_map(folder: Path, wanted: Document) -> Document:
    data = {name: (folder / name).read_text() for name in wanted.get("files", ())}
    for name in wanted.get("envs", ()):
        lines = (folder / name).read_text().splitlines()
        data |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    data |= dict(one.split("=", 1) for one in wanted.get("literals", ()))
    options = wanted.get("options", {})
    if unknown := set(options) - {"disableNameSuffixHash", "labels"}:
        raise ValueError(f"{folder}: got options {sorted(unknown)}")
    labels = {"labels": options["labels"]} if "labels" in options else {}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": wanted["name"], **labels},
        "data": data,
    }


def _with_config_map(documents: list[Document], made: Document, wanted: Document) -> list[Document]:
    behavior = wanted.get("behavior", "create")
    if behavior == "create":
        return [*documents, made]
    old = found(documents, "ConfigMap", wanted["name"])
    if old["metadata"].get("namespace") != wanted.get("namespace"):  # as kustomize has it
        raise ValueError(f"ConfigMap {wanted['name']}: no such one in {wanted.get('namespace')}")
    before = {"merge": old["data"], "replace": {}}[behavior]
    old["data"] = before | made["data"]
    return documents


def _rename(container: Document, image: Document) -> None:
    name, _, tag = container["image"].partition(":")
    if name == image["name"]:
        tag = image.get("newTag", tag)
        container["image"] = image.get("newName", name) + (f":{tag}" if tag else "")


def _patch(folder: Path, patch: Document, documents: list[Document]) -> None:
    if "path" in patch and "target" not in patch:
        for change in _documents(folder / patch["path"]):
            target = found(documents, change["kind"], change["metadata"]["name"])
            merged = merge(target, change)
            target.clear()
            target.update(merged)
        return
    wanted = (patch["target"]["kind"], patch["target"]["name"])
    if "path" in patch:
        text = (folder / patch["path"]).read_text()
        if wanted not in {(one["kind"], one["metadata"]["name"]) for one in documents}:
            return  # kustomize passes over them
    else:
        text = patch["patch"]
    target = found(documents, *wanted)
    for step in yaml.safe_load(text):
        if step["op"] not in ("replace", "remove"):
            raise ValueError(f"{folder}: got {step['op']!r}, want replace or remove")
        *way, last = (int(k) if k.isdigit() else k for k in step["path"].strip("/").split("/"))
        place: Any = target
        for key in way:
            place = place[key]
        place[last]  # what isn't there can't be replaced
        if step["op"] == "remove":
            del place[last]
        else:
            place[last] = step["value"]


def merge(old: Any, new: Any) -> Any:
    """A strategic merge: mappings by key, lists of named things by name, other lists replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merge(old.get(key), value) for key, value in new.items()}
    if isinstance(new, list) and new and all(isinstance(v, dict) and "name" in v for v in new):
        before = {one["name"]: one for one in old or ()}
        return [*(before | {v["name"]: merge(before.get(v["name"]), v) for v in new}).values()]
    return copy.deepcopy(new)


def found(documents: list[Document], kind: str, name: str) -> Document:
    """The one document of that kind and name. Raises ValueError where there isn't exactly one."""
    (one,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return one


def pods(documents: list[Document]) -> list[tuple[Document, Document]]:
    """(workload, its pod template) of every Deployment, StatefulSet and Job."""
    workloads = [d for d in documents if d["kind"] in ("Deployment", "StatefulSet", "Job")]
    return [(one, one["spec"]["template"]) for one in workloads]


def ray_pods(document: Document) -> dict[str, Document]:
    """Group -> its pod template, of a RayCluster; of others none."""
    if document["kind"] != "RayCluster":
        return {}
    spec = document["spec"]
    groups = {"head": spec["headGroupSpec"]}
    groups |= {one["groupName"]: one for one in spec["workerGroupSpecs"]}
    return {name: one["template"] for name, one in groups.items()}


def containers(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
