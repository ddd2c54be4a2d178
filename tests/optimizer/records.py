"""A store in memory and a repository on disk, as the commands that read them see both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from optimizer import fusion, judgement, kernels, timing
from optimizer.kernels import KernelProof
from optimizer.result import Fusion, InstanceTimes
from optimizer.store import StoredVariant
from optimizer.tasks import Scores
from optimizer.timing import Timing
from optimizer.variant import EngineModel, OnnxModel
from serve.artifact import Batching, Golden, Manifest, Profile, Step, write_version
from serve.engines import EngineSpec, Signature
from serve.machine import Machine
from serve.tensor import TensorSpec
from tests.optimizer.study_result import SLO, met

BASE_ID = "ba5e" * 16
DATA = "d" * 64
FUSIONS = (
    Fusion(("Conv", "Relu"), "brgconv_avx2_f32", "fp32", 3, 0.003, 0.002),
    Fusion((), "reorder_f32", "fp32", 2, 0.0, 0.001),
)


@dataclass(frozen=True)
class FakeRecords:
    """Variants by id, and measurements as (metric, protocol version, id, serving, value)."""

    variants: Mapping[str, StoredVariant] = field(default_factory=dict)
    measured: Sequence[tuple[str, int, str, Mapping[str, object], Any]] = ()

    def find(self, variant_id: str) -> StoredVariant | None:
        return self.variants.get(variant_id)

    def lineage(self, variant_id: str) -> tuple[StoredVariant, ...]:
        line = []
        while variant_id in self.variants:
            line.append(self.variants[variant_id])
            variant_id = line[-1].parent_id
        return tuple(line)

    def resolve(self, prefix: str) -> list[str]:
        return sorted(one for one in self.variants if one.startswith(prefix.lower()))

    def values(
        self, metric: str, protocol_version: int, machine: Machine | None = None
    ) -> tuple[tuple[str, Mapping[str, object], Any], ...]:
        return tuple(
            (owner, serving, value)
            for name, version, owner, serving, value in self.measured
            if (name, version) == (metric, protocol_version)
        )


def stored(variant_id: str, parent_id: str, step: Step, directory: Path) -> StoredVariant:
    """Export gives ONNX, all else an engine's files."""
    directory.mkdir(exist_ok=True)
    (directory / "model.onnx").write_bytes(b"0" * 1000)
    digest = variant_id[:4] * 16
    model = (
        OnnxModel(directory, "model.onnx", digest)
        if step.technique == "export"
        else EngineModel(directory, EngineSpec("openvino", "model.onnx", "fp32"), digest)
    )
    return StoredVariant(variant_id, parent_id, step, DATA, model, 1.5)


def two_variants(directory: Path) -> FakeRecords:
    """`aaaa…` and `aabb…`, compiled for OpenVINO from one export, timed and scored: the second
    takes half the time and gets one of four samples wrong."""
    export = Step("export", "1", {"opset": 20}, 0, {"torch": "2.13.0"})
    first, second = "aaaa" * 16, "aabb" * 16
    compiled = [Step("compilation", "1", {"engine": "openvino", "hint": h}, 0) for h in "xy"]
    variants = [
        stored("e" * 64, BASE_ID, export, directory / "e"),
        stored(first, "e" * 64, compiled[0], directory / "a"),
        stored(second, "e" * 64, compiled[1], directory / "b"),
    ]
    measured: list[tuple[str, int, str, Mapping[str, object], Any]] = []
    for owner, scale, correct in (
        (first, 1.0, [True, True, True, True]),
        (second, 0.5, [True, True, True, False]),
    ):
        [row] = met().variants[:1]
        times = tuple(replace(t, p50_s=t.p50_s * scale) for t in row.service_times[0].times)
        timed = Timing(InstanceTimes(1, 2, times), None).to_dict()
        proof = KernelProof(scale, 4, 4, row.kernels).to_dict()
        scores = Scores(np.array(correct)).to_dict()
        measured += [
            ("timing", timing.PROTOCOL_VERSION, owner, {}, timed),
            ("kernels", kernels.PROTOCOL_VERSION, owner, {}, proof),
            ("scores", judgement.PROTOCOL_VERSION, owner, {"split": DATA}, scores),
        ]
    fused = [asdict(one) for one in FUSIONS]
    measured.append(("fusion", fusion.PROTOCOL_VERSION, first, {}, fused))
    return FakeRecords({one.id: one for one in variants}, measured)


def publish(repository: Path, version: str, **changes: Any) -> Manifest:
    """The chosen variant of the test's study as a version of the model `digits`."""
    chosen = met().chosen
    assert chosen is not None
    assert chosen.serving is not None
    source = repository.parent / "model.bin"
    source.write_bytes(b"0" * 2000)
    tensor = TensorSpec("x", "FP32", (-1, 4))
    manifest = Manifest(
        model="digits",
        version=version,
        signature=Signature((tensor,), (tensor,)),
        engine=EngineSpec("openvino", "model.bin", "int8", threads=2),
        batching=Batching(8),
        variant_id=chosen.id,
        parent_id="1" * 64,
        recipe=chosen.recipe,
        quality=chosen.quality,
        profile=Profile(chosen.service_times[0].times, met().machine),
        slo=SLO.to_dict(),
        golden=Golden("golden.npz", 1e-3),
        made_by=("trimserve", "optimize", "my spec.yaml", "--repository", "models"),
        evidence={"verification": asdict(chosen.verification) if chosen.verification else None,
                  "serving": asdict(chosen.serving)},
    )  # fmt: skip
    manifest = replace(manifest, **changes)
    write_version(repository, manifest, {"model.bin": source, "golden.npz": source})
    return manifest
