"""Recovery and students: what is asked of them by spec, seed and data, and what they make."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from optimizer.builder import Builder
from optimizer.data.splits import Samples
from optimizer.errors import SpecInvalid
from optimizer.execution.setup import enabled_techniques
from optimizer.importable import Importable
from optimizer.pruning.masks import MASKS
from optimizer.recipe import Recipe
from optimizer.space import Value, defaults
from optimizer.spec import StudentSpec, TaskSpec, TrainingSpec, read_spec
from optimizer.store import Store
from optimizer.techniques import Context
from optimizer.techniques.decomposition import Decomposition
from optimizer.techniques.pruning import Pruning
from optimizer.techniques.quantization_aware_training import QuantizationAwareTraining
from optimizer.techniques.recovery import Recovery
from optimizer.techniques.student import Student
from optimizer.torch_variant import load_torch, read_plan, torch_model
from optimizer.training import losses
from optimizer.variant import Json, TorchVariant
from tests.optimizer.synthetic import Narrow
from tests.optimizer.tiny_study import write_study
from tests.optimizer.torch_bench import TorchBench, make_torch_bench


class Unlabelled:
    """A split without its labels."""

    name = "train"
    labels = None

    def __init__(self, bench: TorchBench) -> None:
        assert bench.context.train is not None
        self._split = bench.context.train
        self.digest = f"{self._split.digest} without labels"

    def __len__(self) -> int:
        return len(self._split)

    def read(self, indices: object = None) -> Samples:
        return replace(self._split.read(indices), labels=None)  # type: ignore[arg-type]


class Killed(Exception):
    pass


class Dying:
    """A split whose reader is killed at one of its reads."""

    name = "train"

    def __init__(self, bench: TorchBench, n_reads: int) -> None:
        assert bench.context.train is not None
        self._split = bench.context.train
        self.digest, self.labels = self._split.digest, self._split.labels
        self.n_reads = 0
        self._max_reads = n_reads

    def __len__(self) -> int:
        return len(self._split)

    def read(self, indices: object = None) -> Samples:
        self.n_reads += 1
        if self.n_reads > self._max_reads:
            raise Killed
        return self._split.read(indices)  # type: ignore[arg-type]


class Sparse:
    """Sets the first weights of a layer to zero, and says so in its plan."""

    traits = replace(Narrow.traits, name="sparse")

    def apply(self, bench: TorchBench, directory: Path) -> TorchVariant:
        directory.mkdir()
        module = load_torch(bench.torch)
        with torch.no_grad():
            module.get_submodule("3").weight[0] = 0  # type: ignore[index]
        return torch_model(directory, bench.torch, module, self, {"masks": ["3"]})

    def restructure(self, module: nn.Module, operations: Json) -> nn.Module:
        return module


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    return make_torch_bench(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def narrow(bench: TorchBench, tmp_path_factory: pytest.TempPathFactory) -> TorchVariant:
    technique = Narrow()
    directory = tmp_path_factory.mktemp("narrow")
    return technique.apply(bench.torch, {"width": 0.5}, bench.context, directory)


def context(bench: TorchBench, **training: object) -> Context:
    quick = {"epochs": 6.0, "short_epochs": 1.0, "batch_size": 16, "learning_rate": 0.05}
    return replace(bench.context, training=TrainingSpec(**{**quick, **training}))  # type: ignore[arg-type]


def recovered(
    model: TorchVariant, at: Context, directory: Path, **given: Value
) -> tuple[TorchVariant, Mapping[str, Value]]:
    directory.mkdir()
    technique = Recovery()
    assert technique.check(model, at) is None
    parameters = defaults(technique.space(model, at), **given)
    return technique.apply(model, parameters, at, directory), parameters


def distance(model: TorchVariant, bench: TorchBench, learns: str = "classes") -> float:
    """Of the model's answers on the training samples from the base's, as the loss has it."""
    assert bench.context.train is not None
    images = torch.from_numpy(bench.context.train.read().inputs["image"])
    with torch.inference_mode():
        base, own = load_torch(bench.torch)(images), load_torch(model)(images)
    if learns == "embedding":
        return float(losses.directions(own, base))
    return float(
        losses.hint(own, base) if learns == "values" else losses.soft_targets(own, base, 1.0)
    )


def test_recovery_brings_a_narrowed_network_nearer_to_its_base_by_effort(
    bench: TorchBench, narrow: TorchVariant, tmp_path: Path
) -> None:
    at = context(bench, reconstruction_samples=0)
    distances = [distance(narrow, bench)]
    for effort, epochs in (("recalibrate", 0), ("short", 1), ("full", 6)):
        made, parameters = recovered(narrow, at, tmp_path / effort, effort=effort, alpha=0.1)
        distances.append(distance(made, bench))
        assert Recovery().epochs(parameters, at) == epochs
    assert distances[3] < 0.8 * min(distances[:2])


@pytest.mark.parametrize(
    "loss", ["answers", "dist", "attention", "feature", "hidden", "relational"]
)
def test_recovery_gives_equal_digests_when_it_is_done_again(
    loss: str, bench: TorchBench, narrow: TorchVariant, tmp_path: Path
) -> None:
    at = context(bench, losses=(loss,), augmentation="flip_and_crop")
    one, _ = recovered(narrow, at, tmp_path / "one", effort="short")
    other, _ = recovered(narrow, at, tmp_path / "other", effort="short")
    assert one.digest == other.digest != narrow.digest


def test_recovery_keeps_what_the_plan_masks(bench: TorchBench, tmp_path: Path) -> None:
    sparse = Sparse().apply(bench, tmp_path / "sparse")
    made, _ = recovered(sparse, context(bench), tmp_path / "made", effort="full")
    weight = load_torch(made).get_submodule("3").weight
    assert isinstance(weight, torch.Tensor)
    assert (weight[0] == 0).all()
    assert (weight[1:] != load_torch(sparse).get_submodule("3").weight[1:]).all()  # type: ignore[index]


def on_sparse_target(at: Context) -> Context:
    """Where the runtime may have kernels for zeros, so that they are in the space."""
    return replace(at, machine=replace(at.machine, runtimes={"onnxruntime-gpu": "1.32"}))


def masked(bench: TorchBench, directory: Path, **given: Value) -> TorchVariant:
    """With parameters of another target: what is in the space depends on it, what is made not."""
    directory.mkdir()
    technique = Pruning()
    space = technique.space(bench.torch, on_sparse_target(bench.context))
    parameters = defaults(space, what="weights", **given)
    return technique.apply(bench.torch, parameters, bench.context, directory)


def zeros_of(model: TorchVariant) -> Mapping[str, torch.Tensor]:
    """By masked layer."""
    module = load_torch(model)
    (step,) = read_plan(model).steps
    return {n: module.get_parameter(f"{n}.weight").detach() == 0 for n in step.operations[MASKS]}


def n_zeros(model: TorchVariant) -> tuple[int, int]:
    """(zeros, weights)."""
    zeros = zeros_of(model).values()
    return sum(int(one.sum()) for one in zeros), sum(one.numel() for one in zeros)


def test_recovery_brings_all_zeros_at_once_when_it_only_recalibrates(
    bench: TorchBench, tmp_path: Path
) -> None:
    made = {}
    for schedule in ("one_shot", "gradual"):
        sparse = masked(bench, tmp_path / schedule, pattern="global", sparsity=0.8,
                        schedule=schedule)  # fmt: skip
        assert "80% of the weights of 3 layers" in sparse.notes[0]
        directory = tmp_path / f"{schedule} recalibrated"
        made[schedule], _ = recovered(sparse, context(bench), directory, effort="recalibrate")
    one_shot, gradual = (load_torch(one).state_dict() for one in made.values())
    assert all(torch.equal(one, gradual[name]) for name, one in one_shot.items())
    n, n_weights = n_zeros(made["gradual"])
    assert n == round(0.8 * n_weights)


@pytest.mark.parametrize(
    ("given", "sparsity"),
    [({"pattern": "global", "sparsity": 0.7}, 0.7), ({"pattern": "layer", "sparsity": 0.9}, 0.9),
     ({"pattern": "2:4"}, 0.5)],
    ids=["global", "layer", "2:4"],
)  # fmt: skip
@pytest.mark.parametrize("technique", [Recovery(), QuantizationAwareTraining()], ids=["", "int8"])
def test_zeros_that_come_in_training_are_as_many_as_were_asked_for(
    technique: Recovery | QuantizationAwareTraining,
    given: dict[str, Value],
    sparsity: float,
    bench: TorchBench,
    tmp_path: Path,
) -> None:
    sparse = masked(bench, tmp_path / "sparse", schedule="gradual", **given)
    assert n_zeros(sparse)[0] == 0
    parameters = defaults(technique.space(sparse, context(bench)), effort="short")
    (tmp_path / "made").mkdir()
    made = technique.apply(sparse, parameters, context(bench), tmp_path / "made")
    zeros = zeros_of(made)
    n, n_weights = n_zeros(made)
    by_layer = sum(round(sparsity * one.numel()) for one in zeros.values())
    wanted = round(sparsity * n_weights) if given["pattern"] == "global" else by_layer
    # In 8 bits some of the others are rounded to zero too.
    assert n == wanted if isinstance(technique, Recovery) else n >= wanted


def test_recovery_with_zeros_still_to_come_goes_on_where_it_was_killed(
    bench: TorchBench, tmp_path: Path
) -> None:
    sparse = masked(bench, tmp_path / "sparse", pattern="global", sparsity=0.8, schedule="gradual")
    at = context(bench, epochs=8.0)
    whole, _ = recovered(sparse, at, tmp_path / "whole", effort="full")
    kept = replace(at, checkpoints=tmp_path / "kept")
    dying = replace(kept, train=Dying(bench, n_reads=11))  # in the third of four epochs of zeros
    with pytest.raises(Killed):
        recovered(sparse, dying, tmp_path / "killed", effort="full")
    assert list((tmp_path / "kept").iterdir())
    again, _ = recovered(sparse, kept, tmp_path / "again", effort="full")
    assert again.digest == whole.digest


def test_zeros_by_either_schedule_are_variants_of_their_own_in_the_store(
    bench: TorchBench, tmp_path: Path
) -> None:
    at = on_sparse_target(context(bench))
    techniques = {one.traits.name: one for one in (Pruning(), Recovery())}
    found = {}
    with Store(tmp_path / "store.sqlite") as store:
        builder = Builder(store, bench.torch, techniques, at, bench.inputs)
        for schedule in ("one_shot", "gradual"):
            recipe = Recipe(bench.torch.kind)
            pruned: dict[str, Value] = {"what": "weights", "schedule": schedule}
            for name, given in (("pruning", pruned), ("recovery", {})):
                technique = techniques[name]
                parameters = defaults(technique.space(bench.torch, at), **given)
                recipe = recipe.then(technique.traits, parameters)
            built = builder.build(recipe.with_effort("short"))
            assert isinstance(built.model, TorchVariant)
            found[schedule] = builder.find(built.id)
            assert found[schedule] == built
    one_shot, gradual = found.values()
    assert one_shot is not None
    assert gradual is not None
    assert one_shot.model.digest != gradual.model.digest


def test_recovery_goes_on_where_it_was_killed_and_leaves_nothing(
    bench: TorchBench, narrow: TorchVariant, tmp_path: Path
) -> None:
    at = context(bench)
    whole, _ = recovered(narrow, at, tmp_path / "whole", effort="full")
    split = Dying(bench, n_reads=18)
    kept = tmp_path / "kept"
    with pytest.raises(Killed):
        recovered(
            narrow, replace(at, train=split, checkpoints=kept), tmp_path / "killed", effort="full"
        )
    (saved,) = kept.iterdir()
    assert saved.suffix == ".safetensors"
    counted = Dying(bench, n_reads=1000)
    again, _ = recovered(
        narrow, replace(at, train=counted, checkpoints=kept), tmp_path / "again", effort="full"
    )
    assert again.digest == whole.digest
    # Of 24 steps, three epochs of four had been kept; recalibration reads once before and after
    # layers are solved and at the end, solving them once, and so does the look at how images lie.
    assert counted.n_reads == 12 + 5
    assert not list(kept.iterdir())


def test_recovery_learns_from_the_teacher_alone_when_there_are_no_labels(
    bench: TorchBench, narrow: TorchVariant, tmp_path: Path
) -> None:
    at = replace(context(bench), train=Unlabelled(bench))
    made, parameters = recovered(narrow, at, tmp_path / "made", effort="full")
    assert parameters["alpha"] == 0.0
    assert distance(made, bench) < distance(narrow, bench)


@pytest.mark.parametrize(("kind", "learns"), [("embedding", "embedding"), ("custom", "values")])
def test_recovery_learns_answers_when_they_arent_classes(
    kind: str, learns: str, bench: TorchBench, narrow: TorchVariant, tmp_path: Path
) -> None:
    task = TaskSpec.model_construct(kind=kind)
    at = replace(context(bench), task=task)
    made, parameters = recovered(narrow, at, tmp_path / "made", effort="full")
    assert (parameters["learns"], parameters["alpha"]) == (learns, 0.0)
    assert "temperature" not in parameters
    assert distance(made, bench, learns) < 0.9 * distance(narrow, bench, learns)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param({"effort": "recalibrate"}, "recalibrated", id="no training"),
        pytest.param({"alpha": 0.1}, "distilled 6 epochs (full, 0.1 of labels)", id="both"),
        pytest.param({"alpha": 1.0}, "fine-tuned 6 epochs (full)", id="labels alone"),
        pytest.param(
            {"alpha": 0.1, "loss": "dist", "effort": "short"},
            "distilled 1 epochs (short, dist, 0.1 of labels)", id="another loss",
        ),
    ],
)  # fmt: skip
def test_recovery_says_what_it_did(given: dict[str, Value], words: str, bench: TorchBench) -> None:
    at = context(bench, alphas=(0.1, 1.0))
    technique = Recovery()
    parameters = defaults(technique.space(bench.torch, at), **{"effort": "full", **given})
    assert technique.describe(parameters) == words


def test_recovery_puts_the_specs_training_into_parameters_so_that_ids_cover_it(
    bench: TorchBench,
) -> None:
    space = Recovery().space(bench.torch, context(bench, learning_rate=0.5, patience=3))
    fixed = {name: one.default for name, one in space.items() if len(one.choices) == 1}  # type: ignore[union-attr]
    assert fixed == {
        "epochs": 6.0, "short_epochs": 1.0, "batch_size": 16, "weight_decay": 5e-4,
        "schedule": "one_cycle", "augmentation": "none", "precision": "fp32", "patience": 3,
        "embeddings": "kept", "optimizer": "sgd", "learning_rate": 0.5,
        "learns": "classes", "output": "logits",
        "reconstruction_samples": 512,
    }  # fmt: skip
    searched = {name: one.choices for name, one in space.items() if name not in fixed}  # type: ignore[union-attr]
    assert searched == {
        "effort": ("recalibrate", "short", "full"), "loss": ("answers", "dist"),
        "alpha": (0.1, 0.5), "temperature": (4.0, 2.0),
    }  # fmt: skip


def test_recovery_refuses_with_a_reason_when_it_cant_train(
    bench: TorchBench, tmp_path: Path
) -> None:
    technique = Recovery()
    assert technique.check(bench.torch, replace(bench.context, train=None)) == (
        "there is no training data"
    )
    flat = make_torch_bench(tmp_path, "nn.Sequential(nn.Flatten(), nn.Linear(64, 4))")
    inputs = tuple(one.model_copy(update={"shape": (64,)}) for one in flat.torch.source.inputs)
    source = replace(flat.torch.source, inputs=inputs)  # type: ignore[type-var]
    model = replace(flat.torch, source=source)
    reason = technique.check(model, context(bench, augmentation="flip"))
    assert reason is not None
    assert "training.augmentation is flip, and the model takes image [64]" in reason
    # Such a network has no batch normalization.
    assert technique.space(model, context(bench))["optimizer"].default == "adamw"


def test_recovery_comes_behind_a_decomposition_and_is_kept(
    bench: TorchBench, tmp_path: Path
) -> None:
    at = context(bench)
    techniques = {one.traits.name: one for one in (Decomposition(), Recovery())}
    with Store(tmp_path / "store.sqlite") as store:
        builder = Builder(store, bench.torch, techniques, at, bench.inputs)
        assert [o.traits.name for o in builder.options(Recipe(bench.torch.kind))] == [
            "decomposition"
        ]
        recipe = Recipe(bench.torch.kind)
        for technique in techniques.values():
            (option,) = [
                one for one in builder.options(recipe) if one.traits.name == technique.traits.name
            ]
            recipe = recipe.then(option.traits, defaults(option.space))
        built = builder.build(recipe.with_effort("short"))
        assert isinstance(built.model, TorchVariant)
        assert isinstance(load_torch(built.model).get_submodule("3"), nn.Sequential)


# --- students

STUDENT = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, {classes}),
    )

def broken():
    raise RuntimeError("no network today")
"""


def write_student(directory: Path, function: str = "build", classes: int = 4) -> Student:
    """A spec that names a student, as a study's techniques are made of it."""
    (directory / "small.py").write_text(STUDENT.format(classes=classes))
    path = directory / "spec.yaml"
    plain = "techniques: {exclude: [torch_compilation]}"
    text = path.read_text()
    assert plain in text
    named = (
        f"techniques: {{exclude: [torch_compilation], student: {{factory: 'small:{function}'}}}}"
    )
    path.write_text(text.replace(plain, named))
    student = enabled_techniques(read_spec(path))["student"]
    assert isinstance(student, Student)
    return student


LIKE_THE_BASE = """
import torch
from torch import nn

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("noise", torch.randn(4), persistent=False)

    def forward(self, x):
        return x + self.noise

def build():
    return nn.Sequential({layers})
"""


def student_of(directory: Path, layers: str, weights: nn.Module | None = None) -> Student:
    """Of these layers, with the weights of a module that has them."""
    (directory / "like.py").write_text(LIKE_THE_BASE.format(layers=layers))
    path = None
    if weights is not None:
        path = directory / "like.safetensors"
        save_file(weights.state_dict(), path)
    return Student(StudentSpec(factory=Importable("like", "build", directory), weights=path))


def as_student(student: Student, at: Context, bench: TorchBench, directory: Path) -> TorchVariant:
    directory.mkdir()
    return student.apply(bench.torch, defaults(student.space(bench.torch, at)), at, directory)


def test_a_students_layers_arent_solved_by_the_bases_of_their_names(tmp_path: Path) -> None:
    """Its layer 3 reads less than the base's, and what reads that one's outputs is its own."""
    bench = make_torch_bench(tmp_path)
    narrow = (
        "nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), "
        "nn.Conv2d(4, 16, 3, padding=1, stride=2), nn.ReLU(), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)"
    )
    at = context(bench, epochs=0.0, short_epochs=0.0)
    made = as_student(student_of(tmp_path, narrow), at, bench, tmp_path / "student")
    taught, _ = recovered(made, at, tmp_path / "taught", effort="recalibrate")
    before, after = load_torch(made), load_torch(taught)
    assert torch.equal(before.get_submodule("3").weight, after.get_submodule("3").weight)
    assert taught.notes == ()


def test_a_students_layer_that_begins_as_zeros_learns(tmp_path: Path) -> None:
    bench = make_torch_bench(tmp_path)
    layers = "nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)"
    begun = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        begun[3].weight.zero_()
        begun[1].weight[:, ::2] = 0
    at = context(bench, alphas=(0.0,))
    made = as_student(student_of(tmp_path, layers, begun), at, bench, tmp_path / "student")
    taught, _ = recovered(made, at, tmp_path / "taught", effort="full")
    for name in ("1", "3"):
        assert bool((load_torch(taught).get_submodule(name).weight != 0).all())


def test_a_student_is_rebuilt_with_what_its_factory_drew(tmp_path: Path) -> None:
    bench = make_torch_bench(tmp_path)
    layers = "nn.Flatten(), nn.Linear(64, 4), Noisy()"
    at = replace(context(bench), seed=1)
    made = as_student(student_of(tmp_path, layers), at, bench, tmp_path / "student")
    torch.manual_seed(1)
    nn.Linear(64, 4)
    drawn = torch.randn(4)
    assert torch.equal(load_torch(made)[2].noise, drawn)  # type: ignore[index]


def test_a_base_made_for_inference_is_recovered(tmp_path: Path) -> None:
    """No parameter of it may learn, as its factory gives it; where some may, the others stay."""
    bench = make_torch_bench(tmp_path)
    frozen = Path(tmp_path, "tiny.py")
    text = frozen.read_text()
    frozen.write_text(text + "\n\n_build = build\n\ndef build():\n"
                      "    return _build().requires_grad_(False)\n")  # fmt: skip
    at = context(bench)
    directory = tmp_path / "narrow"
    directory.mkdir()
    narrow = Narrow().apply(bench.torch, {"width": 0.5}, at, directory)
    taught, _ = recovered(narrow, at, tmp_path / "taught", effort="full")
    assert distance(taught, bench) < distance(narrow, bench)


def test_student_takes_the_bases_place_and_is_taught_by_it(tmp_path: Path) -> None:
    bench = make_torch_bench(tmp_path)
    student = write_student(tmp_path)
    at = context(bench, alphas=(0.0,))
    assert student.check(bench.torch, at) is None
    parameters = defaults(student.space(bench.torch, at))
    (tmp_path / "student").mkdir()
    made = student.apply(bench.torch, parameters, at, tmp_path / "student")
    assert student.describe(parameters) == "student small:build"
    taught, _ = recovered(made, at, tmp_path / "taught", effort="full")
    assert distance(taught, bench) < distance(made, bench)
    assert [name for name, _ in load_torch(taught).named_children()] == ["0", "1", "2", "3"]
    (tmp_path / "again").mkdir()
    again = student.apply(bench.torch, parameters, at, tmp_path / "again")
    assert again.digest == made.digest


@pytest.mark.parametrize(
    ("function", "classes", "reason"),
    [
        pytest.param("build", 7, "logits is [2, 7], the base's [2, 4]", id="other classes"),
        pytest.param("broken", 4, "small:broken failed: RuntimeError: no network", id="broken"),
    ],
)
def test_student_is_refused_with_a_reason_when_it_cant_take_the_bases_place(
    function: str, classes: int, reason: str, tmp_path: Path
) -> None:
    bench = make_torch_bench(tmp_path)
    refused = write_student(tmp_path, function, classes).check(bench.torch, bench.context)
    assert refused is not None
    assert reason in refused


def test_student_is_another_when_its_code_changes(tmp_path: Path) -> None:
    bench = make_torch_bench(tmp_path)
    student = write_student(tmp_path)
    before = defaults(student.space(bench.torch, bench.context))
    (tmp_path / "small.py").write_text(STUDENT.format(classes=4) + "\n# another\n")
    after = defaults(student.space(bench.torch, bench.context))
    assert before["factory"] == after["factory"]
    assert before["digest"] != after["digest"]
    with pytest.raises(ValueError, match="the plan has the student other:build"):
        student.restructure(nn.Identity(), {"factory": "other:build"})


# --- the spec


def test_loss_is_only_asked_for_where_answers_count(tmp_path: Path) -> None:
    bench = make_torch_bench(tmp_path)
    both = (1.0, 0.5)
    plain = context(bench, losses=("answers", "dist"), alphas=both)
    space = Recovery().space(bench.torch, plain)
    assert "loss" not in defaults(space, alpha=1.0)
    assert defaults(space, alpha=0.5)["loss"] == "answers"
    labels = context(bench, losses=("answers", "dist"), alphas=(1.0,))
    assert "loss" not in Recovery().space(bench.torch, labels)
    further = Recovery().space(bench.torch, context(bench, losses=("attention",), alphas=both))
    assert defaults(further, alpha=1.0)["loss"] == "attention"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        pytest.param("{epochs: 1, short_epochs: 2}", "want short_epochs of at most epochs (1)",
                     id="short is longer"),
        pytest.param("{losses: [best]}", "training.losses.0: got 'best'", id="unknown loss"),
        pytest.param("{alphas: [1.5]}", "training.alphas.0: got 1.5", id="alpha above 1"),
        pytest.param("{alphas: [0.5, 0.5]}", "want every value once in alphas", id="twice"),
        pytest.param("{batch_size: 1}", "training.batch_size: got 1", id="batch of one"),
        pytest.param("{learning_rate: 0}", "training.learning_rate: got 0", id="no rate"),
    ],
)  # fmt: skip
def test_spec_refuses_training_by_name(training: str, message: str, tmp_path: Path) -> None:
    make_spec(tmp_path, training)
    with pytest.raises(SpecInvalid) as caught:
        read_spec(tmp_path / "spec.yaml")
    assert message in str(caught.value)


def test_spec_takes_training_as_written(tmp_path: Path) -> None:
    make_spec(tmp_path, "{epochs: 8, augmentation: flip, losses: [dist], alphas: [0, 1]}")
    training = read_spec(tmp_path / "spec.yaml").training
    assert training.epochs == 8.0
    assert training.alphas == (0.0, 1.0)
    assert training.losses == ("dist",)
    assert np.isclose(training.short_epochs, 0.5)


def make_spec(directory: Path, training: str) -> None:
    path = write_study(directory)
    path.write_text(f"{path.read_text()}\ntraining: {training}\n")
