"""An ascent: how far a trial climbs, and what each rung leaves behind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from optimizer.ascent import Ascent, Ended, Surroundings
from optimizer.builder import Builder
from optimizer.errors import ParityMismatch, TechniqueFailed, TechniqueNotApplicable
from optimizer.evaluator import Evaluator
from optimizer.kernels import KernelProof
from optimizer.recipe import EFFORT, EPOCHS, Recipe, Traits
from optimizer.result import InstanceTimes, Prediction, ServingChoice, Speedup
from optimizer.search.coordinator import Answer, Trial
from optimizer.search.ladder import Bound, Climb, Rung
from optimizer.search.landscape import Decisions, Unbuildable
from optimizer.search.recovery import RecoveryRecord
from optimizer.serving import Serving
from optimizer.simulation import FrontEnd
from optimizer.spec import Constraints, Objective, Spec, read_spec
from optimizer.store import StoredVariant
from optimizer.timing import Timing
from optimizer.variant import Kind, Model, OnnxModel, Stage, engine_model
from serve.artifact import Quality, ServiceTime, Step
from serve.engines import EngineSpec
from tests.optimizer.tiny_study import write_study

PRUNE = Traits("pruning", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH, preserves=False)
RECOVER = Traits("recovery", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, preserves=False)
EXPORT = Traits("export", "1", Stage.EXPORT, Kind.TORCH, Kind.ONNX, optional=False)
COMPILE = Traits("compilation", "1", Stage.COMPILE, Kind.ONNX, Kind.ENGINE, optional=False)


def compiled(recipe: Recipe) -> Recipe:
    return recipe.then(EXPORT, {}).then(COMPILE, {})


PLAIN = compiled(Recipe(Kind.TORCH))
PRUNED = compiled(Recipe(Kind.TORCH).then(PRUNE, {}))
SPARSIFY = Traits(
    "sparsity_training", "1", Stage.SPARSIFY, Kind.TORCH, Kind.TORCH, preserves=False,
    prepares=Stage.PRUNE,
)  # fmt: skip
TRAINED = compiled(Recipe(Kind.TORCH).then(PRUNE, {}).then(RECOVER, {EFFORT: "full"}))
SPARSE = compiled(
    Recipe(Kind.TORCH).then(SPARSIFY, {EPOCHS: 5.0}).then(PRUNE, {}).then(RECOVER, {EFFORT: "full"})
)
WAY = [Rung.ESTIMATED, Rung.BUILT, Rung.TIMED, Rung.UNTRAINED, Rung.SHORT, Rung.FULL]
EPOCHS_OF = {"recalibrate": 0.0, "short": 2.0, "full": 30.0}
N_BYTES = 500


def effort_of(recipe: Recipe) -> str:
    given = [one.parameters[EFFORT] for one in recipe.choices if EFFORT in one.parameters]
    return str(given[0]) if given else "none"


@dataclass
class Workshop:
    """Stands for the builder: writes `N_BYTES` as a model, or fails at some effort. A variant's
    id is its effort."""

    directory: Path
    failures: Mapping[str, Unbuildable] = field(default_factory=dict)
    precision: str = "fp32"
    built: list[str] = field(default_factory=list)

    @property
    def base(self) -> Model:
        return OnnxModel(self.directory, "model.onnx", "base")

    def build(self, recipe: Recipe) -> StoredVariant:
        effort = effort_of(recipe)
        self.built.append(effort)
        if effort in self.failures:
            raise self.failures[effort]
        (self.directory / "model.onnx").write_bytes(bytes(N_BYTES))
        spec = EngineSpec("onnxruntime", "model.onnx", self.precision)
        model = engine_model(self.directory, spec)
        return StoredVariant(effort, "parent", Step("compilation", "1", {}, 0), "", model, 1.5)

    def find(self, variant_id: str) -> None:
        return None

    def epochs(self, recipe: Recipe) -> float:
        return EPOCHS_OF[effort_of(recipe)]

    def epochs_first(self, recipe: Recipe) -> dict[str, float]:
        return {
            one.traits.name: float(one.parameters[EPOCHS])
            for one in recipe.choices
            if one.trains_first
        }

    def label(self, recipe: Recipe) -> str:
        return str(recipe)

    def steps(self, recipe: Recipe) -> tuple[Step, ...]:
        return tuple(Step(c.traits.name, "1", dict(c.parameters), 0) for c in recipe.choices)

    def ids(self, recipe: Recipe) -> tuple[str, ...]:
        return (*(one.traits.name for one in recipe.choices[:-1]), effort_of(recipe))

    def variant_id(self, recipe: Recipe) -> str:
        return self.ids(recipe)[-1]

    def failed_id(self, recipe: Recipe) -> str:
        effort = effort_of(recipe)
        return effort if effort in self.failures and effort in self.built else ""


@dataclass
class Bench:
    """Stands for the evaluator. `wrong` are the variants that compute something else."""

    wrong: Sequence[str] = ()
    joules_of_a_row: float | None = None
    asked: list[str] = field(default_factory=list)

    def check(self, variant: StoredVariant, parent: Model) -> KernelProof:
        if variant.id in self.wrong:
            raise ParityMismatch("the engine against its model", 3, 0.5, 0.01)
        return KernelProof(1e-3, 0, 0, ())

    def timings(
        self, variant: StoredVariant, baseline: StoredVariant, best_speedup: float
    ) -> tuple[Timing, ...]:
        self.asked.append(f"timings {variant.id}")
        times = InstanceTimes(1, 1, (ServiceTime(1, 0.01, 0.012, 9),))
        return (Timing(times, Speedup(1.1, 1.2, 1.3, 0.95, 1, 9)),)

    def memory_bytes(self, variant: StoredVariant, instances: int, threads: int) -> int:
        self.asked.append("memory")
        return 4_000

    def joules(self, variant: StoredVariant, instances: int, threads: int) -> float | None:
        self.asked.append("joules")
        return self.joules_of_a_row


@dataclass(frozen=True)
class Known(Serving):
    """Serves at a known rate and price, 0 for one that is too slow at any; `least` is what the
    price can't be below."""

    rate_per_s: float = 100.0
    price: float = 1.0
    least: float = 0.0
    simulated: list[str] = field(default_factory=list)

    def choose(self, times: Sequence[InstanceTimes], slo: Any = None) -> ServingChoice:
        self.simulated.append("once")
        said = Prediction(50, 0.01, 0.02, 2.0, 2.0, 50, 1.0, 0.5, 1.0, 1000)
        return ServingChoice(1, 1, 1, 0.0, 1, self.rate_per_s, self.price, said)

    def least_value(self, times: Sequence[InstanceTimes]) -> float:
        return self.least


def quality(drop: float) -> Quality:
    return Quality("top1", 0.9 - drop, drop, drop, drop, drop, 0.9, 1000, "validation", "d")


@dataclass
class Climber:
    """A trial and all that it meets, each part to be changed before it climbs."""

    spec: Spec
    shop: Workshop
    bench: Bench = field(default_factory=Bench)
    serving: Known | None = None
    given: Surroundings | None = None
    drops: Mapping[str, float] = field(default_factory=dict)
    climbed: list[Rung] = field(default_factory=list)

    def standing(self, **changes: Any) -> None:
        """The study's standing, with a baseline."""
        baseline = self.shop.build(PLAIN)
        self.shop.built.clear()
        known = Surroundings(
            baseline, None, 0.0, 0.0, (), lambda _recipe: None,
            lambda variant, _base: quality(self.drops.get(variant.id, 0.01)), self.climbed.append,
        )  # fmt: skip
        self.given = replace(known, **changes)

    def run(
        self, recipe: Recipe, is_baseline: bool = False, failure: Unbuildable | None = None
    ) -> Ended:
        if self.given is None:
            self.standing()
        assert self.given is not None
        seconds = count()
        ascent = Ascent(
            Trial(1, Decisions(recipe, {}, failure), is_baseline, None),
            self.spec,
            cast(Builder, self.shop),
            cast(Evaluator, self.bench),
            self.serving or Known(self.spec, 1, FrontEnd()),
            self.given,
            lambda: float(next(seconds)),
        )
        return ascent.run()

    def serves(self, **changes: Any) -> Known:
        self.serving = Known(self.spec, 1, FrontEnd(), **changes)
        return self.serving


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return read_spec(write_study(tmp_path_factory.mktemp("study"), threshold_ms=1000.0))


@pytest.fixture
def climber(spec: Spec, tmp_path: Path) -> Climber:
    return Climber(spec, Workshop(tmp_path))


def rungs(ended: Ended) -> list[Rung]:
    return [rung for rung, _ in ended.climb.seconds]


def constraint(ended: Ended) -> str:
    assert ended.row is not None
    return ended.row.reasons[0].constraint


def recoveries(final: float) -> list[RecoveryRecord]:
    """Of variants that all ended with that drop, give or take a little."""
    return [
        RecoveryRecord(0.5 + i / 100, 0.3 + i / 50, final + i / 1000, 0.2 + i / 50)
        for i in range(8)
    ]


def test_trial_that_trains_climbs_the_whole_ladder_in_order(climber: Climber) -> None:
    climber.drops = {"recalibrate": 0.4, "short": 0.1, "full": 0.02}

    ended = climber.run(TRAINED)

    assert climber.climbed == rungs(ended) == WAY
    assert climber.shop.built == ["recalibrate", "short", "full"]
    assert ended.climb == Climb(tuple((rung, 1.0) for rung in WAY), dropped=False, trains=True)
    assert ended.epochs == EPOCHS_OF["short"] + EPOCHS_OF["full"]
    assert ended.recovery == RecoveryRecord(size=1.0, untrained=0.4, final=0.02, short=0.1)
    assert ended.row is not None
    assert (ended.row.id, ended.row.status) == ("full", "unverified")
    assert ended.row.quality == quality(0.02)
    assert climber.bench.asked == ["timings recalibrate", "timings full"]
    assert ended.answer.value == 1.0
    assert ended.answer.constraints == pytest.approx({"latency": -1.0, "accuracy_drop": -0.9})


@pytest.mark.parametrize(
    ("recipe", "is_baseline", "wanted"),
    [
        pytest.param(PLAIN, True, WAY[1:4], id="is a baseline"),
        pytest.param(PLAIN, False, WAY[1:4], id="leaves the network as it is"),
        pytest.param(PRUNED, False, WAY[:4], id="changes the network without training"),
    ],
)
def test_rungs_are_passed_over_when_a_trial(
    recipe: Recipe, is_baseline: bool, wanted: list[Rung], climber: Climber
) -> None:
    ended = climber.run(recipe, is_baseline)
    assert rungs(ended) == wanted
    assert not ended.climb.dropped
    assert ended.recovery is None
    assert climber.shop.built == ["none"]


def test_first_baseline_is_compared_with_itself(climber: Climber) -> None:
    climber.standing(baseline=None)
    ended = climber.run(PLAIN, is_baseline=True)
    assert ended.row is not None
    assert ended.row.status == "unverified"


def too_slow_by_blocks(climber: Climber) -> None:
    climber.standing(bound=lambda _recipe: Bound(1.5, 0.1))


def outclassed_by_blocks(climber: Climber) -> None:
    climber.standing(bound=lambda _recipe: Bound(0.1, 3.0), best=2.0)


@pytest.mark.parametrize(
    ("standing", "value", "broken"),
    [
        pytest.param(too_slow_by_blocks, None, {"latency": 1.0}, id="too slow"),
        pytest.param(outclassed_by_blocks, 3.0, {}, id="outclassed"),
    ],
)
def test_nothing_is_built_when_the_estimate_says_that_it_is(
    standing: Callable[[Climber], None],
    value: float | None,
    broken: Mapping[str, float],
    climber: Climber,
) -> None:
    standing(climber)
    ended = climber.run(TRAINED)
    assert rungs(ended) == [Rung.ESTIMATED]
    assert ended.climb.dropped
    assert ended.row is None
    assert (ended.answer.value, ended.answer.constraints) == (value, broken)
    assert climber.shop.built == []


def test_baseline_is_built_whatever_the_estimate_says(climber: Climber) -> None:
    too_slow_by_blocks(climber)
    assert Rung.ESTIMATED not in rungs(climber.run(PRUNED, is_baseline=True))


@pytest.mark.parametrize(
    ("failure", "wanted"),
    [
        pytest.param(TechniqueFailed("pruning", ValueError("no")), "built", id="fails"),
        pytest.param(TechniqueNotApplicable("pruning", "no"), "applicable", id="refuses"),
        pytest.param(ParityMismatch("two forms", 2, 1.0, 0.1), "parity", id="changes outputs"),
    ],
)
def test_trial_ends_with_the_reason_when_a_step(
    failure: Unbuildable, wanted: str, climber: Climber
) -> None:
    climber.shop.failures = {"recalibrate": failure}
    ended = climber.run(TRAINED)
    assert rungs(ended) == [Rung.ESTIMATED, Rung.BUILT]
    assert ended.climb.dropped
    assert ended.row is not None
    assert ended.row.status == "dropped"
    assert ended.row.reasons[0].detail == str(failure)
    assert constraint(ended) == wanted
    assert ended.answer.value is None
    assert ended.answer.failed_id == "recalibrate"


def test_trial_ends_when_the_landscape_could_not_be_walked(climber: Climber) -> None:
    failure = TechniqueFailed("export", "no way")
    ended = climber.run(PLAIN, failure=failure)
    assert rungs(ended) == [Rung.BUILT]
    assert climber.shop.built == []
    assert constraint(ended) == "built"


def test_trial_ends_at_the_training_that_fails_with_the_epochs_spent_so_far(
    climber: Climber,
) -> None:
    climber.shop.failures = {"full": TechniqueFailed("recovery", "NaN")}
    ended = climber.run(TRAINED)
    assert rungs(ended) == WAY
    assert ended.climb.dropped
    assert constraint(ended) == "built"
    assert ended.epochs == EPOCHS_OF["short"]
    assert ended.recovery is None


def test_trial_ends_when_the_engine_computes_something_else(climber: Climber) -> None:
    climber.bench.wrong = ("none",)
    ended = climber.run(PLAIN)
    assert rungs(ended) == [Rung.BUILT]
    assert constraint(ended) == "parity"


def test_lossy_variant_is_not_applicable_when_there_is_nothing_to_compare_it_with(
    climber: Climber,
) -> None:
    climber.standing(baseline=None)
    climber.shop.precision = "int8"
    ended = climber.run(PLAIN, is_baseline=True)
    assert constraint(ended) == "applicable"


@pytest.mark.parametrize(
    ("recipe", "wanted", "drop"),
    [
        pytest.param(TRAINED, Rung.TIMED, None, id="it would have to be trained"),
        pytest.param(PRUNED, Rung.UNTRAINED, 0.01, id="its accuracy costs little"),
    ],
)
def test_trial_that_is_too_slow_ends_where(
    recipe: Recipe, wanted: Rung, drop: float | None, climber: Climber
) -> None:
    climber.serves(rate_per_s=0.0)
    ended = climber.run(recipe)
    assert ended.climb.last is wanted
    assert ended.row is not None
    assert ended.row.status == "infeasible"
    assert constraint(ended) == "latency"
    assert (ended.row.quality.drop if ended.row.quality else None) == drop
    assert ended.answer.constraints is not None
    assert ended.answer.constraints["latency"] > 0


@pytest.mark.parametrize(
    ("price", "least", "n_simulated"),
    [
        pytest.param(3.0, 0.0, 1, id="by what it costs to serve"),
        pytest.param(3.0, 2.9, 0, id="whatever it costs to serve"),
    ],
)
def test_trial_is_outclassed(
    price: float, least: float, n_simulated: int, climber: Climber
) -> None:
    climber.standing(best=2.0)
    serving = climber.serves(price=price, least=least)
    ended = climber.run(PRUNED)
    assert ended.climb.last is Rung.TIMED
    assert ended.row is not None
    assert ended.row.status == "dropped"
    assert constraint(ended) == "outclassed"
    assert len(serving.simulated) == n_simulated
    assert ended.answer.value == (price if n_simulated else least)


def test_baseline_is_judged_when_it_is_outclassed(climber: Climber) -> None:
    climber.standing(best=2.0)
    climber.serves(price=9.0, least=9.0)
    ended = climber.run(PLAIN, is_baseline=True)
    assert not ended.climb.dropped
    assert ended.climb.last is Rung.UNTRAINED


def test_training_is_not_begun_when_others_like_it_did_not_recover(climber: Climber) -> None:
    climber.standing(recoveries=recoveries(final=0.5))
    climber.drops = {"recalibrate": 0.4}
    ended = climber.run(TRAINED)
    assert ended.climb.last is Rung.UNTRAINED
    assert constraint(ended) == "accuracy_drop"
    assert climber.shop.built == ["recalibrate"]
    assert ended.epochs == 0.0


def test_training_ends_early_when_it_does_not_recover_as_others_did(climber: Climber) -> None:
    """By the untrained drop it could still do, by the one after short training it can't."""
    records = [
        RecoveryRecord(0.5, 0.4, final, short=final)
        for final in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
    ]
    climber.standing(recoveries=records)
    climber.drops = {"recalibrate": 0.4, "short": 0.6}
    ended = climber.run(TRAINED)
    assert ended.climb.last is Rung.SHORT
    assert constraint(ended) == "accuracy_drop"
    assert ended.epochs == EPOCHS_OF["short"]


@pytest.mark.parametrize(
    ("limit", "spent", "last", "epochs"),
    [
        pytest.param(40.0, 39.0, Rung.SHORT, 0.0, id="not even for a short training"),
        pytest.param(31.0, 0.0, Rung.FULL, 2.0, id="not for a full one"),
        pytest.param(0.0, 0.0, Rung.SHORT, 0.0, id="for none"),
    ],
)
def test_training_ends_when_the_budget_s_epochs_last(
    limit: float, spent: float, last: Rung, epochs: float, climber: Climber
) -> None:
    budget = climber.spec.budget.model_copy(update={"training_epochs": limit})
    climber.spec = replace(climber.spec, budget=budget)
    climber.standing(epochs_spent=spent)
    ended = climber.run(TRAINED)
    assert ended.climb.last is last
    assert ended.climb.dropped
    assert constraint(ended) == "budget"
    assert ended.epochs == epochs
    assert ended.recovery is None


def test_training_that_trials_share_is_counted_once(climber: Climber) -> None:
    first = climber.run(SPARSE)
    assert first.trained == ("sparsity_training",)
    assert first.epochs == 5.0 + EPOCHS_OF["short"] + EPOCHS_OF["full"]
    climber.standing(trained=first.trained)
    again = climber.run(SPARSE)
    assert again.trained == ()
    assert again.epochs == EPOCHS_OF["short"] + EPOCHS_OF["full"]


def test_training_that_trials_share_is_counted_when_a_step_behind_it_fails(
    climber: Climber,
) -> None:
    climber.shop.failures = {"recalibrate": TechniqueFailed("pruning", ValueError("no"))}
    ended = climber.run(SPARSE)
    assert (ended.epochs, ended.trained) == (5.0, ("sparsity_training",))
    assert constraint(ended) == "built"


def test_nothing_is_built_when_the_epochs_before_it_are_not_left(climber: Climber) -> None:
    budget = climber.spec.budget.model_copy(update={"training_epochs": 70.0})
    climber.spec = replace(climber.spec, budget=budget)
    climber.standing(epochs_spent=66.0)
    ended = climber.run(SPARSE)
    assert rungs(ended) == [Rung.ESTIMATED, Rung.BUILT]
    assert climber.shop.built == []
    assert (ended.epochs, ended.trained) == (0.0, ())
    assert ended.climb.dropped
    assert ended.answer == Answer()
    assert ended.row is not None
    assert (ended.row.status, constraint(ended)) == ("dropped", "budget")
    assert ended.row.reasons[0].detail == "66 epochs of 70 are spent, its training takes 5"
    climber.standing(epochs_spent=66.0, trained=("sparsity_training",))
    assert climber.run(SPARSE).climb.last is Rung.FULL


def test_trial_without_training_is_infeasible_when_its_drop_is_too_large(climber: Climber) -> None:
    climber.drops = {"none": 0.5}
    ended = climber.run(PRUNED)
    assert not ended.climb.dropped
    assert ended.row is not None
    assert ended.row.status == "infeasible"
    assert constraint(ended) == "accuracy_drop"
    assert ended.answer.constraints is not None
    assert ended.answer.constraints["accuracy_drop"] == pytest.approx((0.5 - 0.2) / 0.2)


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        pytest.param(Constraints(size_bytes=N_BYTES - 1), ["size"], id="size"),
        pytest.param(Constraints(memory_bytes=3_999), ["memory"], id="memory"),
        pytest.param(
            Constraints(size_bytes=1, memory_bytes=1), ["size", "memory"], id="both of them"
        ),
        pytest.param(Constraints(size_bytes=N_BYTES, memory_bytes=4_000), [], id="neither"),
    ],
)
def test_variant_is_held_to_the_constraints_that_the_spec_has(
    limits: Constraints, broken: list[str], climber: Climber
) -> None:
    climber.spec = replace(climber.spec, constraints=limits)
    ended = climber.run(PLAIN)
    assert ended.row is not None
    assert [reason.constraint for reason in ended.row.reasons] == broken
    assert ended.row.status == ("infeasible" if broken else "unverified")


def test_memory_and_energy_are_not_measured_when_nothing_asks_for_them(climber: Climber) -> None:
    ended = climber.run(PLAIN)
    assert climber.bench.asked == ["timings none"]
    assert ended.row is not None
    assert (ended.row.memory_bytes, ended.row.joules) == (None, None)


@pytest.mark.parametrize(
    ("objective", "value"), [("energy", 0.25), ("size", float(N_BYTES)), ("latency", 2.0)]
)
def test_answer_is_what_the_objective_minimizes(
    objective: Objective, value: float, climber: Climber
) -> None:
    climber.spec = replace(climber.spec, objective=objective)
    climber.bench.joules_of_a_row = 0.25
    assert climber.run(PLAIN).answer.value == value


def test_trial_has_no_value_when_the_energy_is_not_known(climber: Climber) -> None:
    climber.spec = replace(climber.spec, objective="energy")
    climber.standing(best=0.5)
    ended = climber.run(PLAIN)
    assert ended.answer.value is None
    assert not ended.climb.dropped
