"""The landscape: recipes as sequences of decisions, each with its distribution.

Walking it makes one complete recipe, with each decision taken by whoever walks: a sampler, or
the enumeration of baselines. Which decisions there are depends on the ones before.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from optimizer.errors import ParityMismatch, TechniqueFailed, TechniqueNotApplicable
from optimizer.recipe import EFFORT, EFFORTS, Recipe, Traits
from optimizer.space import Categorical, Distribution, Space, Value, exists
from optimizer.variant import CHANGING, Kind, Stage

NONE = "none"
"""The choice of going without an optional stage."""
GRID_POINTS = 5
"""Of a number, where every combination is tried."""


@dataclass(frozen=True)
class Option:
    """A technique that may come next, with its parameters for the model at hand."""

    traits: Traits
    space: Space


Unbuildable = TechniqueNotApplicable | TechniqueFailed | ParityMismatch

Landscape = Callable[[Recipe], Sequence[Option]]
"""The techniques that can come after a recipe, with their spaces for the base model as far as the
recipe's other steps go: what changes the network has yet to be built, and isn't for this. It may
have to build those other steps to know, and raises one of Unbuildable where that fails."""

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
        for stages in _by_rank():
            options = landscape(recipe)
            chosen = [
                one for stage in stages if (one := _decide_step(stage, options, decide, recipe))
            ]
            if len(chosen) > 1:  # of one rank, so either may come first
                names = tuple(traits.name for traits, _ in chosen)
                first = decide("first", Categorical(names))
                chosen.sort(key=lambda step, first=first: step[0].name != first)  # type: ignore[misc]
            for traits, parameters in chosen:
                recipe = recipe.then(traits, parameters)
    except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
        return Decisions(recipe, values, error)
    return Decisions(recipe, values, _useless(recipe))


def _useless(recipe: Recipe) -> TechniqueNotApplicable | None:
    """Why a step is of no use in the recipe: nothing came of what it prepares for."""
    for choice in recipe.choices:
        stage = choice.prepares
        if stage is not None and stage in recipe.lacks:
            reason = f"it prepares for a step of stage {stage.value}, and none can follow"
            return TechniqueNotApplicable(choice.traits.name, reason)
    return None


def _by_rank() -> list[list[Stage]]:
    stages = sorted(Stage, key=lambda stage: stage.rank)
    return [list(group) for _, group in groupby(stages, key=lambda stage: stage.rank)]


def baselines(landscape: Landscape, starts_from: Kind) -> Iterator[Decisions]:
    """Every combination of the choices that are marked as baselines, with defaults for the rest:
    what a user gets off the shelf. The first is the plainest."""

    def others(distribution: Distribution) -> Sequence[Value]:
        marked = isinstance(distribution, Categorical) and distribution.is_baseline
        return distribution.choices[1:] if marked else ()  # type: ignore[union-attr]

    return _combinations(landscape, starts_from, others)


def grid(landscape: Landscape, starts_from: Kind) -> Iterator[Decisions]:
    """Every combination of choices, numbers at `GRID_POINTS` steps between their ends."""
    return _combinations(landscape, starts_from, _others_on_grid)


def _others_on_grid(distribution: Distribution) -> Sequence[Value]:
    if isinstance(distribution, Categorical):
        return distribution.choices[1:]
    low, high = distribution.low, distribution.high
    shares = [index / (GRID_POINTS - 1) for index in range(GRID_POINTS)]
    if distribution.logarithmic:
        points = [low * (high / low) ** share for share in shares]
    else:
        points = [low + (high - low) * share for share in shares]
    if distribution.whole:
        step = distribution.step
        points = [int(low) + round((point - low) / step) * step for point in points]
    return [point for point in dict.fromkeys(points) if point != distribution.default]


def _combinations(
    landscape: Landscape,
    starts_from: Kind,
    others: Callable[[Distribution], Sequence[Value]],
) -> Iterator[Decisions]:
    """Walks with every combination of defaults and `others`, breadth first."""
    pending: deque[dict[str, Value]] = deque([{}])
    while pending:
        given = pending.popleft()
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
            pending.extend({**taken, name: other} for other in others(distribution))
            taken[name] = distribution.default
            return distribution.default

        yield walk(landscape, starts_from, choose)


def _decide_step(
    stage: Stage,
    options: Sequence[Option],
    decide: Callable[[str, Distribution], Value],
    recipe: Recipe,
) -> tuple[Traits, dict[str, Value]] | None:
    lacks = recipe.lacks
    here = [option for option in options if option.traits.stage is stage]
    # A step can be gone without where an engine takes what there is already.
    avoidable = not lacks and any(
        option.traits.stage is Stage.COMPILE for option in options if option not in here
    )
    fitting = [_narrowed(option, recipe.wanted(stage)) for option in here]
    here = [option for option in fitting if option is not None]
    option = _decide_option(stage, here, decide, avoidable, stage in lacks)
    return None if option is None else (option.traits, _decide_parameters(option, decide))


def _narrowed(option: Option, wanted: Mapping[str, tuple[Value, ...]]) -> Option | None:
    """The option with the values alone that are `wanted` of its parameters; None where it has
    none of them."""
    space = dict(option.space)
    for name, values in wanted.items():
        own = space.get(name)
        left = (
            tuple(choice for choice in own.choices if choice in values)
            if isinstance(own, Categorical)
            else ()
        )
        if not isinstance(own, Categorical) or not left:
            return None
        space[name] = replace(own, choices=left)
    return Option(option.traits, space)


def _decide_option(
    stage: Stage,
    options: Sequence[Option],
    decide: Callable[[str, Distribution], Value],
    avoidable: bool,
    is_lacking: bool,
) -> Option | None:
    if not options:
        return None
    by_name = {option.traits.name: option for option in options}
    optional = all(option.traits.optional for option in options) and not is_lacking
    # What is needed for most engines comes first, going without it for the others last.
    names = (NONE, *by_name) if optional else (*by_name, *((NONE,) if avoidable else ()))
    # What changes the network isn't had off the shelf.
    off_the_shelf = stage not in CHANGING
    chosen = decide(stage.value, Categorical(names, is_baseline=off_the_shelf))
    return by_name.get(str(chosen))


def _decide_parameters(
    option: Option, decide: Callable[[str, Distribution], Value]
) -> dict[str, Value]:
    parameters: dict[str, Value] = {}
    for name, distribution in option.space.items():
        if name == EFFORT:
            parameters[name] = EFFORTS[-1]
        elif exists(distribution, parameters):
            parameters[name] = decide(f"{option.traits.name}.{name}", distribution)
    return parameters


def _shown(distribution: Distribution) -> str:
    if isinstance(distribution, Categorical):
        return "|".join(str(choice) for choice in distribution.choices)
    return f"{distribution.low:g}..{distribution.high:g}"
