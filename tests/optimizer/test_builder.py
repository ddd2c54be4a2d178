"""The builder: prefixes that are built once, and techniques that misbehave."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from optimizer.builder import Builder
from optimizer.errors import TechniqueFailed
from optimizer.recipe import EFFORT, EPOCHS, Needs, Recipe, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.store import Store
from optimizer.techniques import Context, Technique, load_technique
from optimizer.variant import Kind, Model, Stage, TorchVariant
from tests.optimizer.synthetic import N_STEPS, Narrow, NotANumber, Tune
from tests.optimizer.workbench import Workbench, make_workbench


class Counted(Narrow):
    """Counts how often it is asked to work, and fails for one of its widths."""

    def __init__(self) -> None:
        self.n_applied = 0

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        self.n_applied += 1
        if parameters["width"] == 0.75:
            raise RuntimeError("a layer without a name")
        return super().apply(model, parameters, context, directory)


class Costed(Tune):
    """Says what it trains."""

    def epochs(self, parameters: Parameters, context: Context) -> float:
        return 1.5 * N_STEPS[str(parameters[EFFORT])]


class Speechless(Tune):
    """Neither says what it trains nor describes itself."""

    traits = Traits(
        "speechless", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, Needs.UNLABELLED,
        preserves=False,
    )  # fmt: skip

    def describe(self, parameters: Parameters) -> str:
        raise KeyError("effort")

    def epochs(self, parameters: Parameters, context: Context) -> float:
        raise AttributeError("no schedule")


class Unspaced(Narrow):
    """Can't tell its parameters."""

    def space(self, model: Model, context: Context) -> Space:
        raise ZeroDivisionError("no channels")


class Early(Tune):
    """Trains before what it prepares for, as much on every rung."""

    traits = Traits(
        "early", "1", Stage.SPARSIFY, Kind.TORCH, Kind.TORCH, Needs.UNLABELLED, ("torch",),
        preserves=False, prepares=Stage.PRUNE,
    )  # fmt: skip

    def space(self, model: Model, context: Context) -> Space:
        return {EPOCHS: Categorical((2.5,))}

    def describe(self, parameters: Parameters) -> str:
        return "early"

    def epochs(self, parameters: Parameters, context: Context) -> float:
        return float(parameters[EPOCHS])

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        return super().apply(model, {EFFORT: "short"}, context, directory)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("study"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def builder(bench: Workbench, store: Store, *given: Technique) -> Builder:
    known = [*given, load_technique("export")]
    techniques = {one.traits.name: one for one in known}
    return Builder(store, bench.torch, techniques, bench.context, bench.inputs)


def narrowed(technique: Technique, width: float = 0.5) -> Recipe:
    return Recipe(Kind.TORCH).then(technique.traits, {"width": width})


def test_prefix_is_built_once_when_recipes_and_studies_share_it(
    bench: Workbench, store: Store
) -> None:
    narrow, export = Counted(), load_technique("export")
    one = builder(bench, store, narrow)
    recipe = narrowed(narrow)
    first = one.build(recipe)
    exported = one.build(recipe.then(export.traits, {}))
    builder(bench, store, narrow).build(recipe)
    assert narrow.n_applied == 1
    assert exported.parent_id == first.id
    assert (first.id, exported.id) == one.ids(recipe.then(export.traits, {}))


def test_step_that_failed_is_not_tried_again_in_any_recipe(bench: Workbench, store: Store) -> None:
    narrow, export = Counted(), load_technique("export")
    one = builder(bench, store, narrow)
    recipe = narrowed(narrow, 0.75)
    for tried in (recipe, recipe, recipe.then(export.traits, {})):
        with pytest.raises(TechniqueFailed) as caught:
            one.build(tried)
        assert str(caught.value) == "narrow failed: RuntimeError: a layer without a name"
        assert one.failed_id(tried) == one.variant_id(recipe)
    assert narrow.n_applied == 1
    assert one.failed_id(narrowed(narrow)) == ""


def test_step_fails_by_name_when_its_training_gives_nan(bench: Workbench, store: Store) -> None:
    one = builder(bench, store, NotANumber())
    recipe = Recipe(Kind.TORCH).then(NotANumber.traits, {EFFORT: "short"})
    with pytest.raises(TechniqueFailed, match=r"^tune failed: .*NaN"):
        one.build(recipe)
    assert one.find(one.variant_id(recipe)) is None


def test_step_fails_by_name_when_its_parameters_are_not_in_its_space(
    bench: Workbench, store: Store
) -> None:
    with pytest.raises(TechniqueFailed, match=r"^narrow failed: ValueError: width: got 0.25"):
        builder(bench, store, Counted()).build(narrowed(Counted(), 0.25))


def test_option_fails_by_name_when_a_technique_cannot_tell_its_space(
    bench: Workbench, store: Store
) -> None:
    one = builder(bench, store, Unspaced())
    with pytest.raises(TechniqueFailed, match=r"^narrow failed: ZeroDivisionError: no channels"):
        one.options(Recipe(Kind.TORCH))


def test_recovery_is_no_option_when_nothing_has_changed_the_network(
    bench: Workbench, store: Store
) -> None:
    one = builder(bench, store, Counted(), Costed())
    names = [option.traits.name for option in one.options(Recipe(Kind.TORCH))]
    assert names == ["narrow", "export"]
    names = [option.traits.name for option in one.options(narrowed(Narrow()))]
    assert names == ["tune", "export"]


def test_epochs_are_those_of_the_steps_that_train(bench: Workbench, store: Store) -> None:
    one = builder(bench, store, Counted(), Costed())
    recipe = narrowed(Narrow()).then(Costed.traits, {EFFORT: "full"})
    assert one.epochs(narrowed(Narrow())) == 0
    assert [one.epochs(recipe.with_effort(name)) for name in N_STEPS] == [0.0, 3.0, 9.0]


def early(technique: Technique) -> Recipe:
    return Recipe(Kind.TORCH).then(technique.traits, {EPOCHS: 2.5})


def test_epochs_that_are_the_same_on_every_rung_are_told_by_the_variant_that_takes_them(
    bench: Workbench, store: Store
) -> None:
    one = builder(bench, store, Early(), Counted(), Costed())
    recipe = early(Early()).then(Narrow.traits, {"width": 0.5})
    tuned = recipe.then(Costed.traits, {EFFORT: "short"})
    assert one.epochs(tuned) == 3.0
    assert one.epochs_first(tuned) == {one.ids(recipe)[0]: 2.5}
    assert one.epochs_first(narrowed(Narrow())) == {}


def test_step_that_prepares_for_pruning_is_an_option_before_it_alone(
    bench: Workbench, store: Store
) -> None:
    one = builder(bench, store, Early(), Counted(), Costed())
    for recipe, names in (
        (Recipe(Kind.TORCH), ["early", "narrow", "export"]),
        (early(Early()), ["narrow", "export"]),
        (narrowed(Narrow()), ["tune", "export"]),
    ):
        assert [option.traits.name for option in one.options(recipe)] == names
    alone = builder(bench, store, Early())
    assert [option.traits.name for option in alone.options(Recipe(Kind.TORCH))] == ["export"]


def test_epochs_fail_by_name_and_the_label_is_the_name_when_a_technique_cannot_tell_them(
    bench: Workbench, store: Store
) -> None:
    one = builder(bench, store, Counted(), Speechless())
    recipe = narrowed(Narrow()).then(Speechless.traits, {EFFORT: "full"})
    with pytest.raises(TechniqueFailed, match=r"^speechless failed: AttributeError: no schedule"):
        one.epochs(recipe)
    assert one.label(recipe) == "0.5 of the channels, speechless"


def test_blocks_are_those_of_the_changed_network_and_nothing_of_it_is_kept(
    bench: Workbench, store: Store
) -> None:
    narrow = Counted()
    one = builder(bench, store, narrow, Tune())
    recipe = narrowed(narrow).then(Tune.traits, {EFFORT: "full"})
    found = one.blocks(recipe)
    assert found is not None
    shapes = sorted((block.input_shape, block.n_outputs) for block in found)
    assert shapes == [((1, 8, 8), 8), ((8, 8, 8), 16), ((16,), 4)]
    assert one.find(one.ids(recipe)[0]) is None
    assert one.blocks(narrowed(narrow, 0.75)) is None


def test_blocks_wait_for_the_training_that_comes_before_the_structure_is_known(
    bench: Workbench, store: Store
) -> None:
    first = Early()
    one = builder(bench, store, first, Counted())
    recipe = early(first).then(Narrow.traits, {"width": 0.5})
    assert one.blocks(recipe) is None
    assert one.find(one.ids(recipe)[0]) is None
    one.build(early(first))
    assert one.blocks(recipe) == one.blocks(narrowed(Narrow()))
