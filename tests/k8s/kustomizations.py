"""Every kustomization that is there: what is applied, and components on what they need."""

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
COMPONENTS: dict[str, tuple[str, Sequence[str]]] = {
    "keda": ("base", ("monitoring", "keda", "slo")),
    "prometheus-adapter": ("base", ("monitoring", "prometheus-adapter", "slo")),
    "gateway": ("base", ("gateway",)),
    "canary": ("base", ("monitoring", "gateway", "canary", "slo")),
    "models-s3": ("base", ("models-s3",)),
    "models-oci": ("base", ("models-oci",)),
    "models-pvc": ("base", ("models-pvc",)),
    "monitoring": ("base", ("monitoring",)),
    "slo": ("base", ("monitoring", "slo")),
    "service-monitoring": ("service", ("service-monitoring",)),
    "ray": ("service", ("ray",)),
    "gpu": ("base", ("gpu",)),
    "mig": ("base", ("mig",)),
    "kserve": ("config", ("kserve",)),
}
"""Component -> the folder below it, and the components with it, in their order."""
APPLIED = (
    "base", "overlays/dev", "overlays/cpu", "overlays/gpu", "service", "jobs/loadtest",
    "jobs/loadtest-distributed", "jobs/optimize", "jobs/tools", "jobs/files",
)  # fmt: skip


def written(name: str, folder: Path, slo: Path = K8S / "components/slo") -> Path:
    """A folder for kustomize to render: that of what is applied, or `folder`, where a
    kustomization with the component is written; with `slo` as the component slo."""
    if name in APPLIED:
        return K8S / name
    below, components = COMPONENTS[name]
    of = {"slo": slo}
    paths = [os.path.relpath(of.get(one, K8S / "components" / one), folder) for one in components]
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization"]
    lines += ["namespace: trimserve", f"resources: [{os.path.relpath(K8S / below, folder)}]"]
    lines += ["components:", *(f"  - {one}" for one in paths)]
    folder.joinpath("kustomization.yaml").write_text("\n".join(lines) + "\n")
    return folder
