"""Recipes: which techniques are applied, in which order, with which parameters.

An illegal order can't be built: stages never go back, each comes at most once, and the kind that
a technique accepts is the one that the step before it gives. Recipes are plain values; models
and the applying are elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from importlib import metadata
from types import MappingProxyType

from optimizer.space import Parameters, Value
from optimizer.variant import CHANGING, STRUCTURAL, Kind, Stage, variant_id
from serve.artifact import Step


class Needs(StrEnum):
    """The data that a technique needs."""

    NOTHING = "nothing"
    UNLABELLED = "unlabelled"
    LABELS = "labels"


@dataclass(frozen=True)
class Traits:
    """What is fixed about a technique. `version` changes with anything that changes its results;
    `packages` are the distributions that decide them too."""

    name: str
    version: str
    stage: Stage
    accepts: Kind
    gives: Kind
    needs: Needs = Needs.NOTHING
    packages: tuple[str, ...] = ()
    optional: bool = True
    """Whether a recipe can go without it; export and compilation can't be left out."""
    preserves: bool = True
    """Whether outputs stay equal where the precision does. False for what changes the structure
    or the weights: accuracy judges that."""
    calibrates: bool = False
    """Whether it uses the calibration samples even where it trains, and ids have to cover both."""
    prepares: Stage | None = None
    """The stage that it is for: it is of no use in a recipe without a later step of it."""
    wants: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    """Parameters of that later step, each with the values that it is of use for."""
    shares: tuple[str, ...] = ()
    """Parameters that the later step has to have the same values of."""
    prepares_when: tuple[str, tuple[Value, ...]] | None = None
    """Its own parameter, with the values with which it prepares; without it, it always does."""
    follows: Stage | None = None
    """The stage without a step of which it can't be in a recipe: it takes what that step made."""


EFFORT = "effort"
"""The parameter of a technique of stage RECOVER that says how much it trains: one of `EFFORTS`.
It is no choice of the search's but the rung that a trial has come to."""
EFFORTS = ("recalibrate", "short", "full")
"""By rising cost: batch-norm statistics alone, a few epochs, all that was asked for."""
EPOCHS = "epochs"
"""The parameter of a step without an effort that trains: its passes over train (of each of its
trainings, where it has several), the same on every rung, so that they are spent before the network
is timed."""


@dataclass(frozen=True)
class Choice:
    """A technique with its parameters."""

    traits: Traits
    parameters: Parameters

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))

    def __hash__(self) -> int:
        return hash((self.traits, tuple(sorted(self.parameters.items(), key=repr))))

    @property
    def trains_first(self) -> bool:
        """Whether it trains as much on every rung."""
        return EPOCHS in self.parameters and EFFORT not in self.parameters

    @property
    def trains(self) -> bool:
        """Whether all of train decides its result."""
        return EFFORT in self.parameters or self.trains_first

    @property
    def prepares(self) -> Stage | None:
        """The stage that it is for, with the parameters that it has."""
        when = self.traits.prepares_when
        if when is not None and self.parameters.get(when[0]) not in when[1]:
            return None
        return self.traits.prepares

    def wanted(self) -> dict[str, tuple[Value, ...]]:
        """Of the step that it prepares for: parameter → the values that it is of use for."""
        given = self.parameters
        shared = {name: (given[name],) for name in self.traits.shares if name in given}
        return {**dict(self.traits.wants), **shared}


@dataclass(frozen=True)
class Recipe:
    """Steps from a model of the kind `starts_from`."""

    starts_from: Kind
    choices: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        kind = self.starts_from
        seen: list[Stage] = []
        for index, choice in enumerate(self.choices):
            traits = choice.traits
            if traits.accepts is not kind:
                raise ValueError(f"{traits.name} accepts {traits.accepts} models, got {kind}")
            if traits.stage in seen or any(stage.rank > traits.stage.rank for stage in seen):
                done = ", ".join(stage.value for stage in seen)
                raise ValueError(f"{traits.name} ({traits.stage.value}) can't come after {done}")
            if traits.follows is not None and traits.follows not in seen:
                raise ValueError(
                    f"{traits.name} can't come without a {traits.follows.value} before"
                )
            _check_prepared(choice, _wanted(self.choices[:index], traits.stage))
            seen.append(traits.stage)
            kind = traits.gives

    @property
    def gives(self) -> Kind:
        return self.choices[-1].traits.gives if self.choices else self.starts_from

    def then(self, traits: Traits, parameters: Mapping[str, Value]) -> "Recipe":
        """The recipe with one step more. Raises ValueError for a step that can't come here."""
        return Recipe(self.starts_from, (*self.choices, Choice(traits, parameters)))

    @property
    def is_structural(self) -> bool:
        """Whether it changes the network, whose accuracy then has to be won back."""
        return any(choice.traits.stage in STRUCTURAL for choice in self.choices)

    def wanted(self, stage: Stage) -> dict[str, tuple[Value, ...]]:
        """Parameters of a step of that stage, with the values that the steps that prepare for it
        are of use for."""
        return _wanted(self.choices, stage)

    @property
    def trains(self) -> bool:
        """Whether a step of it trains by as much as is the ladder's matter."""
        return any(EFFORT in choice.parameters for choice in self.choices)

    @property
    def lacks(self) -> frozenset[Stage]:
        """The stages that its steps prepare for, and that are still to come."""
        wanted = {choice.prepares for choice in self.choices}
        had = {choice.traits.stage for choice in self.choices}
        return frozenset(stage for stage in wanted if stage is not None and stage not in had)

    def skeleton(self) -> "Recipe":
        """The recipe without the steps that change the network or its weights."""
        kept = tuple(choice for choice in self.choices if choice.traits.stage not in CHANGING)
        return Recipe(self.starts_from, kept)

    def with_effort(self, effort: str) -> "Recipe":
        """The recipe with as much training as that in the steps that train."""
        return Recipe(self.starts_from, tuple(_at(choice, effort) for choice in self.choices))

    def can_take(self, traits: Traits) -> bool:
        """Whether the technique can come next."""
        stages = [choice.traits.stage for choice in self.choices]
        return (
            traits.accepts is self.gives
            and traits.stage not in stages
            and (traits.follows is None or traits.follows in stages)
            and all(stage.rank <= traits.stage.rank for stage in stages)
        )

    def __str__(self) -> str:
        return " → ".join(_shown(choice) for choice in self.choices) or "untouched"


def _wanted(choices: Sequence[Choice], stage: Stage) -> dict[str, tuple[Value, ...]]:
    found: dict[str, tuple[Value, ...]] = {}
    for choice in choices:
        if choice.prepares is stage:
            found |= choice.wanted()
    return found


def _check_prepared(choice: Choice, wanted: Mapping[str, tuple[Value, ...]]) -> None:
    for name, values in wanted.items():
        if choice.parameters.get(name) not in values:
            allowed = " or ".join(map(str, values))
            raise ValueError(
                f"{choice.traits.name}: {name}: got {choice.parameters.get(name)}, want {allowed}, "
                "for which an earlier step prepares"
            )


def _at(choice: Choice, effort: str) -> Choice:
    if EFFORT not in choice.parameters:
        return choice
    return Choice(choice.traits, {**choice.parameters, EFFORT: effort})


def step_of(choice: Choice, seed: int) -> Step:
    """The choice as a manifest records it."""
    traits = choice.traits
    return Step(
        technique=traits.name,
        technique_version=traits.version,
        parameters=dict(choice.parameters),
        seed=seed,
        packages={name: _installed(name) for name in traits.packages},
    )


def steps_with_ids(
    recipe: Recipe, base_id: str, seed: int, data_digest: str, train_digest: str = ""
) -> tuple[tuple[Step, str], ...]:
    """Each step of the recipe with the id of the variant that it makes, in order.

    `data_digest` is that of the calibration samples, which steps that use data have in their
    ids; `train_digest` that of all of train, for steps that train. Steps that do both have both.
    """
    steps = []
    parent = base_id
    for choice in recipe.choices:
        step = step_of(choice, seed)
        digest = _digest(choice, data_digest, train_digest)
        uses_data = choice.traits.needs is not Needs.NOTHING
        parent = variant_id(parent, asdict(step), digest if uses_data else "")
        steps.append((step, parent))
    return tuple(steps)


def _digest(choice: Choice, data_digest: str, train_digest: str) -> str:
    if not choice.trains:
        return data_digest
    return f"{train_digest} {data_digest}" if choice.traits.calibrates else train_digest


@cache
def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _shown(choice: Choice) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in choice.parameters.items())
    return f"{choice.traits.name} ({parameters})" if parameters else choice.traits.name
