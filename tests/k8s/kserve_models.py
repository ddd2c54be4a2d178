"""KServe's resources by the models of its own Python package, which are read and not run."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

PLAIN = {"str": str, "int": int, "bool": bool}
ROOTS = {"ServingRuntime": "V1alpha1ServingRuntimeSpec",
         "InferenceService": "V1beta1InferenceServiceSpec"}  # fmt: skip


def faults(models: Path, document: dict[str, Any]) -> list[str]:
    """What `document`'s spec has that the models in that folder don't allow: unknown fields, and
    values of another type. What is Kubernetes' own in it is taken as it is."""
    return list(_faults(models, ROOTS[document["kind"]], document["spec"], "spec"))


def _faults(models: Path, kind: str, value: Any, where: str) -> list[str]:
    if listed := re.fullmatch(r"list\[(\w+)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: got {value!r}, want a list"]
        each = [_faults(models, listed[1], v, f"{where}[{n}]") for n, v in enumerate(value)]
        return [fault for found in each for fault in found]
    if kind in PLAIN:
        right = type(value) is PLAIN[kind]
        return [] if right else [f"{where}: got {value!r}, want {kind}"]
    fields = _fields(models).get(kind)
    if fields is None:  # of Kubernetes, or a mapping
        return []
    if not isinstance(value, dict):
        return [f"{where}: got {value!r}, want a mapping"]
    unknown = [f"{where}.{name}: unknown" for name in value if name not in fields]
    below = [
        _faults(models, fields[name], one, f"{where}.{name}")
        for name, one in value.items()
        if name in fields
    ]
    return unknown + [fault for found in below for fault in found]


@cache
def _fields(models: Path) -> dict[str, dict[str, str]]:
    """Class -> field as documents have it -> its type."""
    found = {}
    for path in models.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                constants = {
                    one.targets[0].id: ast.literal_eval(one.value)
                    for one in node.body
                    if isinstance(one, ast.Assign)
                    and isinstance(one.targets[0], ast.Name)
                    and one.targets[0].id in ("openapi_types", "attribute_map")
                }
                if len(constants) == 2:
                    names, types = constants["attribute_map"], constants["openapi_types"]
                    found[node.name] = {names[one]: types[one] for one in types}
    return found
