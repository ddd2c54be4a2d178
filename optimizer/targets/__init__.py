"""Targets: what a model is compiled to, one module each.

A target makes the files and the spec of one engine, and says why it can't here. It doesn't know
the search, nor how the engine is served.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from optimizer.space import Categorical, Distribution, Parameters, Space
from optimizer.techniques import Context
from optimizer.variant import EngineModel, Model

ENGINE = "engine"
"""The parameter that picks the target."""


class Target(Protocol):
    @property
    def name(self) -> str:
        """Of the engine, or of the engine on a device of its own."""
        ...

    @property
    def shown(self) -> str: ...

    def why_not(self, context: Context) -> str | None:
        """Why the target machine can't run it, or this one can't make it; None where they can."""
        ...

    def space(self, model: Model, context: Context) -> Mapping[str, Categorical]:
        """Its options; only those that make a difference on some model."""
        ...

    def describe(self, parameters: Parameters) -> str:
        """Engine and options in a few words; options at their default needn't be told."""
        ...

    def compile(self, model: Model, parameters: Parameters, directory: Path) -> EngineModel:
        """Write the engine's files into the empty `directory`. Equal models and parameters give
        equal files."""
        ...


def available(targets: Iterable[Target], context: Context) -> list[Target]:
    return [target for target in targets if target.why_not(context) is None]


def missing(targets: Iterable[Target], context: Context) -> dict[str, str]:
    """Target, as it is shown → why it can't be used."""
    reasons = {target.shown: target.why_not(context) for target in targets}
    return {shown: reason for shown, reason in reasons.items() if reason is not None}


def joint_space(targets: Iterable[Target], model: Model, context: Context) -> Space:
    """The engine, then the options of each under that condition. Options of two targets have
    different names."""
    spaces = {target.name: target.space(model, context) for target in targets}
    joint: dict[str, Distribution] = {ENGINE: Categorical(tuple(spaces), is_baseline=True)}
    for name, space in spaces.items():
        for option, one in space.items():
            assert option not in joint, f"two targets have an option {option}"
            joint[option] = replace(one, when={ENGINE: (name,), **one.when})
    return joint
