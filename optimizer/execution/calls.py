"""Calls: what can be asked of whoever builds, in plain values.

A recipe travels as a list of (technique, parameters), spaces and blocks as mappings, variants by
their ids: they are in the store.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from optimizer.blocks import Block
from optimizer.builder import Builder
from optimizer.errors import (
    OptimizerError,
    ParityMismatch,
    SpecInvalid,
    TechniqueFailed,
    TechniqueNotApplicable,
)
from optimizer.recipe import Recipe, Traits
from optimizer.search.landscape import Option
from optimizer.space import Categorical, Distribution, Number, Space
from serve.machine import Machine

Json = Any


def answer(builder: Builder, call: str, arguments: Mapping[str, Json]) -> Json:
    """Do the call with the builder. Raises KeyError for an unknown one, else what it raises."""
    return _CALLS[call](builder, arguments)


def _build(builder: Builder, arguments: Mapping[str, Json]) -> Json:
    return builder.build(recipe_from(arguments["recipe"], builder)).id


def _option(builder: Builder, arguments: Mapping[str, Json]) -> Json:
    recipe = recipe_from(arguments["recipe"], builder)
    option = builder.option(arguments["technique"], recipe)
    if option is None:
        return {"refusal": builder.refusals[arguments["technique"]]}
    return {"space": space_to(option.space), "refusals": dict(builder.refusals)}


def _blocks(builder: Builder, arguments: Mapping[str, Json]) -> Json:
    found = builder.blocks(recipe_from(arguments["recipe"], builder))
    return None if found is None else [[asdict(one), count] for one, count in found.items()]


def _timed_blocks(builder: Builder, arguments: Mapping[str, Json]) -> Json:
    return [asdict(one) for one in builder.timed_blocks(arguments["technique"])]


def _timed_networks(builder: Builder, arguments: Mapping[str, Json]) -> Json:
    found = builder.timed_networks(arguments["technique"], arguments["max_s"])
    return [[key, one.id] for key, one in found]


_CALLS: Mapping[str, Callable[[Builder, Mapping[str, Json]], Json]] = {
    "build": _build,
    "option": _option,
    "blocks": _blocks,
    "timed_blocks": _timed_blocks,
    "timed_networks": _timed_networks,
}


def recipe_to(recipe: Recipe) -> Json:
    return [[choice.traits.name, dict(choice.parameters)] for choice in recipe.choices]


def recipe_from(stored: Sequence[Sequence[Json]], builder: Builder) -> Recipe:
    """The recipe, of the builder's techniques. Raises KeyError for one that it doesn't have."""
    recipe = Recipe(builder.base.kind)
    for name, parameters in stored:
        recipe = recipe.then(builder.techniques[name].traits, parameters)
    return recipe


def space_to(space: Space) -> Json:
    return [
        [
            name,
            type(one).__name__,
            {**asdict(one), "when": {k: list(v) for k, v in one.when.items()}},
        ]
        for name, one in space.items()
    ]


def space_from(stored: Sequence[Sequence[Json]]) -> Space:
    return {name: _distribution(kind, values) for name, kind, values in stored}


def option_from(stored: Json, traits: Traits) -> Option | None:
    return None if "refusal" in stored else Option(traits, space_from(stored["space"]))


def blocks_from(stored: Json) -> dict[Block, int] | None:
    if stored is None:
        return None
    return {Block(**_with_tuples(values)): count for values, count in stored}


def timed_blocks_from(stored: Sequence[Mapping[str, Json]]) -> list[Block]:
    return [Block(**_with_tuples(values)) for values in stored]


def machine_from(stored: Mapping[str, Json]) -> Machine:
    return Machine(**_with_tuples(stored))


def error_to(error: BaseException) -> Json:
    """An error as values; whatever isn't the optimizer's own is told in words."""
    if isinstance(error, TechniqueNotApplicable):
        return {"kind": "not_applicable", "technique": error.technique, "reason": error.reason}
    if isinstance(error, ParityMismatch):
        return {
            "kind": "parity", "what": error.what, "batch_size": error.batch_size,
            "max_difference": min(error.max_difference, 1e308), "tolerance": error.tolerance,
        }  # fmt: skip
    if isinstance(error, TechniqueFailed):
        return {"kind": "failed", "technique": error.technique, "cause": _cause(error)}
    if isinstance(error, SpecInvalid):
        return {"kind": "spec", "source": error.source, "problems": list(error.problems)}
    return {"kind": "other", "cause": f"{type(error).__name__}: {error}"}


def error_from(stored: Mapping[str, Json]) -> Exception:
    values = {name: value for name, value in stored.items() if name != "kind"}
    kinds: Mapping[str, Callable[..., Exception]] = {
        "not_applicable": TechniqueNotApplicable,
        "parity": ParityMismatch,
        "failed": TechniqueFailed,
        "spec": SpecInvalid,
        "other": lambda cause: OptimizerError(f"building failed: {cause}"),
    }
    return kinds[stored["kind"]](**values)


def _cause(error: TechniqueFailed) -> str:
    cause = error.cause
    return cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"


def _distribution(kind: str, values: Mapping[str, Json]) -> Distribution:
    given = {**values, "when": {name: tuple(one) for name, one in values["when"].items()}}
    if kind == "Categorical":
        return Categorical(**{**given, "choices": tuple(given["choices"])})
    return Number(**given)


def _with_tuples(values: Mapping[str, Json]) -> dict[str, Json]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
