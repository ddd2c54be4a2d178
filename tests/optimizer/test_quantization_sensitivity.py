"""Which layers are kept in fp32, and in how many evaluations."""

import math

import numpy as np
import pytest

from optimizer.quantization.graph import Graph
from optimizer.quantization.qdq import Arithmetic
from optimizer.quantization.sensitivity import fewest, kept_within, ranked
from optimizer.quantization.static import Settings, prepare, quantize_static
from tests.optimizer.onnx_networks import ArraySplit, Network, images, random, run

X86 = Arithmetic(signed=False, pairs_saturate=True, least_error=True)
N_LAYERS = 6
BAD = 3


def outlying_network() -> Graph:
    """Six convolutions, of which one takes activations with a channel a thousand times the
    others' that its weights make harmless again: in 8 bits the others' share of them is lost."""
    network = Network(("n", 3, 8, 8))
    n_inputs = 3
    for index in range(N_LAYERS):
        weights = random(8, n_inputs, 3, 3, seed=index, scale=0.25)
        if index == BAD - 1:
            weights[5] *= 1000
        if index == BAD:
            weights[:, 5] *= 0.001
        network.conv(weights, random(8, seed=index + 20, scale=0.1), pads=[1] * 4)
        network.add("Relu", network.last)
        n_inputs = 8
    return network.graph()


SPLIT = ArraySplit({"x": images(32)})


def relative_error(graph: Graph, made: Graph) -> float:
    wanted = run(graph, images(32, 3))
    return float(((run(made, images(32, 3)) - wanted) ** 2).mean() / wanted.var())


def test_sensitivity_finds_the_layers_around_the_planted_outliers() -> None:
    graph = outlying_network()
    ranking = prepare(graph, SPLIT, Settings(X86, "minmax")).ranking(SPLIT)
    assert len(ranking.errors) == N_LAYERS
    names = [f"conv{2 * index}" for index in (BAD - 1, BAD)]
    # The one gives the outlying tensor in 8 bits, the other takes it.
    assert sorted(ranking.first(2)) == sorted(names)
    others = [
        e for e, name in zip(ranking.errors, ranking.layers, strict=True) if name not in names
    ]
    assert min(ranking.errors[BAD - 1], ranking.errors[BAD]) > 20 * max(others)
    assert ranking.costs[0] == 8 * 8 * 8 * 3 * 9


def test_sensitivity_is_the_error_of_the_network_with_one_layer_in_8_bits() -> None:
    graph = outlying_network()
    settings = Settings(X86, "minmax", corrects_biases=False)
    prepared = prepare(graph, SPLIT, settings)
    ranking = prepared.ranking(SPLIT)
    x = SPLIT.inputs["x"]
    wanted = run(graph, x)
    for index in (0, BAD):
        others = [name for name in ranking.layers if name != ranking.layers[index]]
        given = run(prepared.quantized(others), x)
        error = float(((given - wanted) ** 2).mean() / wanted.var())
        assert ranking.errors[index] == pytest.approx(error, rel=0.1)


def test_mixed_precision_recovers_when_few_layers_do_the_harm() -> None:
    graph = outlying_network()
    full, _ = quantize_static(graph, SPLIT, Settings(X86, "minmax"))
    mixed, n_kept = quantize_static(graph, SPLIT, Settings(X86, "minmax", kept_share=0.4))
    assert n_kept == 2
    assert relative_error(graph, full) > 0.01
    assert relative_error(graph, mixed) < 0.1 * relative_error(graph, full)


def test_mixed_precision_meets_a_bound_when_it_is_bisected() -> None:
    graph = outlying_network()
    prepared = prepare(graph, SPLIT, Settings(X86, "minmax"))
    ranking = prepared.ranking(SPLIT)
    bound = 0.1 * relative_error(graph, prepared.quantized())

    def is_enough(n: int) -> bool:
        return relative_error(graph, prepared.quantized(ranking.first(n))) <= bound

    assert fewest(N_LAYERS, is_enough, 4) == 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_layers_are_kept_within_the_share_of_the_work(share: float) -> None:
    rng = np.random.default_rng(4)
    errors, of_costs = rng.uniform(size=50).tolist(), rng.uniform(1, 100, 50).tolist()
    kept = kept_within(errors, of_costs, share)
    assert sum(of_costs[index] for index in kept) <= share * sum(of_costs) * 1.001
    assert list(kept) == sorted(kept)
    assert len(kept) == 50 if share == 1 else len(kept) < 50


def test_layers_are_ranked_by_what_an_operation_in_fp32_saves() -> None:
    assert ranked([1.0, 4.0, 3.0], [1.0, 8.0, 2.0]) == (2, 0, 1)
    assert ranked([0.0, 0.0], [5.0, 5.0]) == (0, 1)


@pytest.mark.parametrize("n", [1, 7, 56, 300])
def test_bisecting_finds_the_least_when_more_is_always_better(n: int) -> None:
    for least in {0, 1, n // 3, n - 1, n}:
        asked: list[int] = []

        def is_enough(n_kept: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(n_kept)
            return n_kept >= least

        assert fewest(n, is_enough, 20) == least
        assert len(asked) == len(set(asked)) <= 2 * math.ceil(math.log2(n + 1)) + 2


@pytest.mark.parametrize("max_evaluations", [1, 2, 3, 5])
def test_bisecting_keeps_within_its_evaluations_and_gives_what_was_enough(
    max_evaluations: int,
) -> None:
    asked: dict[int, bool] = {}

    def is_enough(n_kept: int) -> bool:
        asked[n_kept] = n_kept >= 23
        return asked[n_kept]

    found = fewest(56, is_enough, max_evaluations)
    assert len(asked) <= max_evaluations
    assert found == 56 or asked[found]


def test_bisecting_is_refused_without_an_evaluation() -> None:
    with pytest.raises(ValueError, match="max_evaluations: got 0"):
        fewest(3, lambda _n: True, 0)
