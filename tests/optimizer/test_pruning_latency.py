"""Allocation by the target's latencies: the table, the knapsack, and what it takes from where."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.blocks import Block, named_blocks
from optimizer.pruning.allocation import Candidates, allocate
from optimizer.pruning.costs import Costs
from optimizer.pruning.graph import InputShape, trace
from optimizer.pruning.groups import Network, network_of
from optimizer.pruning.knapsack import choose
from optimizer.pruning.latency import Latency, table_blocks, table_digest
from optimizer.space import Categorical, defaults
from optimizer.techniques import load_technique
from optimizer.techniques.pruning import Pruning
from optimizer.torch_variant import read_plan
from optimizer.variant import TorchVariant
from tests.optimizer.torch_bench import make_torch_bench

CONVOLUTION = Block("conv", (64, 8, 8), 48, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
DEPTHWISE = Block("conv", (32, 8, 8), 32, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups=32)
LINEAR = Block("linear", (20,), 10)


def n_inputs(block: Block) -> int:
    return block.input_shape[0 if block.kind == "conv" else -1]


def bilinear(block: Block) -> float:
    """Seconds that interpolation gives back exactly."""
    return 1e-6 * n_inputs(block) * block.n_outputs / block.groups


# --- the knapsack


def brute_force(losses, sizes, budget):
    """The least loss that fits, None where nothing does."""
    found = [
        sum(loss[i] for loss, i in zip(losses, chosen, strict=True))
        for chosen in itertools.product(*(range(len(one)) for one in losses))
        if sum(size[i] for size, i in zip(sizes, chosen, strict=True)) <= budget
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_loses_as_little_as_brute_force_when_sizes_are_whole_bins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = [rng.random(n) for n in rng.integers(1, 5, size=5)]
    sizes = [rng.integers(-3, 8, size=len(one)).astype(float) for one in losses]
    budget = float(rng.integers(0, 20))
    room = budget - sum(one.min() for one in sizes)
    chosen = choose(losses, sizes, budget, n_bins=max(1, int(room)))
    best = brute_force(losses, sizes, budget)
    if chosen is None:
        assert best is None
    else:
        assert sum(size[i] for size, i in zip(sizes, chosen, strict=True)) <= budget
        assert sum(loss[i] for loss, i in zip(losses, chosen, strict=True)) == pytest.approx(best)


def test_knapsack_fits_and_is_near_the_best_when_sizes_are_any_numbers() -> None:
    rng = np.random.default_rng(0)
    losses = [np.sort(rng.random(4))[::-1] for _ in range(6)]
    sizes = [np.sort(rng.random(4)) for _ in range(6)]
    least = sum(float(one.min()) for one in sizes)
    for room in (0.3, 0.8, 1.5, 2.5):
        budget = least + room
        chosen = choose(losses, sizes, budget)
        assert chosen is not None
        assert sum(size[i] for size, i in zip(sizes, chosen, strict=True)) <= budget
        lost = sum(loss[i] for loss, i in zip(losses, chosen, strict=True))
        # As good as the best within a budget smaller by a bin for each set.
        assert lost <= brute_force(losses, sizes, budget - 6 * room / 2000) + 1e-12


@pytest.mark.parametrize("room", [0.0, 5e-324, 1e-22, 1e-3])
def test_knapsack_stays_within_the_budget_when_there_is_hardly_room(room: float) -> None:
    losses, sizes = [np.array([0.0, 1.0])] * 2, [np.array([0.5, 0.0])] * 2
    assert choose(losses, sizes, room) == [1, 1]


def test_knapsack_says_none_when_even_the_smallest_do_not_fit() -> None:
    assert choose([np.array([0.0])], [np.array([2.0])], 1.0) is None


# --- the table


def test_table_has_multiples_of_eight_and_the_layers_own_width() -> None:
    table = table_blocks([CONVOLUTION])
    assert {one.n_outputs for one in table} == {8, 16, 24, 32, 40, 48}
    assert {n_inputs(one) for one in table} == {24, 40, 64}
    assert len(table) == 18


def test_table_keeps_depthwise_layers_depthwise() -> None:
    table = table_blocks([DEPTHWISE])
    assert {(one.n_outputs, one.groups, n_inputs(one)) for one in table} == {
        (n, n, n) for n in (8, 16, 24, 32)
    }


def test_table_has_equal_layers_once() -> None:
    assert table_blocks([LINEAR, LINEAR]) == table_blocks([LINEAR])


def test_digest_changes_with_any_time_and_is_none_when_one_is_missing() -> None:
    digest = table_digest([LINEAR], bilinear)
    assert digest == table_digest([LINEAR, LINEAR], bilinear)
    assert digest != table_digest([LINEAR], lambda block: 1.01 * bilinear(block))
    slowest = max(table_blocks([LINEAR]), key=bilinear)
    assert table_digest([LINEAR], lambda one: None if one == slowest else bilinear(one)) is None


# --- seconds of a network


class Chain(nn.Module):
    """Two stages of equal arithmetic, and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.filter = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Linear(32, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.filter(torch.relu(self.first(image))))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        return self.last(x.mean((2, 3)))


def network_and_layers() -> tuple[Network, Mapping[str, Block]]:
    torch.manual_seed(0)
    module = Chain().eval()
    network = network_of(trace(module, [InputShape("FP32", (3, 8, 8))]))
    return network, named_blocks(module, (torch.zeros(1, 3, 8, 8),))


def latency_of(seconds: Callable[[Block], float]) -> tuple[Latency, Network]:
    network, layers = network_and_layers()
    return Latency(Costs(network, network.groups), layers, seconds), network


def test_latency_is_the_sum_over_layers_at_their_widths() -> None:
    latency, network = latency_of(bilinear)
    _, layers = network_and_layers()
    names = [group.name for group in network.groups]
    for gone in ({}, {"first": 8}, {"first": 8, "second": 20, "third": 5}):
        counts = np.array([gone.get(name, 0) for name in names])
        first, second, third = (32 - gone.get(name, 0) for name in ("first", "second", "third"))
        widths = {
            "first": (3, first), "filter": (first, first), "second": (first, second),
            "third": (second, third), "last": (third, 4),
        }  # fmt: skip
        wanted = sum(
            1e-6 * i * o / (32 if name == "filter" else 1) * (32 / i if name == "filter" else 1)
            for name, (i, o) in widths.items()
        )
        assert latency.seconds(counts) == pytest.approx(wanted)
    assert layers["filter"].groups == 32


def test_latency_goes_to_nothing_when_widths_are_below_the_table() -> None:
    latency, network = latency_of(bilinear)
    index = [group.name for group in network.groups].index("second")
    counts = np.zeros(len(network.groups), dtype=np.int64)
    counts[index] = 28  # 4 are left, and the table begins at 8
    at_eight = counts.copy()
    at_eight[index] = 24
    whole = np.zeros_like(counts)
    assert latency.seconds(counts) < latency.seconds(at_eight) < latency.seconds(whole)


def candidates(seconds: Callable[[Block], float], multiple: int = 8) -> Candidates:
    latency, network = latency_of(seconds)
    groups = network.groups
    scores = [np.arange(1.0, len(group.units) + 1) for group in groups]
    return Candidates(groups, scores, Costs(network, groups), multiple, latency)


def none_moves(_group: int, _n_gone: int) -> float:
    raise AssertionError("not asked for")


def test_allocation_takes_from_where_channels_buy_time() -> None:
    """A machine on which convolutions are free: only what the linear layer reads buys time, and
    that is made by `third`, whose arithmetic is that of `second`."""

    def dear_outputs(block: Block) -> float:
        return 1e-9 if block.kind == "conv" else 1e-3 * n_inputs(block)

    given = candidates(dear_outputs)
    counts = allocate("latency", given, 0.4, none_moves)
    taken = {group.name: int(n) for group, n in zip(given.groups, counts, strict=True)}
    assert taken["third"] > 0
    assert taken["second"] == taken["first"] == 0


def test_allocation_keeps_most_importance_of_all_that_reach_the_target() -> None:
    """Against every combination of levels."""
    given = candidates(lambda block: 1e-6 + bilinear(block) ** 1.2)
    assert given.latency is not None
    whole = np.zeros(len(given.groups), dtype=np.int64)
    for ratio in (0.2, 0.4, 0.6):
        target = (1 - ratio) * given.latency.seconds(whole)
        counts = allocate("latency", given, ratio, none_moves)
        assert given.latency.seconds(counts) <= target

        def lost(levels) -> float:
            return sum(float(given.lost(index)[n]) for index, n in enumerate(levels))

        best = min(
            lost(levels)
            for levels in itertools.product(*(given.levels(i) for i in range(len(given.groups))))
            if given.latency.seconds(np.array(levels)) <= target
        )
        assert lost(counts) <= 1.02 * best


@pytest.mark.parametrize("exponent", [1 + 0.013 * step for step in range(8)])
def test_allocation_ends_when_all_that_can_go_has_to(exponent: float) -> None:
    """Whatever the sums are rounded to: with the second exponent they miss the target by that."""
    given = candidates(lambda block: 1e-6 + bilinear(block) ** exponent)
    assert given.latency is not None
    none = np.zeros(len(given.groups), dtype=np.int64)
    most = np.array([given.levels(index)[-1] for index in range(len(given.groups))])
    ratio = 1 - given.latency.seconds(most) / given.latency.seconds(none)
    assert allocate("latency", given, ratio, none_moves).tolist() == most.tolist()


def test_allocation_by_latency_is_refused_without_a_table() -> None:
    given = replace(candidates(bilinear), latency=None)
    with pytest.raises(ValueError, match="got latency without a table of the target's times"):
        allocate("latency", given, 0.3, none_moves)


# --- the technique


def test_latency_is_offered_when_the_target_was_timed(tmp_path: Path) -> None:
    bench = make_torch_bench(tmp_path)
    pruning = load_technique("pruning")
    timed = replace(bench.context, block_seconds=bilinear)
    allocation = pruning.space(bench.torch, timed)["allocation"]
    assert isinstance(allocation, Categorical)
    assert "latency" in allocation.choices
    without = pruning.space(bench.torch, bench.context)
    assert isinstance(without["allocation"], Categorical)
    assert "latency" not in without["allocation"].choices
    assert "latencies" not in without


def test_pruning_by_latency_is_pure_and_refuses_another_table(tmp_path: Path) -> None:
    bench = make_torch_bench(tmp_path)
    pruning = Pruning()
    timed = replace(bench.context, block_seconds=bilinear)
    wanted = pruning.timed_blocks(bench.torch, timed)
    assert wanted
    parameters = defaults(
        pruning.space(bench.torch, timed), allocation="latency", ratio=0.3, multiple=1
    )
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(pruning.apply(bench.torch, parameters, timed, tmp_path / name))
    assert made[0].digest == made[1].digest
    assert isinstance(made[0], TorchVariant)
    assert read_plan(made[0]).steps
    assert "30% of latency pruned by l2" in pruning.describe(parameters)
    (tmp_path / "three").mkdir()
    other = replace(timed, block_seconds=lambda block: 2 * bilinear(block))
    for context in (other, bench.context):
        with pytest.raises(
            ValueError, match=r"latencies: got [0-9a-f]{16}, and the target's table"
        ):
            pruning.apply(bench.torch, parameters, context, tmp_path / "three")
