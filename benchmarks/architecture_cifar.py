"""A network for CIFAR-10 found in ResNet-56's place, beside ResNet-20, which people drew.

    python -m benchmarks.architecture_cifar [--seed 0] [--from-scratch]

A supernet of networks like ResNet-20, up to it and with its weights, is trained with ResNet-56 as
its teacher; a controller and its controls look for the most accurate one that the table of layers
says is 3.6 times as fast as ResNet-56 (ResNet-20 has 3 times fewer operations), and it is
distilled. With `--from-scratch` the supernet begins at random, in a space of other blocks and
for fewer epochs. It and ResNet-20 are timed in turns, in fp32 and in int8 on each engine, and
judged on the test split. What is finished is kept in `benchmarks/results/architecture-cifar.json`;
about an hour of one core with AMX, half of that from scratch. TRIMSERVE_DATA and TRIMSERVE_WEIGHTS
are needed.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.architecture import seconds
from benchmarks.quantization import Results
from benchmarks.recovery import CIFAR, RESNET20_FACTORY, Chain, Figures, Subject, cifar
from optimizer.architecture.options import ArchitectureSpec, InitialSpec
from optimizer.architecture.setting import Setting
from optimizer.blocks import Block, block_inputs, write_block
from optimizer.importable import Importable
from optimizer.spec import TrainingSpec
from optimizer.techniques.architecture import ArchitectureSearch
from optimizer.techniques.supernet import SupernetTraining
from optimizer.timing import Contender
from optimizer.variant import Model, TorchModel, TorchVariant
from serve.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "architecture-cifar.json"
BATCH_SIZE = 8
SEARCHED = {"speedups": [3.6]}
TRAINING = TrainingSpec(
    epochs=4, learning_rate=0.05, alphas=(0.1,), augmentation="flip_and_crop", precision="bf16"
)


@dataclass(frozen=True)
class Plan:
    """What is searched in, and how networks are trained."""

    name: str
    spec: ArchitectureSpec
    training: TrainingSpec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from-scratch", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(RESULTS)
    plan = from_scratch() if given.from_scratch else inherited()
    whole = cifar("spec.yaml", plan.training, given.seed)
    drawn = cifar("resnet20.yaml", plan.training, given.seed)
    setting = Setting(plan.spec, whole.model.source, whole.context)
    for block in setting.wanted:
        results.once(("block", block.key), lambda block=block: of_block(block))

    def known(block: Block) -> float | None:
        found: float | None = results.content["block"].get(block.key)
        return found

    subject = replace(whole, context=replace(whole.context, block_seconds=known))
    key = f"{plan.name}{given.seed}"
    print(json.dumps(searched(results, key, plan.spec, subject, drawn), indent=1))


def inherited() -> Plan:
    """Up to ResNet-20 itself, whose blocks may lose half of their inner channels, and stages two
    of their blocks."""
    layers = {
        "depths": [1, 2, 3], "blocks": ["residual"], "expansions": [2, 3, 4], "shortcuts": [False],
    }  # fmt: skip
    stages = [
        {"widths": [16], **layers},
        {"widths": [32], "stride": 2, **layers},
        {"widths": [64], "stride": 2, **layers},
    ]
    searched = {**SEARCHED, "epochs": 3, "learning_rate": 0.05, "evaluations": 30}
    spec = ArchitectureSpec.model_validate(
        {"space": {"kind": "vision", "stems": [16], "stages": stages}, **searched}
    )
    weights = Path(os.environ["TRIMSERVE_WEIGHTS"]) / "resnet20-cifar10.safetensors"
    initial = InitialSpec.model_construct(factory=RESNET20_FACTORY, weights=weights)
    blocks = {"residual": Importable("residual", "residual", CIFAR)}
    spec = spec.model_copy(update={"initial": initial, "blocks": blocks})
    return Plan("inherited ", spec, TRAINING.model_copy(update={"epochs": 14}))


def from_scratch() -> Plan:
    stages = [
        {"depths": [1, 2, 3], "widths": [8, 16], "blocks": ["basic"]},
        {"depths": [1, 2, 3], "widths": [16, 32], "blocks": ["basic"], "stride": 2},
        {"depths": [1, 2, 3], "widths": [32, 64], "blocks": ["basic"], "stride": 2},
    ]
    searched = {**SEARCHED, "epochs": 6, "learning_rate": 0.2, "evaluations": 20}
    space = {"kind": "vision", "stems": [16], "stages": stages}
    return Plan("", ArchitectureSpec.model_validate({"space": space, **searched}), TRAINING)


def of_block(block: Block) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model = write_block(block, "onnxruntime", Path(folder), this_machine())
        contender = Contender(Path(folder), model.served(1, 1, (1, BATCH_SIZE)))
        return seconds(contender, block_inputs(block, BATCH_SIZE, 0))


def searched(
    results: Results, key: str, spec: ArchitectureSpec, subject: Subject, drawn: Subject
) -> Figures:
    """Accuracies on test, and how many times as fast as ResNet-20 the network is."""
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        made: Model = subject.model
        for technique in (SupernetTraining(spec), ArchitectureSearch(spec), "recovery"):
            started = time.process_time()
            given = {"effort": "full"} if technique == "recovery" else {}
            made = chain.step(technique, made, **given)
            print(f"{(time.process_time() - started) / 60:.1f} min", flush=True)
        assert isinstance(made, TorchVariant)

        def judged() -> Figures:
            return {
                "resnet56": accuracy(subject, subject.model),
                "resnet20": accuracy(drawn, drawn.model),
                "found": accuracy(subject, made),
            }

        print(*made.notes, sep="\n")
        results.once(("notes", key), lambda: list(made.notes))
        figures: Figures = results.once(("accuracy", key), judged)
        (Path(scratch) / "times").mkdir()
        # `times` sets what it is given beside its subject's own model.
        beside = Chain(replace(subject, model=drawn.model), Path(scratch) / "times")
        figures |= results.once(("times", key), lambda: beside.times(made))
        return figures


def accuracy(subject: Subject, model: TorchModel) -> float:
    outputs = subject.outputs(model)
    return subject.accuracy(outputs, outputs)


if __name__ == "__main__":
    main()
