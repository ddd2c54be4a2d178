"""Where variants come from: their recipes as a tree, steps that several share drawn once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimizer.service.page.findings import Finding


@dataclass
class Branch:
    """A step, the variants that end with it, and what goes on from it."""

    technique: str
    parameters: Mapping[str, Any]
    variants: list[Finding] = field(default_factory=list)
    branches: list["Branch"] = field(default_factory=list)


def lineage(found: Sequence[Finding], model: str) -> Branch:
    """The base model is the root. Steps are the same where technique, parameters and seed are."""
    root = Branch(model, {})
    for one in found:
        branch = root
        for step in one.recipe:
            branch = _branch(branch, step)
        branch.variants.append(one)
    return root


def _branch(parent: Branch, step: Mapping[str, Any]) -> Branch:
    technique = str(step.get("technique", ""))
    parameters = {**dict(step.get("parameters") or {}), "seed": step.get("seed", 0)}
    for branch in parent.branches:
        if (branch.technique, branch.parameters) == (technique, parameters):
            return branch
    branch = Branch(technique, parameters)
    parent.branches.append(branch)
    return branch
