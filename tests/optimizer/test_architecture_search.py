"""The search for a network: rewards, proposers, the controller's gradient."""

import math

import numpy as np
import pytest
import torch

from optimizer.architecture.controller import Controller, Policy
from optimizer.architecture.predictor import PredictorGuided, fitted
from optimizer.architecture.proposers import Evolution, RandomSearch, mutated
from optimizer.architecture.reward import Reward
from optimizer.architecture.search import (
    NothingFastEnough,
    Worth,
    check_target,
    explored,
    front,
)
from optimizer.architecture.space import ArchitectureSpace, StageChoices, VisionNetworks

SMALL = ArchitectureSpace(
    VisionNetworks((1, 8, 8), 10, (4,), (StageChoices((1, 2), (8, 16), ("conv", "depthwise")),))
)
LARGE = ArchitectureSpace(
    VisionNetworks(
        (1, 8, 8),
        10,
        (4, 8),
        (
            StageChoices((1, 2, 3), (8, 16, 24), ("conv", "mbconv"), (3, 5), (1, 2)),
            StageChoices((1, 2, 3), (16, 32), ("conv", "mbconv"), (3, 5), (1, 2), stride=2),
        ),
    )
)
PROPOSERS = {
    "random": RandomSearch,
    "evolution": Evolution,
    "reinforce": Controller,
    "ppo": lambda space, seed: Controller(space, seed, "ppo"),
    "predictor": lambda space, seed: PredictorGuided(space, seed, lambda _: 1.0),
}


def linear(space, seed=0):
    """A worth that is a sum over decisions, and the largest there is."""
    weights = np.random.default_rng(seed).standard_normal(len(space.vector(space.extreme(True))))
    return lambda choices: float(space.vector(choices) @ weights)


# --- reward


@pytest.mark.parametrize(
    ("latency_s", "expected"),
    [(0.01, 0.9), (0.02, 0.9 * 2**-0.07), (0.005, 0.9 * 2**0.07)],
    ids=["on target", "twice as slow", "twice as fast"],
)
def test_reward_equals_mnasnet_formula(latency_s, expected):
    assert Reward(0.01)(0.9, latency_s) == pytest.approx(expected)


def test_hard_reward_cares_for_latency_beyond_the_target_alone():
    hard = Reward(0.01, within=0, beyond=-1)
    assert hard(0.9, 0.001) == hard(0.9, 0.01) == 0.9
    assert hard(0.9, 0.02) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Reward(0.0), "target_s: got 0.0, want above 0"),
        (lambda: Reward(1.0, within=0.1), "within: got 0.1, want -10 to 0"),
        (lambda: Reward(1.0)(math.nan, 1.0), "got accuracy nan at 1.0 s"),
        (lambda: Reward(1.0)(0.5, 0.0), "got accuracy 0.5 at 0.0 s"),
    ],
    ids=["no target", "reward for slowness", "no accuracy", "no time"],
)
def test_reward_refuses_what_has_no_value(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# --- proposers


@pytest.mark.parametrize("name", sorted(PROPOSERS))
def test_proposer_is_the_same_again_by_its_seed(name):
    def proposed(seed):
        proposer, worth = PROPOSERS[name](LARGE, seed), linear(LARGE)
        found = []
        for _ in range(25):
            found.append(proposer.ask())
            proposer.tell(found[-1], worth(found[-1]))
        return found

    assert proposed(1) == proposed(1)
    assert proposed(1) != proposed(2)


@pytest.mark.parametrize("name", sorted(PROPOSERS))
def test_proposer_gives_networks_of_the_space(name):
    proposer = PROPOSERS[name](LARGE, 0)
    for _ in range(30):
        choices = proposer.ask()
        assert LARGE.canonical(choices) == choices
        proposer.tell(choices, 0.5)


@pytest.mark.parametrize("name", sorted(set(PROPOSERS) - {"random"}))
def test_proposer_learns_where_decisions_add_up(name):
    """Better on average in its last networks than in its first, by far more than chance."""
    worth = linear(LARGE)
    proposer = PROPOSERS[name](LARGE, 0)
    rewards = []
    for _ in range(60 if name == "predictor" else 200):
        choices = proposer.ask()
        rewards.append(worth(choices))
        proposer.tell(choices, rewards[-1])
    first, last = np.array(rewards[:15]), np.array(rewards[-30:])
    assert last.mean() > first.mean() + first.std()


def test_mutated_changes_one_decision_and_what_hangs_on_it():
    rng = np.random.default_rng(0)
    for choices in (LARGE.sample(rng) for _ in range(50)):
        other = mutated(LARGE, choices, rng)
        changed = [
            decision
            for decision, one, another in zip(LARGE.decisions, choices, other, strict=True)
            if one != another
        ]
        assert changed
        causes = {changed[0].name}
        assert all(causes & set(decision.depends_on) for decision in changed[1:])


def test_evolution_keeps_its_youngest_only():
    evolution = Evolution(SMALL, 0, population=3, tournament=3)
    a, b, c, d = list(SMALL.every())[:4]
    for choices, reward in ((a, 9.0), (b, 1.0), (c, 2.0), (d, 3.0)):
        evolution.ask()
        evolution.tell(choices, reward)
    # The best ever, a, has died; the parent is d.
    differences = sum(one != other for one, other in zip(evolution.ask(), d, strict=True))
    assert differences <= 2


def test_evolution_refuses_a_tournament_larger_than_its_population():
    with pytest.raises(ValueError, match="tournament: got 5, want 1 to 3"):
        Evolution(SMALL, 0, population=3)


# --- the controller


def test_policy_draws_as_often_as_it_says():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        policy = Policy(SMALL, 8)
        with torch.no_grad():
            for head in policy.heads:
                head.bias.uniform_(-1, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = [policy.draw(generator) for _ in range(2000)]
    probabilities = {one: math.exp(float(policy.judge([one])[0].detach())) for one in SMALL.every()}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    for choices, probability in probabilities.items():
        error = 4 * math.sqrt(probability * (1 - probability) / 2000)
        assert drawn.count(choices) / 2000 == pytest.approx(probability, abs=error)


def test_policy_gradient_equals_finite_differences_of_the_expected_reward():
    """The expectation over all networks of reward × gradient of the log-probability, against the
    slope of the expected reward itself, in 64 bits."""
    torch.manual_seed(0)
    policy = Policy(SMALL, 4).double()
    every = list(SMALL.every())
    worth = linear(SMALL)
    head = policy.heads[SMALL.decisions.index(SMALL.decisions[2])]

    def expected() -> float:
        with torch.no_grad():
            return sum(float(policy.judge([one])[0].exp()) * worth(one) for one in every)

    policy.zero_grad()
    with torch.no_grad():
        weights = [float(policy.judge([one])[0].exp()) for one in every]
    estimate = torch.stack(
        [
            weight * worth(one) * policy.judge([one])[0][0]
            for weight, one in zip(weights, every, strict=True)
        ]
    ).sum()
    estimate.backward()
    for parameter in (head.bias, policy.start):
        assert parameter.grad is not None
        for index in range(len(parameter)):
            step = 1e-6
            with torch.no_grad():
                parameter[index] += step
                above = expected()
                parameter[index] -= 2 * step
                below = expected()
                parameter[index] += step
            slope = (above - below) / (2 * step)
            assert float(parameter.grad[index]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("method", ["reinforce", "ppo"])
def test_controller_learns_the_best_arm_of_a_bandit(method):
    arms = ArchitectureSpace(
        VisionNetworks((1, 8, 8), 10, (4, 8, 16, 32), (StageChoices((1,), (8,)),))
    )
    controller = Controller(arms, 0, method, learning_rate=0.02)
    index = [decision.name for decision in arms.decisions].index("stem")
    for _ in range(400):
        choices = controller.ask()
        controller.tell(choices, 1.0 if choices[index] == 2 else 0.0)
    asked = [controller.ask()[index] for _ in range(50)]
    assert asked.count(2) > 40


# --- the predictor


def test_predictor_equals_ridge_regression_with_a_free_mean():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 5)), rng.standard_normal(12)
    found = fitted(list(x), list(y))
    errors = {}
    for penalty in (0.01, 0.1, 1.0, 10.0, 100.0):
        left_out = []
        for i in range(12):
            # The slow way: the centre of all, the mean and the slopes of the others.
            keep = [j for j in range(12) if j != i]
            design = np.c_[np.ones(11), x[keep] - x.mean(axis=0)]
            penalties = np.diag([0.0] + [penalty] * 5)
            solved = np.linalg.solve(design.T @ design + penalties, design.T @ y[keep])
            left_out.append(y[i] - np.r_[1, x[i] - x.mean(axis=0)] @ solved)
        errors[penalty] = math.sqrt(np.mean(np.square(left_out)))
    assert found.error == pytest.approx(min(errors.values()))
    best = min(errors, key=errors.__getitem__)
    centred = x - x.mean(axis=0)
    slopes = np.linalg.solve(centred.T @ centred + best * np.eye(5), centred.T @ (y - y.mean()))
    assert found.weights == pytest.approx(slopes)
    assert found(x[3]) == pytest.approx(y.mean() + centred[3] @ slopes)


def test_predictor_wants_two_samples():
    with pytest.raises(ValueError, match="got 1 samples, want at least 2"):
        fitted([np.zeros(3)], [1.0])


# --- the loop


def test_explored_counts_a_network_once():
    looked = list(explored(RandomSearch(SMALL, 0), lambda _: Worth(0.5, 1.0), Reward(1.0), 100))
    assert len(looked) == len({one.choices for one in looked}) == SMALL.n_networks
    assert [one.number for one in looked] == list(range(SMALL.n_networks))


def test_explored_stops_at_its_budget():
    assert len(list(explored(Evolution(LARGE, 0), lambda _: Worth(0.5, 1.0), Reward(1.0), 7))) == 7


def test_front_has_what_nothing_beats():
    worths = [Worth(0.5, 1.0), Worth(0.6, 1.0), Worth(0.4, 2.0), Worth(0.7, 3.0), Worth(0.7, 4.0)]
    given = iter(worths)
    looked = list(explored(RandomSearch(LARGE, 0), lambda _: next(given), Reward(1.0), 5))
    assert [(one.worth.accuracy, one.worth.latency_s) for one in front(looked)] == [
        (0.6, 1.0),
        (0.7, 3.0),
    ]


def test_target_below_the_fastest_is_refused_with_it():
    with pytest.raises(
        NothingFastEnough, match="the fastest of 48 networks takes 3 ms, the target is 2 ms"
    ):
        check_target(0.003, 0.002, lambda: "the smallest", 48)
    check_target(0.002, 0.002, lambda: "the smallest", 48)
