"""What training for int8 is worth: the answers of a network in static int8, with and without it.

    python -m benchmarks.quantization_aware examples/cifar10/resnet20.yaml --epochs 1

Both go through the techniques as they are, then ONNX Runtime. Answers are compared with those of
the fp32 base on the first validation samples: accuracy, share of other classes, divergence, mean
square of the logits' difference. Training sees the first training samples alone. A row is printed
as it is known. About 3 minutes an epoch for ResNet-20 on one core.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from optimizer.data.splits import Samples
from optimizer.execution.setup import read_data
from optimizer.model_source import source_digest
from optimizer.space import Value, defaults
from optimizer.spec import read_spec
from optimizer.techniques import Context, load_technique
from optimizer.variant import Model, source_model
from serve.engines import EngineSpec, load_engine
from serve.machine import this_machine
from serve.tensor import Array

N_JUDGED = 2000
BATCH_SIZE = 32


@dataclass(frozen=True, eq=False)
class Bench:
    context: Context
    folder: Path

    def made(self, name: str, model: Model, **given: Value) -> Model:
        technique = load_technique(name)
        parameters = defaults(technique.space(model, self.context), **given)
        directory = Path(tempfile.mkdtemp(dir=self.folder))
        return technique.apply(model, parameters, self.context, directory)

    def answers(self, model: Model, inputs: Mapping[str, Array]) -> Array:
        """Of an ONNX model, [n, class]."""
        engine = load_engine(model.directory, EngineSpec("onnxruntime", model.file))
        n = len(next(iter(inputs.values())))
        try:
            batches = [
                engine.run({k: v[at : at + BATCH_SIZE] for k, v in inputs.items()})
                for at in range(0, n, BATCH_SIZE)
            ]
        finally:
            engine.close()
        parts = [next(iter(outputs.values())) for outputs in batches]
        return np.concatenate(parts)


def measured(bench: Bench, base: Model, judged: Samples) -> Iterator[tuple[str, Array]]:
    exported = bench.made("export", base)
    yield "fp32", bench.answers(exported, judged.inputs)
    yield "int8", bench.answers(bench.made("quantization", exported), judged.inputs)
    trained = bench.made("quantization_aware_training", base, effort="full")
    exported = bench.made("export", trained)
    yield "fp32, trained", bench.answers(exported, judged.inputs)
    yield "int8, trained", bench.answers(bench.made("quantization", exported), judged.inputs)


def shown(given: Array, wanted: Array, labels: Array) -> str:
    p, q = (torch.log_softmax(torch.from_numpy(one).double(), 1) for one in (wanted, given))
    divergence = float((p.exp() * (p - q)).sum(1).mean())
    accuracy = (given.argmax(1) == labels).mean()
    other = (given.argmax(1) != wanted.argmax(1)).mean()
    square = np.square(given - wanted).mean()
    return f"{accuracy:.2%} | {other:.2%} | {divergence:.2e} | {square:.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=10_000, help="to train with")
    parser.add_argument("--judged", type=int, default=N_JUDGED)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = read_spec(given.spec)
    splits = read_data(spec)
    training = spec.training.model_copy(
        update={"epochs": given.epochs, "augmentation": "flip_and_crop"}
    )
    context = Context(
        splits.calibration, this_machine(), spec.seed, BATCH_SIZE,
        splits.train.subset("train", np.arange(given.samples)), training, spec.task,
    )  # fmt: skip
    judged = splits.validation.read(np.arange(given.judged))
    base = source_model(spec.model, source_digest(spec.model))
    print(
        "| | accuracy | other class | divergence, nats | square of logits |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        wanted: Array | None = None
        for name, answers in measured(Bench(context, Path(folder)), base, judged):
            wanted = answers if wanted is None else wanted
            print(f"| {name} | {shown(answers, wanted, judged.labels)} |", flush=True)


if __name__ == "__main__":
    main()
