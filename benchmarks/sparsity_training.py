"""What sparsity training is worth: accuracy of a network pruned by its batch-norm scales.

    python -m benchmarks.sparsity_training examples/cifar10/resnet20.yaml --strengths 0.01 0.1

Each row is one way to the same share of multiply-adds: pruned at once by a criterion, or by
`bn_scale` after training with the penalty. Accuracy is that of the first validation samples: before
pruning, after it with statistics taken anew, and after equally long recoveries. Training sees the
first training samples alone. A row is printed as it is known.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from optimizer.torch_variant import load_torch
from optimizer.variant import Model, TorchModel, source_model
from serve.machine import this_machine

BATCH_SIZE = 250


@dataclass(frozen=True, eq=False)
class Bench:
    context: Context
    judged: Samples
    folder: Path
    pruned: Mapping[str, Value]

    def made(self, name: str, model: Model, **given: Value) -> TorchModel:
        technique = load_technique(name)
        parameters = defaults(technique.space(model, self.context), **given)
        directory = Path(tempfile.mkdtemp(dir=self.folder))
        made = technique.apply(model, parameters, self.context, directory)
        assert isinstance(made, TorchModel)
        return made

    def accuracy(self, model: TorchModel) -> float:
        module = load_torch(model)
        images = torch.from_numpy(next(iter(self.judged.inputs.values())))
        with torch.inference_mode():
            logits = torch.cat([module(part) for part in images.split(BATCH_SIZE)])
        assert self.judged.labels is not None
        return float((logits.argmax(1).numpy() == self.judged.labels).mean())

    def row(self, label: str, model: TorchModel, criterion: str) -> str:
        note = model.notes[-1] if model.notes else ""
        pruned = self.made("pruning", model, criterion=criterion, **self.pruned)
        after = [
            self.accuracy(self.made("recovery", pruned, effort=effort))
            for effort in ("recalibrate", "full")
        ]
        shown = " | ".join(f"{one:.2%}" for one in (self.accuracy(model), *after))
        return f"| {label} | {shown} | {note} |"


def rows(
    bench: Bench, base: TorchModel, forms: Sequence[str], strengths: Sequence[float]
) -> Iterator[str]:
    for criterion in ("bn_scale", "l2", "taylor"):
        yield bench.row(criterion, base, criterion)
    for form in forms:
        for strength in strengths:
            trained = bench.made("sparsity_training", base, form=form, strength=strength)
            yield bench.row(f"{form} {strength:g}", trained, "bn_scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.001, 0.01])
    parser.add_argument("--forms", nargs="+", default=["group", "l1"])
    parser.add_argument("--epochs", type=float, default=3.0, help="of sparsity training")
    parser.add_argument("--recovery", type=float, default=1.0, help="epochs")
    parser.add_argument("--samples", type=int, default=10_000, help="to train with")
    parser.add_argument("--judged", type=int, default=2000)
    parser.add_argument("--ratio", type=float, default=0.5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = read_spec(given.spec)
    splits = read_data(spec)
    training = spec.training.model_copy(update={
        "epochs": given.recovery, "short_epochs": 0.0, "augmentation": "flip_and_crop",
        "sparsity_epochs": given.epochs, "sparsity_forms": tuple(given.forms),
        "sparsity_strengths": tuple(given.strengths),
    })  # fmt: skip
    context = Context(
        splits.calibration, this_machine(), spec.seed, 32,
        splits.train.subset("train", np.arange(given.samples)), training, spec.task,
    )  # fmt: skip
    base = source_model(spec.model, source_digest(spec.model))
    assert isinstance(base, TorchModel)
    pruned: Mapping[str, Value] = {"ratio": given.ratio, "allocation": "global", "multiple": 1}
    print("| | before | pruned | recovered | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        judged = splits.validation.read(np.arange(given.judged))
        bench = Bench(context, judged, Path(folder), pruned)
        for row in rows(bench, base, given.forms, given.strengths):
            print(row, flush=True)


if __name__ == "__main__":
    main()
