"""Which layout of a quantized graph runs fast: ONNX Runtime and OpenVINO, by activation type,
granularity of weights, and operators that are quantized.

    python -m benchmarks.quantization_layouts examples/digits/spec.yaml --threads 1

Each row is timed in turns with fp32 in ONNX Runtime, under changing batch sizes; the share of
int8 is what the engine's own profile says of its convolutions and matrix products.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optimizer.data.splits import DataSplits, Split, load_splits
from optimizer.kernels import prove
from optimizer.model_source import read_signature, source_digest
from optimizer.parity import fixed_sizes
from optimizer.spec import read_spec
from optimizer.tasks.classification import Top1
from optimizer.techniques import Context, load_technique
from optimizer.timing import Contender, Effort, measure
from optimizer.variant import source_model
from serve.engines import Engine, EngineSpec, load_engine
from serve.errors import ArtifactInvalid
from serve.machine import this_machine

SIZES = (1, 8, 32)
HEAVY_ONLY = ["Conv", "Gemm", "MatMul"]


@dataclass(frozen=True)
class Layout:
    name: str
    activations: str
    weights: str = "QInt8"
    per_channel: bool = True
    operators: tuple[str, ...] = ()
    symmetric: bool = False


LAYOUTS = (
    Layout("u8s8", "QUInt8"),
    Layout("u8s8, weights per tensor", "QUInt8", per_channel=False),
    Layout("u8u8, weights per tensor", "QUInt8", "QUInt8", per_channel=False),
    Layout("u8s8, heavy operators only", "QUInt8", operators=tuple(HEAVY_ONLY)),
    Layout("s8s8", "QInt8"),
    Layout("s8s8, heavy operators only", "QInt8", operators=tuple(HEAVY_ONLY)),
    Layout("s8s8, symmetric activations", "QInt8", symmetric=True),
)


class Reader:
    """onnxruntime's protocol for calibration data."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        n = len(next(iter(inputs.values())))
        batches = range(0, n, 32)
        self._batches = iter([{k: v[i : i + 32] for k, v in inputs.items()} for i in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    spec = read_spec(arguments.spec)
    splits = load_splits(spec.data, read_signature(spec.model).input_names, spec.seed)
    context = Context(splits.calibration, this_machine(), spec.seed, max(SIZES))
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model = source_model(spec.model, source_digest(spec.model))
        load_technique("export").apply(model, {}, context, directory)
        quantize_all(directory, dict(splits.calibration.read().inputs))
        compare_all(directory, splits, arguments.threads)


def quantize_all(directory: Path, calibration: dict[str, np.ndarray]) -> None:
    # Not at the top: it puts a folder with an `optimizer.py` on sys.path, ours must come first.
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded = directory / "folded.onnx"
    quant_pre_process(str(directory / "model.onnx"), str(folded), skip_symbolic_shape=True)
    for layout in LAYOUTS:
        quantization.quantize_static(
            folded,
            directory / f"{layout.name}.onnx",
            Reader(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=layout.per_channel,
            activation_type=quantization.QuantType[layout.activations],
            weight_type=quantization.QuantType[layout.weights],
            op_types_to_quantize=list(layout.operators) or None,
            extra_options={"ActivationSymmetric": layout.symmetric},
        )


def contenders(threads: int) -> Iterator[tuple[str, EngineSpec]]:
    for engine in ("onnxruntime", "openvino"):
        sizes = fixed_sizes(engine, SIZES)
        for precision in ("fp32", "bf16") if engine == "openvino" else ("fp32",):
            yield precision, EngineSpec(engine, "model.onnx", precision, threads, 1, sizes)
        for layout in LAYOUTS:
            file = f"{layout.name}.onnx"
            yield layout.name, EngineSpec(engine, file, "int8", threads, 1, sizes)


def top1(engine: Engine, split: Split) -> float:
    size, right = max(SIZES), []
    for start in range(0, len(split), size):
        samples = split.read(range(start, min(start + size, len(split))))
        right.append(Top1().scores(engine.run(samples.inputs), samples.labels, None).judged)
    return float(np.concatenate(right).mean())


def compare_all(directory: Path, splits: DataSplits, threads: int) -> None:
    inputs = splits.validation.read(range(min(256, len(splits.validation)))).inputs
    baseline = Contender(directory, EngineSpec("onnxruntime", "model.onnx", "fp32", threads))
    sizes = " | ".join(f"ms at {size}" for size in SIZES)
    print(f"| engine | layout | {sizes} | speedup at {SIZES[-1]} | int8 | accuracy |")
    print("|---|---|" + "---|" * (len(SIZES) + 3))
    for name, spec in contenders(threads):
        try:
            timing = measure(
                Contender(directory, spec), baseline, inputs, SIZES, effort=Effort(seconds=1.5)
            )
        except ArtifactInvalid as error:
            print(f"| {spec.name} | {name} | can't be loaded: {str(error).splitlines()[0][:80]}")
            continue
        engine = load_engine(directory, spec)
        accuracy = top1(engine, splits.validation)
        batch = {key: value[:8] for key, value in inputs.items()}
        share = prove(directory, spec, batch).int8_time_share
        speedup = timing.speedup
        assert speedup is not None
        milliseconds = " | ".join(f"{time.p50_s * 1e3:.3g}" for time in timing.times.times)
        interval = f"{speedup.estimate:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]"
        print(
            f"| {spec.name} | {name} | {milliseconds} | {interval} | {share:.0%} | {accuracy:.2%} |"
        )


if __name__ == "__main__":
    main()
