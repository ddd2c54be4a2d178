"""Quantizes an ONNX file by other people's tools, for benchmarks.quantization, which runs this by
the Python of an environment that has them: onnxruntime.quantization, NNCF, Olive.

    python -m benchmarks.quantization_others TOOL model.onnx calibration.npz target \
        [--encoder] [--saturates]

Each tool gets what its documentation advises for the processor: weights per channel, in 7 bits
where pairs of products saturate, activations unsigned.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
BATCH_SIZE = 16


@dataclass(frozen=True)
class Task:
    model: Path
    target: Path
    inputs: Arrays
    encoder: bool
    saturates: bool

    def batches(self, size: int = BATCH_SIZE) -> Iterator[Arrays]:
        n = len(next(iter(self.inputs.values())))
        for start in range(0, n, size):
            yield {name: array[start : start + size] for name, array in self.inputs.items()}


class Reader:
    """onnxruntime's protocol for calibration data."""

    def __init__(self, batches: Iterator[Arrays]) -> None:
        self._batches = batches

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)


def onnxruntime_static(method: str) -> Callable[[Task], None]:
    def quantize(task: Task) -> None:
        from onnxruntime import quantization as ort
        from onnxruntime.quantization.shape_inference import quant_pre_process

        folded = task.target.with_suffix(".folded.onnx")
        quant_pre_process(str(task.model), str(folded), skip_symbolic_shape=True)
        ort.quantize_static(
            str(folded),
            str(task.target),
            Reader(task.batches()),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=task.saturates,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod[method],
            # Everything in an encoder loses too much; the matrix products are the work.
            op_types_to_quantize=["MatMul", "Gemm"] if task.encoder else None,
        )
        folded.unlink()

    return quantize


def onnxruntime_dynamic(task: Task) -> None:
    from onnxruntime import quantization as ort

    ort.quantize_dynamic(
        str(task.model),
        str(task.target),
        per_channel=True,
        reduce_range=task.saturates,
        weight_type=ort.QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def nncf_of(kind: str) -> Callable[[Task], None]:
    """Of an ONNX file, or of OpenVINO's own format."""

    def quantize(task: Task) -> None:
        import nncf

        dataset = nncf.Dataset([*task.batches(1)])
        given = {"model_type": nncf.ModelType.TRANSFORMER} if task.encoder else {}
        n = len(next(iter(task.inputs.values())))
        if kind == "onnx":
            import onnx

            made = nncf.quantize(onnx.load(task.model), dataset, subset_size=n, **given)
            onnx.save(made, task.target)
        else:
            import openvino

            model = openvino.Core().read_model(task.model)
            made = nncf.quantize(model, dataset, subset_size=n, **given)
            openvino.save_model(made, task.target, compress_to_fp16=False)

    return quantize


def olive(task: Task) -> None:
    from olive.data.config import DataConfig
    from olive.data.registry import Registry
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.quantization import OnnxStaticQuantization

    samples = [({name: array[0] for name, array in batch.items()}, 0) for batch in task.batches(1)]

    @Registry.register_dataset("calibration_samples")
    def calibration_samples(**_: object) -> list[tuple[Arrays, int]]:
        return samples

    data = DataConfig(
        name="calibration",
        type="DataContainer",
        load_dataset_config={"type": "calibration_samples"},
        pre_process_data_config={"type": "skip_pre_process"},
        post_process_data_config={"type": "skip_post_process"},
        dataloader_config={"type": "default_dataloader", "batch_size": BATCH_SIZE},
    )
    config = {
        "data_config": data,
        "per_channel": True,
        "reduce_range": task.saturates,
        "activation_type": "uint8",
        "precision": "int8",
        "op_types_to_quantize": ["MatMul", "Gemm"] if task.encoder else None,
    }
    quantization = create_pass_from_dict(
        OnnxStaticQuantization,
        config,
        disable_search=True,
        accelerator_spec=DEFAULT_CPU_ACCELERATOR,
    )
    made = quantization.run(ONNXModelHandler(str(task.model)), str(task.target.with_suffix("")))
    task.target.write_bytes(Path(made.model_path).read_bytes())


TOOLS: dict[str, Callable[[Task], None]] = {
    "onnxruntime-minmax": onnxruntime_static("MinMax"),
    "onnxruntime-entropy": onnxruntime_static("Entropy"),
    "onnxruntime-percentile": onnxruntime_static("Percentile"),
    "onnxruntime-dynamic": onnxruntime_dynamic,
    "nncf-onnx": nncf_of("onnx"),
    "nncf-openvino": nncf_of("openvino"),
    "olive": olive,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--encoder", action="store_true")
    parser.add_argument("--saturates", action="store_true")
    given = parser.parse_args()
    with np.load(given.calibration) as stored:
        inputs = dict(stored)
    TOOLS[given.tool](Task(given.model, given.target, inputs, given.encoder, given.saturates))


if __name__ == "__main__":
    main()
