"""Run: one search in a setting, by a controller and its controls."""

from collections.abc import Callable
from dataclasses import astuple

import torch

from optimizer.architecture.exploration import (
    N_PROPOSERS,
    Screened,
    Trail,
    explore,
    proposers_of,
    told,
)
from optimizer.architecture.networks import build
from optimizer.architecture.proxies import PROXIES
from optimizer.architecture.reward import Reward
from optimizer.architecture.search import Looked, Worth
from optimizer.architecture.setting import Setting
from optimizer.architecture.space import Choices
from optimizer.architecture.table import SpaceTable
from optimizer.space import Parameters

_UNKNOWN = 10.0
"""Times the target: what counts for a network of which a layer couldn't be timed."""
_RATED_ON = 32
"""Samples."""
_LEAST = 1e-6


def run(
    setting: Setting,
    table: SpaceTable,
    target_s: float,
    parameters: Parameters,
    accuracy: Callable[[Choices], float],
) -> tuple[Trail, ...]:
    """The trails of the parameters' controller, of evolution and of random search. The reward is
    MnasNet's with a hard limit: what is within the target is worth its accuracy, and beyond it
    latency counts in inverse proportion."""
    reward = Reward(target_s, within=0.0, beyond=-1.0)

    def seconds(choices: Choices) -> float | None:
        return table.seconds(choices)

    looked: list[Looked] = []
    n_evaluations = int(parameters["evaluations"])

    def evaluate(choices: Choices) -> Worth:
        found = seconds(choices)
        if found is None:
            return Worth(0.0, _UNKNOWN * target_s)
        worth = Worth(accuracy(choices), found)
        looked.append(Looked(len(looked), choices, worth, reward(*astuple(worth))))
        setting.context.tell(told(looked, N_PROPOSERS * n_evaluations, target_s))
        return worth

    def discount(choices: Choices) -> float:
        found = seconds(choices)
        return max(_LEAST, reward(1.0, _UNKNOWN * target_s if found is None else found))

    proposers = proposers_of(
        setting.space, str(parameters["controller"]), setting.context.seed, discount
    )
    screen = str(parameters["screen"])
    if screen != "none":
        rate = _rating(setting, screen)
        proposers = {name: Screened(one, rate) for name, one in proposers.items()}
    return explore(proposers, evaluate, reward, n_evaluations)


def _rating(setting: Setting, proxy: str) -> Callable[[Choices], float]:
    learned, _ = setting.parts()
    rows = torch.arange(min(_RATED_ON, len(learned))).numpy()
    inputs = learned.read(rows).inputs

    def rate(choices: Choices) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.context.seed)
            network = build(setting.space.plan(choices), setting.factories)
        return PROXIES[proxy](network, inputs)

    return rate
