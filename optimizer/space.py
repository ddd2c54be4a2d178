"""Parameters of a technique: their distributions, which may depend on the model.

Plain values without a sampler; `optimizer.search` translates them for Optuna.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = str | int | float | bool
Parameters = Mapping[str, Value]


@dataclass(frozen=True)
class Categorical:
    """One of `choices`, of which the first is the default; a single one isn't searched."""

    choices: tuple[Value, ...]
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    """Earlier parameter → values for which this one exists."""
    is_baseline: bool = False
    """Whether each choice is tried once, all else at its default, before the search begins."""

    def __post_init__(self) -> None:
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"got the choices {self.choices}, want at least one, each once")

    @property
    def default(self) -> Value:
        return self.choices[0]

    def allows(self, value: Value) -> bool:
        # True == 1 in Python, but not in a recipe.
        return any(value == choice and type(value) is type(choice) for choice in self.choices)


@dataclass(frozen=True)
class Number:
    """Whole or real numbers from `low` to `high`, both included."""

    low: float
    high: float
    default: float
    whole: bool = False
    logarithmic: bool = False
    step: int = 1
    """Of whole numbers."""
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.low <= self.default <= self.high:
            raise ValueError(f"got {self.low} to {self.high} with {self.default} as default")

    def allows(self, value: Value) -> bool:
        kinds = int if self.whole else int | float
        return (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
        )


Distribution = Categorical | Number
Space = Mapping[str, Distribution]
"""In order: a condition names an earlier parameter."""


def exists(distribution: Distribution, chosen: Parameters) -> bool:
    """Whether the parameter exists, given those `chosen` before it."""
    return all(chosen.get(name) in values for name, values in distribution.when.items())


def defaults(space: Space, **given: Value) -> dict[str, Value]:
    """Every parameter that exists: as given, else its default."""
    chosen: dict[str, Value] = {}
    for name, distribution in space.items():
        if exists(distribution, chosen):
            chosen[name] = given.get(name, distribution.default)
    check_parameters(space, chosen)
    return chosen


def check_parameters(space: Space, parameters: Parameters) -> None:
    """Raises ValueError unless `parameters` are exactly those of the space that exist."""
    wanted = [name for name, one in space.items() if exists(one, parameters)]
    if sorted(wanted) != sorted(parameters):
        raise ValueError(f"got the parameters {sorted(parameters)}, want {sorted(wanted)}")
    for name, value in parameters.items():
        if not space[name].allows(value):
            raise ValueError(f"{name}: got {value!r}, want one of {space[name]}")
