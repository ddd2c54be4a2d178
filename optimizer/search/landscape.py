"""The landscape: recipes as sequences of decisions, each with its distribution.

Walking it makes one complete recipe, with each decision taken by whoever walks: a sampler, or
the enumeration of baselines. Which decisions there are depends on the ones before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from optimizer.errors import ParityMismatch, TechniqueFailed, TechniqueNotApplicable
from optimizer.recipe import Recipe, Traits
from optimizer.space import Categorical, Distribution, Space, Value, exists
from optimizer.variant import Kind, Stage

NONE = "none"
"""The choice of going without an optional stage."""


@dataclass(frozen=True)
class Option:
    """A technique that may come next, with its parameters for the model at hand."""

    traits: Traits
    space: Space


Unbuildable = TechniqueNotApplicable | TechniqueFailed | ParityMismatch

Landscape = Callable[[Recipe], Sequence[Option]]
"""The techniques that can come after a recipe. It may have to build the recipe to know, and
raises one of Unbuildable where that fails."""

Chooser = Callable[[str, Distribution], Value]
"""Takes the decision of that name."""


@dataclass(frozen=True)
class Decisions:
    """A way through the landscape: a complete recipe, or one as far as it could be built with
    the `failure` that ended it. `values` are the decisions by name."""

    recipe: Recipe
    values: dict[str, Value]
    failure: Unbuildable | None = None


def remembered(landscape: Landscape) -> Landscape:
    """The landscape, asked once about each recipe; it answers or fails the same way again."""
    known: dict[Recipe, Sequence[Option] | Unbuildable] = {}

    def ask(recipe: Recipe) -> Sequence[Option]:
        if recipe not in known:
            try:
                known[recipe] = landscape(recipe)
            except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
                known[recipe] = error
        answer = known[recipe]
        if isinstance(answer, TechniqueNotApplicable | TechniqueFailed | ParityMismatch):
            raise answer
        return answer

    return ask


def walk(landscape: Landscape, starts_from: Kind, choose: Chooser) -> Decisions:
    """Decide stage by stage until the recipe gives an engine.

    A decision is named by its technique, its parameter and its distribution, so that one name
    always has the same choices, as samplers want it.
    """
    recipe = Recipe(starts_from)
    values: dict[str, Value] = {}

    def decide(name: str, distribution: Distribution) -> Value:
        if isinstance(distribution, Categorical) and len(distribution.choices) == 1:
            return distribution.default
        key = f"{name} of {_shown(distribution)}"
        values[key] = choose(key, distribution)
        return values[key]

    try:
        for stage in sorted(Stage, key=lambda stage: stage.rank):
            options = [o for o in landscape(recipe) if o.traits.stage is stage]
            option = _decide_option(stage, options, decide)
            if option is not None:
                recipe = recipe.then(option.traits, _decide_parameters(option, decide))
    except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
        return Decisions(recipe, values, error)
    return Decisions(recipe, values)


def baselines(landscape: Landscape, starts_from: Kind) -> Iterator[Decisions]:
    """Every combination of the choices that are marked as baselines, with defaults for the rest:
    what a user gets off the shelf. The first is the plainest."""
    pending: list[dict[str, Value]] = [{}]
    while pending:
        given = pending.pop(0)
        taken: dict[str, Value] = {}

        def choose(
            name: str,
            distribution: Distribution,
            given: dict[str, Value] = given,
            taken: dict[str, Value] = taken,
        ) -> Value:
            if name in given:
                taken[name] = given[name]
                return given[name]
            if isinstance(distribution, Categorical) and distribution.is_baseline:
                pending.extend({**taken, name: other} for other in distribution.choices[1:])
            taken[name] = distribution.default
            return distribution.default

        yield walk(landscape, starts_from, choose)


def _decide_option(
    stage: Stage, options: Sequence[Option], decide: Callable[[str, Distribution], Value]
) -> Option | None:
    if not options:
        return None
    by_name = {option.traits.name: option for option in options}
    optional = all(option.traits.optional for option in options)
    names = ((NONE,) if optional else ()) + tuple(by_name)
    chosen = decide(stage.value, Categorical(names, is_baseline=True))
    return by_name.get(str(chosen))


def _decide_parameters(
    option: Option, decide: Callable[[str, Distribution], Value]
) -> dict[str, Value]:
    parameters: dict[str, Value] = {}
    for name, distribution in option.space.items():
        if exists(distribution, parameters):
            parameters[name] = decide(f"{option.traits.name}.{name}", distribution)
    return parameters


def _shown(distribution: Distribution) -> str:
    if isinstance(distribution, Categorical):
        return "|".join(str(choice) for choice in distribution.choices)
    return f"{distribution.low:g}..{distribution.high:g}"
