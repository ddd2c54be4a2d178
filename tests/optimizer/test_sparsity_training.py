"""Sparsity training: its penalties against their formulas, and what they do to a network."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from optimizer.builder import Builder
from optimizer.errors import SpecInvalid
from optimizer.model_source import source_digest
from optimizer.pruning.graph import InputShape, trace
from optimizer.pruning.groups import Group, network_of
from optimizer.pruning.scales import norm_scales, scales_of
from optimizer.recipe import EPOCHS, Recipe
from optimizer.space import Categorical, Value, defaults
from optimizer.spec import TrainingSpec, read_spec
from optimizer.store import Store
from optimizer.techniques import Context, load_technique
from optimizer.techniques.pruning import Pruning
from optimizer.techniques.sparsity_training import SparsityTraining, scopes_of
from optimizer.torch_variant import load_torch, read_plan
from optimizer.training.batches import Batch, Batches
from optimizer.training.distillation import Distillation, Mixture
from optimizer.training.loop import Settings, train
from optimizer.training.sparsity import PENALTIES, Penalized, group_lasso, mean_scales
from optimizer.training.teacher import answering
from optimizer.variant import TorchModel, TorchVariant
from tests.optimizer.networks import TOPOLOGIES, case, inputs_of
from tests.optimizer.test_recovery_technique import Dying, Killed
from tests.optimizer.tiny_study import write_study
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

NOISE = tuple(range(1, 16, 2))
"""Channels of the tiny network that hardly anything reads."""
IMAGE = InputShape("FP32", (1, 8, 8))
NETWORKS = ("resnet", "resnext", "densenet")


class Zero:
    """A loss that has no opinion."""

    def parameters(self) -> tuple[nn.Parameter, ...]:
        return ()

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        return torch.zeros(())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    """The tiny study, whose network reads next to nothing of half of its first channels."""
    directory = tmp_path_factory.mktemp("study")
    made = make_torch_bench(directory)
    state = load_file(directory / "tiny.safetensors")
    state["3.weight"] *= 8.0  # so that what is read isn't cheaper to have with smaller scales
    state["3.weight"][:, list(NOISE)] *= 1e-3
    save_file(state, directory / "tiny.safetensors")
    return replace(made, torch=TorchModel(made.torch.source, source_digest(made.torch.source)))


def context(bench: TorchBench, **training: object) -> Context:
    quick = {
        "batch_size": 16, "learning_rate": 0.05, "alphas": (0.0,), "sparsity_epochs": 20.0,
        "sparsity_strengths": (0.05, 0.01),
    }  # fmt: skip
    return replace(bench.context, training=TrainingSpec(**{**quick, **training}))  # type: ignore[arg-type]


def sparsified(model: TorchModel, at: Context, directory: Path, **given: Value) -> TorchVariant:
    directory.mkdir()
    technique = SparsityTraining()
    assert technique.check(model, at) is None
    parameters = defaults(technique.space(model, at), **given)
    return technique.apply(model, parameters, at, directory)


# --- the penalties


def slow_penalty(form: str, module: nn.Module, groups: list[Group]) -> float:
    """Unit by unit, by each of its scales."""
    norms = {name: one.detach().double().numpy() for name, one in norm_scales(module).items()}
    total = 0.0
    for group in groups:
        for unit in range(len(group.units)):
            scales = [
                float(norms[name][index])
                for (name, _), ids in group.places.items()
                if name in norms
                for index in ids[unit]
            ]
            if form == "l1":
                total += sum(abs(one) for one in scales)
            else:
                total += len(scales) ** 0.5 * sum(one**2 for one in scales) ** 0.5
    return total


@pytest.mark.parametrize("form", sorted(PENALTIES))
@pytest.mark.parametrize("name", NETWORKS)
def test_penalty_is_its_formula_when_that_is_written_unit_by_unit(name: str, form: str) -> None:
    module, groups = case(name).module(), case(name).network.in_scope(residual=True)
    for index, scale in enumerate(norm_scales(module).values()):
        with torch.no_grad():
            scale[::2] *= -1 - index  # of either sign, and of different sizes
    batch = Batch(np.arange(2), inputs_of(TOPOLOGIES[name].inputs, 2), None)
    scales = scales_of(module, groups)
    loss = Penalized(Zero(), scales, form, 0.25)(module, batch)
    expected = 0.25 * slow_penalty(form, module, groups)
    assert expected > 0
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_forms_are_equal_when_each_unit_has_one_scale() -> None:
    module = case("vgg").module()
    scales = scales_of(module, case("vgg").network.groups)
    one, other = (float(penalty(scales).detach()) for penalty in PENALTIES.values())
    assert scales.n_units == 8  # of the three groups one is normalized
    assert one == pytest.approx(other, rel=1e-6)


def test_coupled_scales_shrink_in_proportion_when_the_group_is_penalized() -> None:
    module, network = case("resnet").module(), case("resnet").network
    (stem,) = [group for group in network.groups if group.name == "0.0"]
    scales = scales_of(module, [stem])
    before = [one.detach().clone() for one in scales.tensors]
    assert len(before) == 2  # of the stem, and of the block that is added to it
    for _ in range(20):
        (slope,) = [torch.autograd.grad(group_lasso(scales), scales.tensors)]
        with torch.no_grad():
            for tensor, step in zip(scales.tensors, slope, strict=True):
                tensor -= 0.01 * step
    shares = [now.detach() / then for now, then in zip(scales.tensors, before, strict=True)]
    torch.testing.assert_close(shares[0], shares[1], rtol=1e-5, atol=0)
    assert (shares[0] < 0.9).all()


@pytest.mark.parametrize("form", sorted(PENALTIES))
def test_penalty_pulls_at_no_scale_when_all_are_zero(form: str) -> None:
    module = case("resnet").module()
    for one in norm_scales(module).values():
        nn.init.zeros_(one)
    scales = scales_of(module, case("resnet").network.groups)
    for slope in torch.autograd.grad(PENALTIES[form](scales), scales.tensors):
        assert torch.equal(slope, torch.zeros_like(slope))


@pytest.mark.parametrize(
    ("form", "strength", "problem"),
    [
        ("l2", 0.1, r"form: got 'l2', want one of group, l1"),
        ("l1", -0.1, r"strength: got -0\.1, want at least 0"),
        ("l1", float("nan"), "strength: got nan, want at least 0"),
    ],
)
def test_penalty_is_refused_with_what_is_allowed(form: str, strength: float, problem: str) -> None:
    scales = scales_of(case("vgg").module(), case("vgg").network.groups)
    with pytest.raises(ValueError, match=problem):
        Penalized(Zero(), scales, form, strength)


def test_training_is_the_plain_one_when_the_strength_is_zero(bench: TorchBench) -> None:
    assert bench.context.train is not None
    data = Batches(bench.context.train, ["image"])
    groups = network_of(trace(load_torch(bench.torch), [IMAGE])).groups
    settings = Settings(epochs=2, batch_size=16, learning_rate=0.05, seed=3)
    found = []
    for strength in (None, 0.0, 0.1):
        module = load_torch(bench.torch)
        loss = Distillation(Mixture(alpha=1.0), answering(["logits"], "logits"), None)
        if strength is None:
            train(module, data, loss, settings)
        else:
            scales = scales_of(module, groups)
            train(module, data, Penalized(loss, scales, "group", strength), settings)
        found.append(torch.cat([one.flatten() for one in module.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- the technique


def test_channels_that_nothing_reads_shrink_and_are_what_pruning_takes(
    bench: TorchBench, tmp_path: Path
) -> None:
    at = context(bench)
    made = sparsified(bench.torch, at, tmp_path / "made")
    scales = load_torch(made).state_dict()["1.weight"].abs()
    is_noise = torch.isin(torch.arange(16), torch.tensor(NOISE))
    assert scales[is_noise].max() < 0.3 * scales[~is_noise].min()
    assert made.notes[-1] == "8 of 16 units have scales below 10% of the mean"

    technique = Pruning()
    parameters = defaults(technique.space(made, at), criterion="bn_scale", ratio=0.4)
    directory = tmp_path / "pruned"
    directory.mkdir()
    (step,) = read_plan(technique.apply(made, parameters, at, directory)).steps
    kept = {(name, axis): stay for name, axis, stay in step.operations["widths"]["kept"]}
    assert sorted({*range(16)} - {*kept["1.weight", 0]}) == list(NOISE)


def test_stronger_penalty_leaves_smaller_scales(bench: TorchBench, tmp_path: Path) -> None:
    at, groups = (
        context(bench, sparsity_epochs=5.0),
        network_of(trace(load_torch(bench.torch), [IMAGE])).groups,
    )
    means = []
    for strength in (0.01, 0.05):
        made = sparsified(bench.torch, at, tmp_path / str(strength), strength=strength)
        means.append(float(mean_scales(scales_of(load_torch(made), groups)).mean()))
    assert means[1] < means[0] < 1


def test_training_gives_equal_digests_and_the_structure_that_it_was_given(
    bench: TorchBench, tmp_path: Path
) -> None:
    at = context(bench, sparsity_epochs=1.0, augmentation="flip")
    one, other = (sparsified(bench.torch, at, tmp_path / name) for name in ("one", "other"))
    assert one.digest == other.digest
    assert read_plan(one).steps == ()
    assert repr(load_torch(one)) == repr(load_torch(bench.torch))


def test_training_goes_on_where_it_was_killed_and_leaves_nothing(
    bench: TorchBench, tmp_path: Path
) -> None:
    at, kept = context(bench, sparsity_epochs=4.0), tmp_path / "kept"
    whole = sparsified(bench.torch, at, tmp_path / "whole")
    dying = replace(at, train=Dying(bench, n_reads=10), checkpoints=kept)
    with pytest.raises(Killed):
        sparsified(bench.torch, dying, tmp_path / "killed")
    assert len(list(kept.iterdir())) == 1
    counted = Dying(bench, n_reads=1000)
    at = replace(at, train=counted, checkpoints=kept)
    assert sparsified(bench.torch, at, tmp_path / "again").digest == whole.digest
    # Of 16 steps, two epochs of four had been kept; before them it is found out how images may lie,
    # behind them statistics are taken anew.
    assert counted.n_reads == 8 + 2
    assert not list(kept.iterdir())


def test_parameters_have_the_specs_choices_and_its_training(bench: TorchBench) -> None:
    at = context(bench, patience=3, alphas=(0.25, 1.0), sparsity_forms=("l1",))
    technique = SparsityTraining()
    space = technique.space(bench.torch, at)
    assert {name: one.choices for name, one in space.items() if isinstance(one, Categorical)} == {
        "form": ("l1",), "strength": (0.05, 0.01), "residual": (False,), "epochs": (20.0,),
        "loss": ("answers",), "alpha": (0.25,), "temperature": (4.0,), "batch_size": (16,),
        "weight_decay": (5e-4,), "schedule": ("one_cycle",), "augmentation": ("none",),
        "precision": ("fp32",), "embeddings": ("kept",), "patience": (0,), "optimizer": ("sgd",),
        "learning_rate": (0.05,), "learns": ("classes",), "output": ("logits",),
    }  # fmt: skip
    parameters = defaults(space)
    assert technique.epochs(parameters, at) == 20.0
    assert technique.describe(parameters) == "20 epochs for sparse scales (l1 0.05)"


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        pytest.param("resnet", (False, True), id="both"),
        pytest.param("vgg", (False,), id="none of them residual"),
        pytest.param("decoder", (), id="no scales"),
    ],
)
def test_scales_of_residual_streams_are_a_choice_when_there_are_others_too(
    name: str, choices: tuple[bool, ...]
) -> None:
    assert scopes_of(case(name).module(), case(name).network) == choices


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        pytest.param(
            "nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))",
            "no batch normalization of channels that can go", id="none",
        ),
        pytest.param(
            "nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4))",
            "no batch normalization of channels that can go", id="of the inputs alone",
        ),
    ],
)  # fmt: skip
def test_training_is_refused_when_the_model_has_no_scale_to_shrink(
    network: str, reason: str, tmp_path: Path
) -> None:
    one = make_torch_bench(tmp_path, network)
    refusal = SparsityTraining().check(one.torch, context(one))
    assert refusal is not None
    assert reason in refusal


def test_training_is_refused_when_there_is_nothing_to_train_on(bench: TorchBench) -> None:
    at = replace(context(bench), train=None)
    assert SparsityTraining().check(bench.torch, at) == "there is no training data"


def test_training_is_an_option_where_pruning_is_and_prunes_by_its_scales(
    bench: TorchBench, tmp_path: Path
) -> None:
    names = ("sparsity_training", "pruning", "recovery", "export")
    every = {name: load_technique(name) for name in names}
    with Store(tmp_path / "store.sqlite") as store:
        for known, wanted in (
            (every, {"sparsity_training", "pruning", "export"}),
            ({n: one for n, one in every.items() if n != "pruning"}, {"export"}),
        ):
            builder = Builder(store, bench.torch, known, context(bench), bench.inputs)
            options = builder.options(Recipe(bench.torch.kind))
            assert {option.traits.name for option in options} == wanted


@pytest.mark.parametrize("left_out", ["pruning", "recovery"])
def test_spec_refuses_sparsity_training_when_a_step_behind_it_is_left_out(
    left_out: str, tmp_path: Path
) -> None:
    path, plain = write_study(tmp_path), "techniques: {exclude: [torch_compilation]}"
    included = [one for one in ("sparsity_training", "pruning", "compilation") if one != left_out]
    excluded = "[recovery]" if left_out == "recovery" else "[]"
    given = f"techniques: {{include: [{', '.join(included)}], exclude: {excluded}}}"
    path.write_text(path.read_text().replace(plain, given))
    with pytest.raises(SpecInvalid, match="want pruning and recovery among those left"):
        read_spec(path)
    whole = "techniques: {include: [pruning, compilation, sparsity_training]}"
    path.write_text(path.read_text().replace(given, whole))
    assert read_spec(path).techniques.enabled == (
        "sparsity_training", "pruning", "recovery", "compilation",
    )  # fmt: skip


def test_recipe_carries_its_epochs_when_it_is_a_step(bench: TorchBench) -> None:
    technique = SparsityTraining()
    parameters = defaults(technique.space(bench.torch, context(bench)))
    recipe = Recipe(bench.torch.kind).then(technique.traits, parameters)
    assert recipe.choices[0].parameters[EPOCHS] == 20.0
    assert recipe.choices[0].trains_first
    assert not recipe.trains
