"""What pruning a network costs in accuracy, and buys in measured time, before any training.

    python -m benchmarks.techniques examples/cifar10/resnet20.yaml ratio=0.5 criterion=taylor

Parameters of the technique that aren't named have their defaults (docs/techniques.md), and
`criterion=random` is allowed too. Printed as JSON: top-1 on test directly afterwards and after
recalibration of batch normalization, and the time of ONNX Runtime, in turns with the whole network.
Nothing is kept. What training wins back is the subject of `benchmarks.recovery`, allocations side
by side that of `benchmarks.allocations`; both use what is here.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from optimizer.blocks import blocks_of
from optimizer.data.splits import DataSplits, Split, load_splits
from optimizer.model_source import read_signature, source_digest
from optimizer.space import Value, defaults
from optimizer.spec import Spec, read_spec
from optimizer.techniques import Context, load_technique
from optimizer.timing import Contender, Effort, measure
from optimizer.torch_variant import load_torch
from optimizer.variant import Model, OnnxModel, TorchModel, source_model
from serve.engines import EngineSpec
from serve.machine import this_machine

SIZES = (1, 8)
N_RECALIBRATED_ON = 1024
N_JUDGED = 2000
BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class Bench:
    spec: Spec
    splits: DataSplits
    context: Context
    model: TorchModel

    def pruned(self, given: Mapping[str, Value], directory: Path) -> TorchModel:
        """`random` isn't in the space, so parameters aren't checked against it."""
        technique = load_technique("pruning")
        criterion = given.get("criterion")
        known = {n: v for n, v in given.items() if (n, v) != ("criterion", "random")}
        parameters = defaults(technique.space(self.model, self.context), **known)
        if criterion == "random":
            parameters["criterion"] = criterion
        made = technique.apply(self.model, parameters, self.context, directory)
        assert isinstance(made, TorchModel)
        return made

    def exported(self, model: Model, directory: Path) -> OnnxModel:
        directory.mkdir()
        made = load_technique("export").apply(model, {}, self.context, directory)
        assert isinstance(made, OnnxModel)
        return made

    def tensors(self, split: Split, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        read = split.read(np.arange(min(n, len(split))))
        (images,) = read.inputs.values()
        assert read.labels is not None
        return torch.from_numpy(images), torch.from_numpy(read.labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path)
    parser.add_argument("parameters", nargs="*", type=parameter, metavar="NAME=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench, given = open_bench(arguments.spec), dict(arguments.parameters)
    print(json.dumps({**accuracy_of(bench, given), **times_of(bench, given)}, indent=1))


def parameter(text: str) -> tuple[str, Value]:
    """Values as in YAML."""
    name, value = text.split("=", 1)
    found: Value = yaml.safe_load(value)
    return name, found


def open_bench(path: Path) -> Bench:
    spec = read_spec(path)
    splits = load_splits(spec.data, read_signature(spec.model).input_names, spec.seed)
    context = Context(splits.calibration, this_machine(), spec.seed, max(SIZES))
    model = source_model(spec.model, source_digest(spec.model))
    assert isinstance(model, TorchModel)
    return Bench(spec, splits, context, model)


def kept(directory: Path, name: str, make: Callable[[], object]) -> dict[str, float]:
    """What the part's file says; made and written where there is none."""
    path = directory / f"{name.replace(' ', '-').replace(',', '')}.json"
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1) + "\n")
        print(f"{name}: {path.read_text()}", flush=True)
    found: dict[str, float] = json.loads(path.read_text())
    return found


def accuracy_of(bench: Bench, given: Mapping[str, Value]) -> dict[str, float]:
    """Top-1 on test: directly after pruning, and after recalibration."""
    with tempfile.TemporaryDirectory() as scratch:
        module = load_torch(bench.pruned(given, Path(scratch)))
    images, labels = bench.tensors(bench.splits.test, N_JUDGED)
    before = top1(module, images, labels)
    recalibrate(module, bench.tensors(bench.splits.train, N_RECALIBRATED_ON)[0])
    return {
        "pruned": before,
        "recalibrated": top1(module, images, labels),
        "operations": operations(module, images[:1]),
    }


def times_of(bench: Bench, given: Mapping[str, Value]) -> dict[str, float]:
    """Of ONNX Runtime in fp32 on one thread, in turns with the whole network."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pruned").mkdir()
        model = bench.pruned(given, folder / "pruned")
        files = [
            bench.exported(one, folder / name)
            for one, name in ((model, "new"), (bench.model, "old"))
        ]
        variant, baseline = (
            Contender(one.directory, EngineSpec("onnxruntime", one.file, threads=1))
            for one in files
        )
        images, _ = bench.tensors(bench.splits.validation, max(SIZES))
        inputs = {read_signature(bench.spec.model).input_names[0]: images.numpy()}
        timing = measure(variant, baseline, inputs, SIZES, effort=Effort(seconds=8.0))
        assert timing.speedup is not None
        whole = operations(load_torch(bench.model), images[:1])
        return {
            "fewer operations": whole / operations(load_torch(model), images[:1]),
            "faster": timing.speedup.estimate,
            "low": timing.speedup.low,
            "high": timing.speedup.high,
        }


def top1(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        right = [
            module(some).argmax(1) == wanted
            for some, wanted in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
        ]
    return float(torch.cat(right).float().mean())


def recalibrate(module: nn.Module, images: torch.Tensor) -> None:
    """Running statistics as the plain average over batches of training images."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for start in range(0, len(images), BATCH_SIZE):
            module(images[start : start + BATCH_SIZE])
    module.eval()


def operations(module: nn.Module, *example: torch.Tensor) -> float:
    """Multiply-adds of convolutions and linear layers for one sample, by hooks."""
    total = 0.0
    for block, count in blocks_of(module, example).items():
        if block.kind == "conv":
            space = [
                (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
                for size, before, after, dilation, kernel, stride in zip(
                    block.input_shape[1:], block.padding, block.padding[len(block.kernel) :],
                    block.dilation, block.kernel, block.stride, strict=False,
                )
            ]  # fmt: skip
            filters = block.n_outputs * block.input_shape[0] // block.groups
            total += count * filters * float(np.prod(block.kernel) * np.prod(space))
        else:
            total += count * float(np.prod(block.input_shape)) * block.n_outputs
    return total


if __name__ == "__main__":
    main()
