"""Recipes and ids: what can't be written, and what makes two variants the same."""

from dataclasses import asdict, replace

import pytest

from optimizer.recipe import Choice, Needs, Recipe, Traits, step_of, steps_with_ids
from optimizer.variant import Kind, Stage, variant_id


def traits(name: str, stage: Stage, accepts: Kind, gives: Kind, **more: object) -> Traits:
    return replace(Traits(name, "1", stage, accepts, gives), **more)


PRUNE = traits("pruning", Stage.PRUNE, Kind.TORCH, Kind.TORCH)
DECOMPOSE = traits("decomposition", Stage.DECOMPOSE, Kind.TORCH, Kind.TORCH)
SPARSIFY = traits(
    "sparsity_training", Stage.SPARSIFY, Kind.TORCH, Kind.TORCH, needs=Needs.UNLABELLED,
    prepares=Stage.PRUNE, wants=(("what", ("channels", "both")),), shares=("residual",),
)  # fmt: skip
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
        pytest.param((PRUNE, SPARSIFY), "can't come after prune", id="sparsity after pruning"),
        pytest.param((PRUNE, PRUNE), "can't come after prune", id="a stage comes twice"),
        pytest.param((EXPORT, COMPILE, INT8), "accepts onnx models", id="int8 after compilation"),
    ],
)
def test_recipe_refuses_step_when_order_is_illegal(steps: tuple[Traits, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        recipe_of(*steps)


SPARSE = Recipe(Kind.TORCH).then(SPARSIFY, {"residual": False, "epochs": 2.0})


def test_recipe_lacks_the_stage_that_a_step_prepares_for_until_it_comes() -> None:
    assert SPARSE.lacks == {Stage.PRUNE}
    assert SPARSE.then(PRUNE, {"what": "both", "residual": False}).lacks == frozenset()


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        pytest.param(
            {"what": "blocks", "residual": False}, "what: got blocks, want channels or both",
            id="not for what it prepares",
        ),
        pytest.param(
            {"what": "channels", "residual": True}, "residual: got True, want False",
            id="not as it was prepared",
        ),
        pytest.param({"width": 0.5}, "what: got None", id="without the parameter"),
    ],
)  # fmt: skip
def test_recipe_refuses_the_step_that_was_prepared_for_when_it_is(
    parameters: dict[str, object], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"pruning: {problem}"):
        SPARSE.then(PRUNE, parameters)  # type: ignore[arg-type]
    assert Recipe(Kind.TORCH).then(PRUNE, parameters).choices  # type: ignore[arg-type]


def test_step_prepares_only_with_the_parameters_that_it_prepares_with() -> None:
    search = traits(
        "architecture", Stage.ARCHITECTURE, Kind.TORCH, Kind.TORCH, prepares=Stage.PRECISION,
        prepares_when=("precision", ("int8",)), wants=(("format", ("static",)),),
    )  # fmt: skip
    binding, free = (
        Recipe(Kind.TORCH).then(search, {"precision": given}).then(EXPORT, {})
        for given in ("int8", "searched")
    )
    assert binding.lacks == {Stage.PRECISION}
    assert binding.wanted(Stage.PRECISION) == {"format": ("static",)}
    with pytest.raises(ValueError, match="format: got dynamic, want static"):
        binding.then(INT8, {"format": "dynamic"})
    assert free.lacks == frozenset()
    assert free.then(INT8, {"format": "dynamic"}).choices


def test_skeleton_is_without_what_changes_structure_or_weights() -> None:
    recipe = SPARSE.then(PRUNE, {"what": "both", "residual": False}).then(RECOVER, {})
    assert recipe.then(EXPORT, {}).skeleton() == Recipe(Kind.TORCH).then(EXPORT, {})


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


@pytest.mark.parametrize(
    ("stage", "parameters"),
    [
        pytest.param(Stage.RECOVER, {"effort": "full"}, id="by the rung"),
        pytest.param(Stage.SPARSIFY, {"epochs": 2.0}, id="the same on every rung"),
    ],
)
def test_step_id_covers_all_of_train_when_the_technique_trains(
    stage: Stage, parameters: dict[str, str | float]
) -> None:
    tune = Traits("tune", "1", stage, Kind.TORCH, Kind.TORCH, Needs.UNLABELLED)
    recipe = Recipe(Kind.TORCH).then(tune, parameters)
    ids = {steps_with_ids(recipe, "base", 0, "data", train)[0][1] for train in ("one", "other")}
    assert len(ids) == 2


def test_step_id_covers_train_and_calibration_samples_when_the_technique_uses_both() -> None:
    technique = replace(PRUNE, needs=Needs.UNLABELLED, calibrates=True)
    plain, trained = (Recipe(Kind.TORCH).then(technique, one) for one in ({}, {"epochs": 2.0}))
    data = [("a", "one"), ("a", "other"), ("b", "one")]
    ids = [
        {steps_with_ids(recipe, "base", 0, calibration, train)[0][1] for calibration, train in data}
        for recipe in (plain, trained)
    ]
    assert [len(one) for one in ids] == [2, 3]
