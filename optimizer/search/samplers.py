"""Samplers: Optuna's, by the names that a spec has for them.

They are for comparison: the default, `gp`, is `search.guide`, which decides before Optuna is asked.
A grid is no sampler either but an order of trials, see `landscape.grid`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna

POPULATION = 20
"""Of NSGA-II, whose default of 50 is more than most studies have trials."""


def new_study(sampler: str, seed: int) -> Any:
    """An Optuna study, in memory, that minimizes. Raises KeyError for an unknown sampler."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.create_study(sampler=SAMPLERS[sampler](seed), direction="minimize")


def _tpe(seed: int) -> Any:
    # `group` splits a conditional space into parts that are always sampled together.
    return optuna.samplers.TPESampler(seed=seed, group=True)


def _random(seed: int) -> Any:
    return optuna.samplers.RandomSampler(seed=seed)


def _nsga2(seed: int) -> Any:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)


SAMPLERS: Mapping[str, Callable[[int], Any]] = {
    "gp": _random,  # decides what the guide has left open, which is nothing
    "tpe": _tpe,
    "random": _random,
    "nsga2": _nsga2,
    "grid": _random,  # decides what the grid has left open, which is nothing
}
