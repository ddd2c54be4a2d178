"""A study small enough for tests: a network of two convolutions that is right by definition,
since the labels are its own answers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from loadtest.slo import Slo
from optimizer.result import Verification
from optimizer.spec import Spec, read_spec
from optimizer.timing import Effort
from optimizer.verify import Candidate

QUICK = Effort(
    min_passes=3, max_passes=3, seconds=0.0, max_warmup_passes=1, max_warmup_s=0.1, max_retries=0
)

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )
"""

SLO = """
apiVersion: trimserve/v1
kind: SLO
name: tiny
latency: {{quantile: 0.99, threshold_ms: {threshold_ms}}}
workload: {{rate_per_s: 50}}
window_s: 6
accuracy: {{max_drop_points: {max_drop_points}, confidence: 0.9}}
"""

SPEC = """
apiVersion: trimserve/v1
kind: Optimization
name: tiny
slo: slo.yaml
model:
  factory: tiny:build
  weights: tiny.safetensors
  inputs: [{name: image, shape: [1, 8, 8]}]
  outputs: [{name: logits}]
data:
  format: numpy
  train: {path: train.npz}
  validation: {path: validation.npz}
  test: {path: test.npz}
  n_classes: 4
  calibration_samples: 16
techniques: {exclude: [torch_compilation]}
budget: {wall_clock_s: 600, trials: 3}
target: {price_per_core_hour: 0.04}
"""


def write_study(
    directory: Path, *, threshold_ms: float = 1000.0, max_drop_points: float = 20.0
) -> Path:
    """Write the files of a study to `directory`; returns the spec's path."""
    network = build_network()
    save_file(network.state_dict(), directory / "tiny.safetensors")
    rng = np.random.default_rng(0)
    for name, n in (("train", 64), ("validation", 96), ("test", 48)):
        images = rng.normal(size=(n, 1, 8, 8)).astype(np.float32)
        with torch.inference_mode():
            labels = network(torch.from_numpy(images)).argmax(dim=1).numpy()
        np.savez(directory / f"{name}.npz", image=images, label=labels)
    (directory / "tiny.py").write_text(NETWORK)
    slo = SLO.format(threshold_ms=threshold_ms, max_drop_points=max_drop_points)
    (directory / "slo.yaml").write_text(slo)
    path = directory / "spec.yaml"
    path.write_text(SPEC)
    return path


def build_network() -> nn.Module:
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    build = scope["build"]
    assert callable(build)
    torch.manual_seed(0)
    network: nn.Module = build()
    with torch.no_grad():  # as trained: running statistics that aren't 0 and 1
        network(torch.randn(256, 1, 8, 8))
        # The classes' logits are centred, so that every class occurs.
        network.eval()
        final = network[-1]
        final.weight *= 20
        final.bias -= network(torch.randn(512, 1, 8, 8)).mean(dim=0)
    return network


def spec_with(path: Path, *, trials: int) -> Spec:
    spec = read_spec(path)
    budget = spec.budget.model_copy(update={"trials": trials})
    return replace(spec, budget=budget)


class FakeVerifier:
    """Gives the verdicts it was told to, by engine and precision; met for all others."""

    def __init__(self, verdicts: Mapping[tuple[str, str], Verification] | None = None) -> None:
        self.verdicts = verdicts or {}
        self.candidates: list[Candidate] = []

    def verify(self, candidate: Candidate, slo: Slo) -> Verification:
        self.candidates.append(candidate)
        engine = candidate.manifest.engine
        return self.verdicts.get((engine.name, engine.precision), Verification("met"))
