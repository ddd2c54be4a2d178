"""What int8 loses when it is calibrated without data: on inputs generated from batch-norm
statistics, on noise, and on real images, judged on the same images.

    python -m benchmarks.generated_calibration [examples/cifar10/spec.yaml] [--judged 2000]

In ONNX Runtime, at the first choices of each way to calibrate. TRIMSERVE_DATA and TRIMSERVE_WEIGHTS
are needed. Generating 128 inputs of CIFAR-10's size for ResNet-56 takes some minutes on one core.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.quantization import ArraySplit
from benchmarks.techniques import Bench, open_bench
from optimizer.data.generated import generated_split
from optimizer.data.splits import Split
from optimizer.space import defaults
from optimizer.techniques import load_technique
from optimizer.variant import Model, OnnxModel
from serve.engines import EngineSpec, load_engine

EXAMPLE = Path(__file__).parent.parent / "examples" / "cifar10" / "spec.yaml"
N_REAL = (512, 128)
N_GENERATED = 128
METHODS = ("mse", "minmax", "entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path, nargs="?", default=EXAMPLE)
    parser.add_argument("--judged", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = open_bench(given.spec)
    judged = bench.splits.test.read(range(given.judged))
    with tempfile.TemporaryDirectory() as scratch:
        exported = step(bench, "export", bench.model, Path(scratch) / "export")
        assert isinstance(exported, OnnxModel)
        wanted = outputs_of(exported.path, judged.inputs)
        print(f"fp32: {(wanted.argmax(1) == judged.labels).mean():.2%} of {given.judged}")
        splits = sources(bench)
        print("| calibrated on | method | top-1 | agrees with fp32 | squared error |")
        print("|---|---|---|---|---|")
        for name, split in splits.items():
            for method in METHODS:
                directory = Path(scratch) / f"{name} {method}"
                made = step(bench, "quantization", exported, directory, split, method)
                assert isinstance(made, OnnxModel)
                found = outputs_of(made.path, judged.inputs)
                top1 = (found.argmax(1) == judged.labels).mean()
                agrees = (found.argmax(1) == wanted.argmax(1)).mean()
                error = ((found - wanted) ** 2).mean() / wanted.var()
                print(
                    f"| {name} | {method} | {top1:.2%} | {agrees:.2%} | {error:.4f} |", flush=True
                )


def sources(bench: Bench) -> dict[str, Split]:
    """Calibration samples by where they come from."""
    shape = bench.splits.test.read([0]).inputs["image"].shape[1:]
    found: dict[str, Split] = {
        f"{n} images": bench.context.calibration.subset("calibration", np.arange(n)) for n in N_REAL
    }
    split = generated_split(bench.spec.model, str(bench.spec.source), N_GENERATED, 0)
    started = time.monotonic()
    split.read()
    print(f"generating {N_GENERATED} inputs took {time.monotonic() - started:.0f} s")
    found[f"{N_GENERATED} generated"] = split
    noise = np.random.default_rng(0).standard_normal((N_GENERATED, *shape)).astype(np.float32)
    found[f"{N_GENERATED} of noise"] = ArraySplit({"image": noise}, np.zeros(N_GENERATED))
    return found


def step(
    bench: Bench,
    technique: str,
    model: Model,
    directory: Path,
    calibration: Split | None = None,
    method: str = "mse",
) -> Model:
    directory.mkdir()
    one = load_technique(technique)
    context = replace(bench.context, calibration=calibration or bench.context.calibration)
    space = one.space(model, context)
    given = {"calibration": method} if technique == "quantization" else {}
    return one.apply(model, defaults(space, **given), context, directory)


def outputs_of(path: Path, inputs) -> np.ndarray:
    engine = load_engine(path.parent, EngineSpec("onnxruntime", path.name, "fp32", 1, 1))
    try:
        name = engine.signature.outputs[0].name
        n = len(inputs["image"])
        batches = [
            engine.run({"image": inputs["image"][start : start + 50]})[name]
            for start in range(0, n, 50)
        ]
    finally:
        engine.close()
    return np.concatenate(batches)


if __name__ == "__main__":
    main()
