"""The guide and its surrogate: what they learn from trials, on functions that are known."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
from scipy.optimize import check_grad

from optimizer.recipe import Recipe, Traits
from optimizer.search.guide import Guide, _drawn
from optimizer.search.landscape import Decisions, Option, walk
from optimizer.search.surrogate import Point, _parts, _Posterior, fitted
from optimizer.space import Categorical, Number, Value
from optimizer.variant import Kind, Stage

LEVELS = (0.0, 0.5, 1.0)


def points() -> list[Point]:
    """All combinations of two numbers and a name."""
    return [{"a": a, "b": b, "kind": kind} for a in LEVELS for b in LEVELS for kind in ("x", "y")]


def sum_of_effects(point: Point) -> float:
    return 3 * float(point["a"]) - float(point["b"]) + (2.0 if point["kind"] == "y" else 0.0)


def test_surrogate_gives_back_what_it_was_fitted_to() -> None:
    given = points()
    values = [sum_of_effects(point) for point in given]
    means, spreads = fitted(given, values).predict(given)
    assert means == pytest.approx(values, abs=0.2)
    assert (spreads < 0.5).all()


def test_surrogate_predicts_combinations_that_it_never_saw_when_effects_add_up() -> None:
    given = points()
    seen = [given[i] for i in (0, 1, 4, 5, 6, 9, 12, 17)]
    means, _ = fitted(seen, [sum_of_effects(point) for point in seen]).predict(given)
    truth = np.array([sum_of_effects(point) for point in given])
    assert np.corrcoef(means, truth)[0, 1] > 0.95


def test_surrogate_is_less_sure_the_further_it_is_from_what_it_saw() -> None:
    seen: list[Point] = [{"a": 0.0}, {"a": 0.1}, {"a": 0.2}]
    _, spreads = fitted(seen, [0.0, 1.0, 2.0]).predict([{"a": 0.1}, {"a": 0.5}, {"a": 1.0}])
    assert spreads[0] < spreads[1] < spreads[2]


def test_surrogate_tells_a_decision_that_wasnt_made_from_any_that_was() -> None:
    seen: list[Point] = [{"kind": "x"}, {"kind": "x", "a": 0.0}, {"kind": "x", "a": 1.0}] * 2
    values = [5.0, 1.0, 2.0] * 2
    means, _ = fitted(seen, values).predict(seen[:3])
    assert means == pytest.approx(values[:3], abs=0.7)


def test_surrogate_is_flat_when_all_values_are_equal() -> None:
    means, spreads = fitted([{"a": 0.0}, {"a": 1.0}], [4.0, 4.0]).predict([{"a": 0.5}])
    assert means == pytest.approx([4.0])
    assert np.isfinite(spreads).all()


def test_surrogates_gradient_is_that_of_its_posterior() -> None:
    given = points()[:9]
    values = np.array([sum_of_effects(point) for point in given])
    parts = _parts(("a", "b", "kind"), given, given)
    logs = np.array([-2.0, -0.5, -1.0, 0.3, -1.5])
    posterior = _Posterior(parts, (values - values.mean()) / values.std(), np.full(5, -1.0))
    error = check_grad(lambda at: posterior(at)[0], lambda at: posterior(at)[1], logs)
    assert error < 1e-4


NARROW = Traits("narrow", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH)
EXPORT = Traits("export", "1", Stage.EXPORT, Kind.TORCH, Kind.ONNX, optional=False)
COMPILE = Traits("compile", "1", Stage.COMPILE, Kind.ONNX, Kind.ENGINE, optional=False)
SPACE = {
    "width": Categorical((32, 24, 16, 8)),
    "depth": Categorical((4, 3, 2, 1)),
    "share": Number(0.1, 10.0, 1.0, logarithmic=True),
    "steps": Number(2, 20, 2, whole=True, step=2),
    "how": Categorical(("plain", "clever")),
}


def landscape(recipe: Recipe) -> list[Option]:
    if recipe.gives is Kind.ONNX:
        return [Option(COMPILE, {"engine": Categorical(("slow", "fast"))})]
    if recipe.gives is Kind.ENGINE:
        return []
    export = Option(EXPORT, {})
    return [export] if recipe.choices else [Option(NARROW, SPACE), export]


def parameters(decisions: Decisions) -> dict[str, Value]:
    return {k: v for choice in decisions.recipe.choices for k, v in choice.parameters.items()}


def cost(decisions: Decisions) -> float:
    """Multiplied up from what each decision does, as costs are."""
    given = parameters(decisions)
    engine = 0.6 if given["engine"] == "fast" else 1.0
    if "width" not in given:
        return engine
    share = abs(math.log10(float(given["share"])) - 0.5)
    return (
        engine * float(given["width"]) / 32 * float(given["depth"]) / 4
        * (1 + share) * (0.8 if given["how"] == "clever" else 1.0) + 0.05
    )  # fmt: skip


def drop(decisions: Decisions) -> float:
    """Kept at most 0 by wide, deep networks."""
    given = parameters(decisions)
    if "width" not in given:
        return -1.0
    return 1.5 - float(given["width"]) / 32 - float(given["depth"]) / 4


def guided(n: int, seed: int = 0) -> list[Decisions]:
    """`n` trials, the untouched network's first."""
    guide = Guide(landscape, Kind.TORCH, seed)
    tried = [walk(landscape, Kind.TORCH, lambda _name, one: one.default)]
    guide.tell(tried[0].values, cost(tried[0]), {"drop": drop(tried[0])})
    while len(tried) < n:
        known = [one.values for one in tried]
        proposal = guide.proposal(lambda one, known=known: one.values in known)  # type: ignore[misc]
        assert proposal is not None
        guide.tell(proposal.values, cost(proposal), {"drop": drop(proposal)})
        tried.append(proposal)
    return tried


def test_guide_finds_the_cheapest_that_keeps_the_constraint_in_few_trials() -> None:
    kept = [one for one in guided(30) if drop(one) <= 0]
    optimum = 0.6 * min(w / 32 * d / 4 for w in (32, 24, 16, 8) for d in (4, 3, 2, 1)
                        if 1.5 - w / 32 - d / 4 <= 0) * 0.8 + 0.05  # fmt: skip
    assert min(cost(one) for one in kept) < 1.15 * optimum


def test_guide_proposes_the_same_again_when_seed_and_answers_are() -> None:
    first, again, other = guided(8), guided(8), guided(8, seed=1)
    assert [one.values for one in first] == [one.values for one in again]
    assert [one.values for one in first] != [one.values for one in other]


def test_guide_proposes_only_what_its_space_allows() -> None:
    for decisions in guided(15):
        for name, value in parameters(decisions).items():
            assert name == "engine" or SPACE[name].allows(value)  # type: ignore[index]
            assert name != "steps" or int(value) % 2 == 0


def test_guide_proposes_nothing_when_all_was_tried() -> None:
    assert Guide(landscape, Kind.TORCH, 0).proposal(lambda _decisions: True) is None


def test_guide_goes_on_when_nothing_could_be_measured_yet() -> None:
    guide = Guide(landscape, Kind.TORCH, 0)
    guide.tell({"narrow": "none"}, None, {})
    assert guide.proposal(lambda _decisions: False) is not None


def test_guide_turns_from_what_cant_be_built() -> None:
    """All of the clever ones fail, whatever else they choose, and half of what is at random is
    clever; nothing else tells them from the others."""

    def n_clever(is_told: bool) -> int:
        found = 0
        for seed in range(4):
            guide, tried = Guide(landscape, Kind.TORCH, seed), list[Mapping[str, Value]]()
            for _ in range(12):
                one = guide.proposal(lambda one, tried=tried: one.values in tried)  # type: ignore[misc]
                assert one is not None
                fails = parameters(one).get("how") == "clever"
                objective = None if fails else 1.0
                guide.tell(one.values, objective, {}, is_built=not (fails and is_told))
                tried.append(one.values)
                found += fails
        return found

    assert 2 * n_clever(is_told=True) < n_clever(is_told=False)


def told(guide: Guide, n: int) -> list[Decisions]:
    """Random trials that the guide is told."""
    rng = np.random.default_rng(7)
    tried = []
    for _ in range(n):
        one = walk(landscape, Kind.TORCH, lambda _name, given: _drawn(given, rng))
        guide.tell(one.values, cost(one), {"drop": drop(one)})
        tried.append(one)
    return tried


def proposed(guide: Guide, taken: list[Decisions]) -> Decisions:
    values = [one.values for one in taken]
    found = guide.proposal(lambda one: one.values in values)
    assert found is not None
    return found


def test_trial_under_way_counts_as_the_guide_predicts_it() -> None:
    open_one, answered, ignorant = (Guide(landscape, Kind.TORCH, 0) for _ in range(3))
    for guide in (open_one, answered, ignorant):
        tried = told(guide, 30)
    dear = walk(landscape, Kind.TORCH, lambda _name, given: given.default)
    open_one.begin(dear.values)
    [belief] = open_one.believed()
    answered.tell(dear.values, belief.objective, belief.constraints)
    ignorant.tell(dear.values, 1e-3, {"drop": -1.0})

    taken = [*tried, dear]
    ours, theirs, others = (
        proposed(guide, taken).values for guide in (open_one, answered, ignorant)
    )
    assert ours == theirs != others


def test_belief_is_near_the_truth_where_much_was_seen() -> None:
    guide = Guide(landscape, Kind.TORCH, 0)
    tried = told(guide, 60)
    one = proposed(guide, tried)
    guide.begin(one.values)
    [believed] = guide.believed()
    assert believed.objective == pytest.approx(cost(one), rel=0.3)
    assert believed.constraints["drop"] == pytest.approx(drop(one), abs=0.3)


def test_belief_ends_with_the_answer() -> None:
    began, plain = (Guide(landscape, Kind.TORCH, 0) for _ in range(2))
    tried = told(began, 12)
    told(plain, 12)
    first = proposed(began, tried)
    began.begin(first.values)
    for guide in (began, plain):
        guide.tell(first.values, 0.2, {"drop": -0.5})
    assert began.believed() == []
    taken = [*tried, first]
    assert proposed(began, taken).values == proposed(plain, taken).values


def test_guide_believes_nothing_of_figures_that_nobody_has_seen() -> None:
    guide = Guide(landscape, Kind.TORCH, 0)
    guide.begin({"narrow": "none"})
    [believed] = guide.believed()
    assert (believed.objective, believed.constraints) == (None, {})
    assert guide.proposal(lambda _decisions: False) is not None
