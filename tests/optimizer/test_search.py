"""The search on synthetic landscapes, whose optima are known, without models."""

from collections.abc import Sequence

import pytest

from optimizer.errors import TechniqueFailed
from optimizer.recipe import Recipe, Traits
from optimizer.search.coordinator import Answer, Coordinator, Trial
from optimizer.search.landscape import Decisions, Landscape, Option, baselines, remembered, walk
from optimizer.space import Categorical, Distribution, Number, Value
from optimizer.variant import Kind, Stage

EXPORT = Traits("export", "1", Stage.EXPORT, Kind.TORCH, Kind.ONNX, optional=False)
INT8 = Traits("quantization", "1", Stage.PRECISION, Kind.ONNX, Kind.ONNX)
COMPILE = Traits("compilation", "1", Stage.COMPILE, Kind.ONNX, Kind.ENGINE, optional=False)

INT8_SPACE = {
    "calibration": Categorical(("minmax", "percentile")),
    "percentile": Number(99.0, 100.0, 99.9, when={"calibration": ("percentile",)}),
}


def landscape(recipe: Recipe) -> Sequence[Option]:
    """bf16 exists for models that aren't int8 already."""
    names = [choice.traits.name for choice in recipe.choices]
    if recipe.gives is Kind.TORCH:
        return [Option(EXPORT, {})]
    if recipe.gives is Kind.ENGINE:
        return []
    precisions = ("int8",) if "quantization" in names else ("fp32", "bf16")
    compilation = {
        "engine": Categorical(("onnxruntime", "openvino"), is_baseline=True),
        "precision": Categorical(precisions, when={"engine": ("openvino",)}, is_baseline=True),
    }
    options = [Option(COMPILE, compilation)]
    return [Option(INT8, INT8_SPACE), *options] if "quantization" not in names else options


def cost_of(trial: Trial) -> float:
    """Lowest, at 1, for percentile 99.5 in OpenVINO."""
    parameters = {name: v for c in trial.recipe.choices for name, v in c.parameters.items()}
    cost = 1.0 if parameters["engine"] == "openvino" else 2.0
    if "percentile" in parameters:
        return cost + abs(float(parameters["percentile"]) - 99.5)
    return cost + 1.0


def identify(recipe: Recipe) -> tuple[str, ...]:
    """An id for each step, which names all steps up to it."""
    choices = recipe.choices
    return tuple(str(Recipe(Kind.TORCH, choices[: n + 1])) for n in range(len(choices)))


def run(
    n_trials: int, seed: int = 0, given: Landscape = landscape, sampler: str = "gp"
) -> list[Trial]:
    coordinator = Coordinator(given, Kind.TORCH, identify, seed, sampler)
    trials = []
    for trial in coordinator.trials():
        if len(trials) == n_trials:
            break
        failed = trial.decisions.failure is not None
        coordinator.tell(trial, Answer() if failed else Answer(cost_of(trial)))
        trials.append(trial)
    return trials


def test_baselines_try_every_marked_choice_once_and_the_plainest_first() -> None:
    found = [str(decisions.recipe) for decisions in baselines(landscape, Kind.TORCH)]
    assert found == [
        "export → compilation (engine onnxruntime)",
        "export → quantization (calibration minmax) → compilation (engine onnxruntime)",
        "export → compilation (engine openvino, precision fp32)",
        "export → quantization (calibration minmax) → "
        "compilation (engine openvino, precision int8)",
        "export → compilation (engine openvino, precision bf16)",
    ]


def test_trials_begin_with_the_baselines() -> None:
    trials = run(8)
    assert [trial.is_baseline for trial in trials] == [True] * 5 + [False] * 3
    wanted = [str(decisions.recipe) for decisions in baselines(landscape, Kind.TORCH)]
    assert [str(trial.recipe) for trial in trials[:5]] == wanted


@pytest.mark.parametrize("sampler", ["gp", "tpe", "grid"])
def test_nothing_is_proposed_once_the_budget_is_spent(sampler: str) -> None:
    coordinator = Coordinator(landscape, Kind.TORCH, identify, seed=0, sampler=sampler)
    seven: list[Trial] = []
    for trial in coordinator.trials(lambda: len(seven) < 7):
        seven.append(trial)
        coordinator.tell(trial, Answer(cost_of(trial), {}))
    assert len(seven) == 7

    first = Coordinator(landscape, Kind.TORCH, identify, seed=0, sampler=sampler)
    drawn = []
    for trial in first.trials(lambda: False):
        drawn.append(trial)
        first.tell(trial, Answer(cost_of(trial), {}))
    assert [trial.is_baseline for trial in drawn] == [True] * 5


def test_trials_are_distinct() -> None:
    recipes = [trial.recipe for trial in run(20)]
    assert len(set(recipes)) == len(recipes) == 20


def test_trials_are_the_same_when_seed_and_answers_are() -> None:
    first, again, other = run(15), run(15), run(15, seed=1)
    assert [trial.recipe for trial in first] == [trial.recipe for trial in again]
    assert [trial.recipe for trial in first] != [trial.recipe for trial in other]


def test_search_comes_near_a_known_optimum_that_no_baseline_has() -> None:
    trials = run(40)
    best_baseline = min(cost_of(trial) for trial in trials if trial.is_baseline)
    assert best_baseline == 2.0
    assert min(cost_of(trial) for trial in trials) < 1.1


def test_search_ends_when_a_finite_space_is_exhausted() -> None:
    def finite(recipe: Recipe) -> Sequence[Option]:
        options = landscape(recipe)
        return [
            Option(o.traits, {"calibration": INT8_SPACE["calibration"]}) if o.traits is INT8 else o
            for o in options
        ]

    def cost(trial: Trial) -> float:
        return float(trial.number)

    coordinator = Coordinator(finite, Kind.TORCH, identify, seed=0)
    n_trials = 0
    for trial in coordinator.trials():
        coordinator.tell(trial, Answer(cost(trial), {"latency": -1.0}))
        n_trials += 1
    assert n_trials == 7  # 3 without int8, 2 calibrations in each of 2 engines


def test_constraints_steer_the_search_when_most_of_the_space_breaks_them() -> None:
    coordinator = Coordinator(landscape, Kind.TORCH, identify, seed=0)
    kept = 0
    for trial in coordinator.trials():
        if trial.number > 40:
            break
        names = [choice.traits.name for choice in trial.recipe.choices]
        broken = 1.0 if "quantization" not in names else -1.0
        coordinator.tell(trial, Answer(cost_of(trial), {"accuracy_drop": broken}))
        kept += broken < 0
    assert kept > 30


def test_failure_is_a_trial_of_its_own_and_the_search_goes_on() -> None:
    def failing(recipe: Recipe) -> Sequence[Option]:
        if recipe.choices and recipe.choices[-1].traits is INT8:
            raise TechniqueFailed("quantization", "no memory")
        return landscape(recipe)

    trials = run(6, given=failing)
    failures = [trial for trial in trials if trial.decisions.failure is not None]
    assert failures
    assert all("no memory" in str(trial.decisions.failure) for trial in failures)
    assert any(trial.recipe.gives is Kind.ENGINE for trial in trials)


def test_search_ends_when_nothing_can_be_built() -> None:
    n_asked = 0

    def broken(recipe: Recipe) -> Sequence[Option]:
        nonlocal n_asked
        n_asked += 1
        if recipe.choices:
            raise TechniqueFailed("export", "an operator without a counterpart")
        return landscape(recipe)

    trials = run(10, given=remembered(broken))
    assert len(trials) == 1
    assert n_asked == 2


NARROW = Traits("narrow", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH)
FACTOR = Traits("factor", "1", Stage.DECOMPOSE, Kind.TORCH, Kind.TORCH)
TUNE = Traits("tune", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, optional=False)


def structural(recipe: Recipe) -> Sequence[Option]:
    """Narrower, factored, or both in either order, and tuned after any of it."""
    if recipe.gives is not Kind.TORCH:
        return landscape(recipe)
    tune = Option(TUNE, {"effort": Categorical(("full", "short")), "rate": Categorical((1, 2))})
    options = [
        Option(NARROW, {"width": Categorical((8, 16))}),
        Option(FACTOR, {"rank": Categorical((2, 4))}),
        Option(EXPORT, {}),
    ]
    options = [option for option in options if recipe.can_take(option.traits)]
    return [tune, *options] if recipe.is_structural and recipe.can_take(TUNE) else options


def names(trial: Trial) -> tuple[str, ...]:
    return tuple(choice.traits.name for choice in trial.recipe.choices)


def test_baselines_change_no_network() -> None:
    found = list(baselines(structural, Kind.TORCH))
    assert len(found) == 5
    assert not any(decisions.recipe.is_structural for decisions in found)


def test_steps_of_one_rank_are_tried_in_either_order() -> None:
    orders = {names(trial)[:2] for trial in run(300, given=structural, sampler="grid")}
    assert ("narrow", "factor") in orders
    assert ("factor", "narrow") in orders


def test_training_is_in_every_recipe_that_changes_the_network_and_its_effort_is_not_searched() -> (
    None
):
    for trial in run(60, given=structural, sampler="random"):
        tuned = [c for c in trial.recipe.choices if c.traits is TUNE]
        assert bool(tuned) == trial.recipe.is_structural
        assert all(choice.parameters["effort"] == "full" for choice in tuned)
        assert not any("effort" in name for name in trial.decisions.values)


def test_recipe_has_the_effort_of_the_rung_that_it_is_built_for() -> None:
    trial = next(t for t in run(60, given=structural) if t.recipe.trains)
    short = trial.recipe.with_effort("short")
    assert [c.parameters["effort"] for c in short.choices if c.traits is TUNE] == ["short"]
    assert trial.recipe.with_effort("full") == trial.recipe
    assert not short.skeleton().is_structural


AWARE = Traits(
    "aware", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, preserves=False, prepares=Stage.PRECISION
)
EAGER = Traits("eager", "1", Stage.COMPILE, Kind.TORCH, Kind.ENGINE, optional=False)


def preparing(recipe: Recipe) -> Sequence[Option]:
    """Trained for int8 or not, exported or run as it is."""
    if recipe.gives is not Kind.TORCH:
        return landscape(recipe)
    aware = [Option(AWARE, {"effort": Categorical(("full",))})] if recipe.can_take(AWARE) else []
    return [*aware, Option(EXPORT, {}), Option(EAGER, {"engine": Categorical(("torch",))})]


@pytest.mark.parametrize("sampler", ["gp", "random", "grid"])
def test_step_that_prepares_for_a_stage_is_only_in_recipes_with_that_stage(sampler: str) -> None:
    found = {names(trial) for trial in run(60, given=preparing, sampler=sampler)}
    assert found == {
        ("eager",), ("export", "compilation"), ("export", "quantization", "compilation"),
        ("aware", "export", "quantization", "compilation"),
    }  # fmt: skip


def test_step_that_prepares_for_a_stage_is_refused_when_nothing_of_it_can_follow() -> None:
    def without_int8(recipe: Recipe) -> Sequence[Option]:
        return [option for option in preparing(recipe) if option.traits is not INT8]

    def choose(name: str, distribution: Distribution) -> Value:
        return "aware" if name.startswith("recover") else default_of(distribution)

    failure = walk(without_int8, Kind.TORCH, choose).failure
    assert str(failure) == (
        "aware is not applicable: it prepares for a step of stage precision, and none can follow"
    )


SPARSE = Traits(
    "sparse", "1", Stage.SPARSIFY, Kind.TORCH, Kind.TORCH, preserves=False, prepares=Stage.PRUNE,
    wants=(("what", ("channels", "both")),), shares=("residual",),
)  # fmt: skip
PRUNE = Traits("prune", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH, preserves=False)
SPARSE_SPACE = {"residual": Categorical((False, True)), "epochs": Categorical((2.0,))}
PRUNE_SPACE = {
    "what": Categorical(("blocks", "channels", "both")),
    "residual": Categorical((True, False), when={"what": ("channels", "both")}),
}


def sparsifying(recipe: Recipe) -> Sequence[Option]:
    """Pruned in some way or narrowed, after sparsity training or not; then tuned."""
    if recipe.gives is not Kind.TORCH:
        return landscape(recipe)
    options = [
        Option(SPARSE, SPARSE_SPACE), Option(PRUNE, PRUNE_SPACE),
        Option(NARROW, {"width": Categorical((8, 16))}), Option(EXPORT, {}),
    ]  # fmt: skip
    if recipe.is_structural:
        options.append(Option(TUNE, {"effort": Categorical(("full",))}))
    return [option for option in options if recipe.can_take(option.traits)]


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_sparsity_training_is_only_in_recipes_that_prune_what_it_prepared_and_recover(
    sampler: str,
) -> None:
    trials = run(80, given=sparsifying, sampler=sampler)
    sparse = [trial for trial in trials if names(trial)[0] == "sparse"]
    assert {names(trial)[:3] for trial in sparse} == {("sparse", "prune", "tune")}
    assert not any(trial.decisions.failure for trial in trials)
    found = {
        (one.recipe.choices[0].parameters["residual"], *one.recipe.choices[1].parameters.values())
        for one in sparse
    }
    assert found == {(at, what, at) for at in (False, True) for what in ("channels", "both")}
    plain = [trial.recipe.choices[0] for trial in trials if names(trial)[0] == "prune"]
    assert "blocks" in {choice.parameters["what"] for choice in plain}


def test_sparsity_training_is_no_baseline() -> None:
    recipes = [decisions.recipe for decisions in baselines(sparsifying, Kind.TORCH)]
    assert not any(choice.traits is SPARSE for recipe in recipes for choice in recipe.choices)


def default_of(distribution: Distribution) -> Value:
    return distribution.default


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random", "nsga2", "grid"])
def test_every_sampler_finds_distinct_trials_again_by_its_seed(sampler: str) -> None:
    first, again = (run(25, given=structural, sampler=sampler) for _ in range(2))
    assert [trial.recipe for trial in first] == [trial.recipe for trial in again]
    assert len({trial.recipe for trial in first}) == 25


def test_grid_tries_every_combination_once() -> None:
    def finite(recipe: Recipe) -> Sequence[Option]:
        return [
            Option(o.traits, {k: v for k, v in o.space.items() if isinstance(v, Categorical)})
            for o in structural(recipe)
        ]

    trials = run(10_000, given=finite, sampler="grid")
    # Untouched, or narrowed (2), factored (2) or both (4, in 2 orders), each tuned at 2 rates;
    # then fp32 in 3 engines or int8 (2 calibrations) in 2.
    assert len(trials) == (1 + (2 + 2 + 8) * 2) * (3 + 2 * 2)


def test_recipes_are_not_proposed_again_when_their_first_steps_cannot_be_built() -> None:
    coordinator = Coordinator(structural, Kind.TORCH, identify, seed=0, sampler="random")
    n_narrowed = 0
    for trial in coordinator.trials():
        if trial.number > 60:
            break
        narrowed = names(trial)[0] == "narrow"
        n_narrowed += narrowed
        failed = identify(trial.recipe)[0] if narrowed else ""
        coordinator.tell(trial, Answer(None if narrowed else cost_of(trial), failed_id=failed))
    assert n_narrowed == 2  # one for each width


def test_given_decisions_are_tried_after_the_baselines() -> None:
    wanted = run(12)[11]
    coordinator = Coordinator(
        landscape, Kind.TORCH, identify, seed=5, first=[wanted.decisions.values]
    )
    for trial in coordinator.trials():
        coordinator.tell(trial, Answer(cost_of(trial)))
        if trial.number == 6:
            assert trial.recipe == wanted.recipe
            return


def test_walk_names_decisions_by_what_can_be_chosen() -> None:
    names: list[str] = []

    def choose(name: str, distribution: Categorical | Number) -> str | int | float | bool:
        names.append(name)
        return distribution.default

    decisions = walk(landscape, Kind.TORCH, choose)
    assert isinstance(decisions, Decisions)
    assert names == [
        "precision of none|quantization",
        "compilation.engine of onnxruntime|openvino",
    ]


@pytest.mark.parametrize("value", [None, float("inf")])
def test_trial_without_a_value_is_told_as_failed(value: float | None) -> None:
    coordinator = Coordinator(landscape, Kind.TORCH, identify, seed=0)
    trials = coordinator.trials()
    coordinator.tell(next(trials), Answer(value))
    assert next(trials).number == 2


FROM_TORCH = Traits(
    "torch_compilation", "1", Stage.COMPILE, Kind.TORCH, Kind.ENGINE, optional=False
)


def test_export_is_left_out_only_when_an_engine_takes_what_there_is() -> None:
    def with_torch(recipe: Recipe) -> Sequence[Option]:
        engine = {"engine": Categorical(("torch",))}
        direct = [Option(FROM_TORCH, engine)] if recipe.gives is Kind.TORCH else []
        return [*landscape(recipe), *direct]

    found = [str(decisions.recipe) for decisions in baselines(with_torch, Kind.TORCH)]
    exported = [str(decisions.recipe) for decisions in baselines(landscape, Kind.TORCH)]
    assert set(found) == {*exported, "torch_compilation (engine torch)"}
    assert found[0] == exported[0]


# --- batches


def in_batches(
    n_trials: int, size: int, sampler: str = "gp", given: Landscape = structural
) -> list[list[Trial]]:
    """Trials in batches, told in their order when all of a batch are drawn."""
    coordinator = Coordinator(given, Kind.TORCH, identify, 0, sampler)
    batches: list[list[Trial]] = []

    def room() -> int:
        return min(size, n_trials - sum(map(len, batches)))

    for batch in coordinator.batches(room, lambda: room() > 0):
        batches.append(list(batch))
        for trial in batch:
            coordinator.tell(trial, Answer(cost_of(trial)))
    return batches


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random", "nsga2", "grid"])
def test_batches_are_distinct_recipes_and_the_same_again(sampler: str) -> None:
    first, again = (in_batches(29, 4, sampler) for _ in range(2))
    recipes = [trial.recipe for batch in first for trial in batch]
    assert recipes == [trial.recipe for batch in again for trial in batch]
    assert [len(batch) for batch in first] == [4, 1, *[4] * 6]
    assert len(set(recipes)) == 29
    assert [trial.number for batch in first for trial in batch] == list(range(1, 30))


def test_batch_has_baselines_or_proposals_but_not_both() -> None:
    kinds = [{trial.is_baseline for trial in batch} for batch in in_batches(29, 4)]
    assert kinds == [{True}, {True}, *[{False}] * 6]


def test_batches_of_one_are_the_trials_one_after_the_other() -> None:
    singles = [trial.recipe for [trial] in in_batches(20, 1, given=landscape)]
    assert singles == [trial.recipe for trial in run(20)]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random", "nsga2", "grid"])
def test_larger_batch_begins_with_the_smaller_one_after_the_same_answers(sampler: str) -> None:
    """So a study whose budget cut a batch short goes on with the rest of it."""
    short, long = (in_batches(n, 6, sampler) for n in (13, 16))
    assert [len(batch) for batch in (*short, *long)] == [5, 6, 2, 5, 6, 5]
    begun = [trial.recipe for trial in short[-1]]
    assert begun == [trial.recipe for trial in long[-1]][:2]


def test_proposals_of_a_batch_know_of_each_other() -> None:
    """Without belief in what is under way, it would be the neighbours of one point."""
    alone = [trial.recipe for trial in run(12, given=structural)]
    [_, *proposals] = in_batches(12, 7)
    assert proposals[0][0].recipe == alone[5]
    assert proposals[0][1].recipe not in alone[5:6]


def test_search_in_batches_comes_near_the_optimum_as_well() -> None:
    trials = [trial for batch in in_batches(45, 4, given=landscape) for trial in batch]
    assert min(cost_of(trial) for trial in trials) < 1.1


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_sampler_learns_an_answer_once_for_all_that_it_proposed_meanwhile(sampler: str) -> None:
    """In a space that is nearly spent, most of a batch's proposals are under way already."""

    def small(recipe: Recipe) -> Sequence[Option]:
        return [
            Option(o.traits, {k: v for k, v in o.space.items() if isinstance(v, Categorical)})
            for o in landscape(recipe)
        ]

    trials = [trial for batch in in_batches(40, 5, sampler, small) for trial in batch]
    assert len({trial.recipe for trial in trials}) == len(trials) == 7
