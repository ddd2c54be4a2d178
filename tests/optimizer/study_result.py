"""A study's result as the tests of its report see it."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from loadtest.slo import Slo
from optimizer.ablation import ablations
from optimizer.result import (
    BudgetUsed,
    InstanceTimes,
    KernelShare,
    Layer,
    Prediction,
    Reason,
    RungRecord,
    ServingChoice,
    Speedup,
    Status,
    StudyResult,
    Target,
    Variant,
    Verification,
)
from serve.artifact import Quality, ServiceTime, Step
from serve.machine import Machine

SLO = Slo.model_validate(
    {
        "apiVersion": "trimserve/v1",
        "kind": "SLO",
        "name": "cifar10",
        "latency": {"threshold_ms": 50},
        "workload": {"rate_per_s": 100},
        "accuracy": {"max_drop_points": 1},
    }
)
SIZES = (1, 2, 4, 8, 16, 32)
BASE_ACCURACY = 0.9427


def variant(
    label: str,
    status: Status,
    milliseconds: float,
    drop: float = 0.0,
    verified_ms: float | None = None,
    reasons: Sequence[Reason] = (),
) -> Variant:
    """A variant whose batches of n take `milliseconds` (0.6 + 0.4 n) in one instance."""
    rate_per_s = 1300 / milliseconds
    latency_s = 1e-3 * (2 + 3.2 * milliseconds)
    engine, precision, *_ = [*label.split(), "fp32"]
    prediction = Prediction(
        100.0, latency_s / 2.4, latency_s / 1.3, latency_s, latency_s, 99.8, 1.0,
        min(0.99, 130 / rate_per_s), 1.4, 36_000,
    )  # fmt: skip
    verification = None
    if verified_ms is not None:
        verification = Verification(
            "met", (), verified_ms / 2.3e3, verified_ms / 1e3, verified_ms / 1e3,
            verified_ms / 0.9e3, 0.95, 100.1, 99.9, 1.0, 6000,
        )  # fmt: skip
    times = tuple(
        ServiceTime(
            n, 1e-3 * milliseconds * (0.6 + 0.4 * n), 1.4e-3 * milliseconds * (0.6 + 0.4 * n), 300
        )
        for n in SIZES
    )
    return Variant(
        id=hashlib.sha256(label.encode()).hexdigest(),
        label=label,
        status=status,
        recipe=recipe(engine, precision),
        reasons=tuple(reasons),
        engine=engine,
        precision=precision,
        quality=Quality(
            "accuracy", BASE_ACCURACY - drop, drop, drop - 0.003, drop + 0.004, drop + 0.0035,
            0.95, 5000, "validation", "d" * 64,
        ),
        service_times=(InstanceTimes(1, 2, times),),
        speedup=Speedup(9.1 / milliseconds, 9.4 / milliseconds, 9.9 / milliseconds, 0.95, 8, 60),
        int8_share=0.993 if precision == "int8" else 0.0,
        kernels=(
            KernelShare("qgemm/MlasConv", "QLinearConv", "int8", 55, 0.81),
            KernelShare("MlasEltwise", "QLinearAdd", "int8", 27, 0.14),
            KernelShare("MlasGemm", "QGemm", "int8", 1, 0.05),
        ),
        size_bytes=930_000 if precision == "int8" else 3_420_000,
        build_s=3.2,
        serving=ServingChoice(1, 2, 8, 0.0, 1, rate_per_s, 22.2 / rate_per_s, prediction),
        verification=verification,
        version="3" if status == "chosen" else "",
    )  # fmt: skip


def recipe(engine: str, precision: str) -> tuple[Step, ...]:
    export = Step("export", "1", {"opset": 20}, 0)
    quantize = Step("quantization", "1", {"calibration": "percentile", "per_channel": True}, 0)
    compiled = Step("compilation", "1", {"engine": engine}, 0)
    return (export, quantize, compiled) if precision == "int8" else (export, compiled)


RUNGS = (
    RungRecord(0, "smoke test", 62, 4, 31.0, 38.0),
    RungRecord(1, "timing", 58, 31, 210.0, 744.0),
    RungRecord(2, "accuracy", 27, 9, 96.0, 0.4),
)


def layers(n: int) -> tuple[Layer, ...]:
    """A first convolution that stays in fp32, `n` that become int8, one that goes, one that
    comes, and a linear layer that no kernel was found for."""
    middle = tuple(
        Layer(f"blocks.{i}.conv", "Conv", (64, 64, 3, 3), (64, 64 - 8 * (i % 2), 3, 3), "fp32",
              "int8", 4e-4 + 3e-5 * (i % 7), 1.3e-4 + 1e-5 * (i % 5))
        for i in range(n)
    )  # fmt: skip
    return (
        Layer("stem", "Conv", (64, 3, 3, 3), (64, 3, 3, 3), "fp32", "fp32", 2.1e-4, 2.0e-4),
        *middle,
        Layer("short_cut", "Conv", (64, 64, 1, 1), (), "fp32", "", 9e-5, None),
        Layer("factor", "Conv", (), (16, 64, 1, 1), "", "int8", None, 4e-5),
        Layer("linear", "Gemm", (10, 64), (10, 64), "fp32", "int8"),
    )


def large(n: int) -> StudyResult:
    """The same study after `n` variants more, half of them too inaccurate."""
    result, rows = met(), []
    for i in range(n):
        drop = 0.001 + 0.03 * ((i * 37) % 101) / 101
        engine, precision = ("openvino", "onnxruntime")[i % 2], ("int8", "fp32")[i % 5 == 0]
        broken = [Reason("accuracy_drop", drop, 0.01, "1")] if drop > 0.0065 else []
        row = variant(
            f"{engine} {precision} (pruned {i})", "infeasible" if broken else "unverified",
            3.3 + 7 * ((i * 53) % 97) / 97 - 60 * drop, drop, reasons=broken,
        )  # fmt: skip
        pruned = Step("pruning", "1", {"ratio": round(30 * drop, 3), "criterion": "taylor"}, 0)
        rows.append(replace(row, recipe=(pruned, *row.recipe) if i % 3 else row.recipe))
    return replace(result, variants=(*result.variants, *rows), layers=layers(54))


def by_fidelity() -> StudyResult:
    """The same study without labels."""
    result = met()
    rows = tuple(
        replace(row, quality=replace(row.quality, metric="agreement", value=1 - row.quality.drop,
                                     guarantee="fidelity", figures={"mean_kl": 0.0042}))
        if row.quality else row
        for row in result.variants
    )  # fmt: skip
    return replace(result, variants=rows)


def met() -> StudyResult:
    """A study that found, verified and published a variant."""
    broken = Reason("accuracy_drop", 0.0213, 0.01, "1", "by its upper bound at 95%")
    unbuilt = Reason("built", detail="TypeError: unsupported operator <aten::foo>")
    slow = variant("onnxruntime fp32", "infeasible", 40.0)
    assert slow.serving is not None
    swamped = replace(
        slow.serving.prediction, p50_s=math.inf, p99_s=math.inf, slo_latency_s=math.inf
    )
    serving = replace(
        slow.serving, max_rate_per_s=0.0, cost_per_million=math.inf, prediction=swamped
    )
    baseline = variant("onnxruntime fp32", "verified", 9.4)
    rows = (
        baseline,
        variant("openvino fp32", "verified", 8.1, 0.0002, verified_ms=31.5),
        variant("onnxruntime int8 (minmax)", "infeasible", 4.0, 0.0178, reasons=[broken]),
        variant("onnxruntime int8 (percentile)", "verified", 4.1, 0.0032),
        variant("openvino int8 (percentile)", "chosen", 3.2, 0.0041, verified_ms=13.4),
        variant("openvino int8 (entropy)", "unverified", 3.3, 0.0052),
        replace(
            slow, label="onnxruntime eager", id="e" * 64, serving=serving,
            reasons=(Reason("latency", 0.131, 0.05, "s"),),
        ),
        Variant("f" * 64, "openvino bf16", "dropped", reasons=(unbuilt,)),
    )  # fmt: skip
    return StudyResult(
        model="cifar10-resnet56",
        slo=SLO,
        objective="cost",
        outcome="met",
        variants=rows,
        baseline_id=baseline.id,
        target=Target("cpu", 2, 0.04),
        machine=Machine(
            "AMD EPYC 9R14", ("avx2", "avx512f", "avx512_vnni"), 2, "Linux x86_64 Python 3.11.7",
            {"onnxruntime": "1.32.0", "openvino": "2026.4.0"},
        ),
        spec_digest="5" * 64,
        data_digests={"train": "a" * 64, "validation": "d" * 64, "test": "b" * 64},
        seeds={"search": 0},
        budget=BudgetUsed(231.4, 3600.0, 8, 60),
        versions={"trimserve": "0.1.0", "onnxruntime": "1.32.0", "openvino": "2026.4.0"},
        command=("trimserve", "optimize", "cifar10/spec.yaml", "--repository", "my models"),
        finished_at="2026-11-24T10:00:00Z",
        rungs=RUNGS,
        ablations=ablations(rows, rows[4]),
        layers=layers(3),
        notes=("the machine was noisy: one comparison was repeated",),
    )  # fmt: skip
