"""The search on synthetic landscapes, whose optima are known, without models."""

from collections.abc import Sequence

import pytest

from optimizer.errors import TechniqueFailed
from optimizer.recipe import Recipe, Traits
from optimizer.search.coordinator import Answer, Coordinator, Trial
from optimizer.search.landscape import Decisions, Landscape, Option, baselines, remembered, walk
from optimizer.space import Categorical, Number
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


def run(n_trials: int, seed: int = 0, given: Landscape = landscape) -> list[Trial]:
    coordinator = Coordinator(given, Kind.TORCH, str, seed)
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

    coordinator = Coordinator(finite, Kind.TORCH, str, seed=0)
    n_trials = 0
    for trial in coordinator.trials():
        coordinator.tell(trial, Answer(cost(trial), {"latency": -1.0}))
        n_trials += 1
    assert n_trials == 7  # 3 without int8, 2 calibrations in each of 2 engines


def test_constraints_steer_the_search_when_most_of_the_space_breaks_them() -> None:
    coordinator = Coordinator(landscape, Kind.TORCH, str, seed=0)
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
    coordinator = Coordinator(landscape, Kind.TORCH, str, seed=0)
    trials = coordinator.trials()
    coordinator.tell(next(trials), Answer(value))
    assert next(trials).number == 2
