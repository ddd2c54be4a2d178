"""Recipes and ids: what can't be written, and what makes two variants the same."""

from dataclasses import asdict, replace

import pytest

from optimizer.recipe import Choice, Needs, Recipe, Traits, step_of, steps_with_ids
from optimizer.variant import Kind, Stage, variant_id


def traits(name: str, stage: Stage, accepts: Kind, gives: Kind, **more: object) -> Traits:
    return replace(Traits(name, "1", stage, accepts, gives), **more)


PRUNE = traits("pruning", Stage.PRUNE, Kind.TORCH, Kind.TORCH)
DECOMPOSE = traits("decomposition", Stage.DECOMPOSE, Kind.TORCH, Kind.TORCH)
RECOVER = traits("distillation", Stage.RECOVER, Kind.TORCH, Kind.TORCH)
EXPORT = traits("export", Stage.EXPORT, Kind.TORCH, Kind.ONNX)
INT8 = traits("quantization", Stage.PRECISION, Kind.ONNX, Kind.ONNX, needs=Needs.UNLABELLED)
COMPILE = traits("compilation", Stage.COMPILE, Kind.ONNX, Kind.ENGINE)


def recipe_of(*steps: Traits) -> Recipe:
    recipe = Recipe(Kind.TORCH)
    for step in steps:
        recipe = recipe.then(step, {})
    return recipe


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param((PRUNE, DECOMPOSE, RECOVER, EXPORT, INT8, COMPILE), id="all stages"),
        pytest.param((DECOMPOSE, PRUNE, EXPORT, COMPILE), id="decompose before prune"),
        pytest.param((EXPORT, COMPILE), id="no optional stage"),
    ],
)
def test_recipe_takes_steps_when_stages_rise(steps: tuple[Traits, ...]) -> None:
    assert recipe_of(*steps).gives is Kind.ENGINE


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        pytest.param((EXPORT, PRUNE), "accepts torch models, got onnx", id="torch step after it"),
        pytest.param((RECOVER, PRUNE), "can't come after recover", id="a stage goes back"),
        pytest.param((PRUNE, PRUNE), "can't come after prune", id="a stage comes twice"),
        pytest.param((EXPORT, COMPILE, INT8), "accepts onnx models", id="int8 after compilation"),
    ],
)
def test_recipe_refuses_step_when_order_is_illegal(steps: tuple[Traits, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        recipe_of(*steps)


def test_recipe_is_a_value_when_parameters_change_outside() -> None:
    parameters = {"calibration": "minmax"}
    recipe = Recipe(Kind.ONNX).then(INT8, parameters)
    parameters["calibration"] = "entropy"
    assert recipe == Recipe(Kind.ONNX).then(INT8, {"calibration": "minmax"})
    assert hash(recipe) == hash(Recipe(Kind.ONNX).then(INT8, {"calibration": "minmax"}))


def test_variant_id_covers_all_that_decides_the_result() -> None:
    step = asdict(step_of(Choice(INT8, {"calibration": "minmax"}), seed=0))
    same = variant_id("parent", step, "data")
    assert variant_id("parent", dict(step), "data") == same
    others = [
        variant_id("another", step, "data"),
        variant_id("parent", step, "other data"),
        variant_id("parent", step | {"technique_version": "2"}, "data"),
        variant_id("parent", step | {"parameters": {"calibration": "entropy"}}, "data"),
        variant_id("parent", step | {"seed": 1}, "data"),
        variant_id("parent", step | {"packages": {"onnxruntime": "0"}}, "data"),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_steps_share_ids_when_recipes_share_a_prefix() -> None:
    short = steps_with_ids(recipe_of(EXPORT, COMPILE), "base", 0, "data")
    long = steps_with_ids(recipe_of(EXPORT, INT8, COMPILE), "base", 0, "data")
    assert short[0] == long[0]
    assert short[1][1] != long[2][1]


def test_step_id_ignores_data_when_the_technique_uses_none() -> None:
    one = steps_with_ids(recipe_of(EXPORT, INT8), "base", 0, "data")
    other = steps_with_ids(recipe_of(EXPORT, INT8), "base", 0, "other data")
    assert one[0][1] == other[0][1]
    assert one[1][1] != other[1][1]


def test_step_id_covers_all_of_train_when_the_technique_trains() -> None:
    tune = Traits("tune", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, Needs.UNLABELLED)
    recipe = Recipe(Kind.TORCH).then(tune, {"effort": "full"})
    ids = {steps_with_ids(recipe, "base", 0, "data", train)[0][1] for train in ("one", "other")}
    assert len(ids) == 2
