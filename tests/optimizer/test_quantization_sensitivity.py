"""Which parts of a network are kept in fp32, and in how many evaluations."""

import math

import numpy as np
import pytest

from optimizer.quantization.graph import Graph
from optimizer.quantization.qdq import Arithmetic
from optimizer.quantization.sensitivity import Part, fewest, kept_within, ranked
from optimizer.quantization.static import Ranking, Settings, prepare, quantize_static
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


def streaming_network() -> Graph:
    """Three residual blocks on a stream, of which one channel is a thousand times the others'; only
    the first block makes it large, and nobody reads more of it than it was."""
    network = Network(("n", 3, 8, 8))
    stem = random(8, 3, 3, 3, seed=0, scale=0.25)
    stem[5] *= 1000
    network.conv(stem, pads=[1] * 4)
    for index in range(3):
        stream = network.last
        read = random(8, 8, 1, 1, seed=3 * index + 1, scale=0.3)
        read[:, 5] *= 0.001
        network.conv(read)
        network.add("Relu", network.last)
        network.conv(random(8, 8, 3, 3, seed=3 * index + 2, scale=0.2), pads=[1] * 4)
        network.conv(random(8, 8, 1, 1, seed=3 * index + 3, scale=0.3))
        network.add("Add", stream, network.last)
    head = random(4, 8, 1, 1, seed=50, scale=0.3)
    head[:, 5] *= 0.001
    network.conv(head)
    return network.graph()


def part_of(ranking: Ranking, *layers: str) -> int:
    """The part with exactly these layers."""
    wanted = {ranking.layers.index(one) for one in layers}
    (index,) = [i for i, part in enumerate(ranking.parts) if part.layers == wanted]
    return index


def test_sensitivity_finds_the_tensor_with_the_planted_outliers() -> None:
    graph = outlying_network()
    ranking = prepare(graph, SPLIT, Settings(X86, "minmax")).ranking(SPLIT)
    names = [f"conv{2 * index}" for index in (BAD - 1, BAD)]
    # The one gives the outlying tensor in 8 bits, the other takes it.
    assert sorted(ranking.first(1)) == sorted(names)
    bad = part_of(ranking, *names)
    others = [error for index, error in enumerate(ranking.errors) if index != bad]
    assert ranking.errors[bad] > 20 * max(others)
    assert ranking.costs[0] == 8 * 8 * 8 * 3 * 9


def test_a_stream_and_all_that_read_or_write_it_are_one_part() -> None:
    graph = streaming_network()
    ranking = prepare(graph, SPLIT, Settings(X86, "minmax")).ranking(SPLIT)
    convs = [name for name in ranking.layers if graph.node(name).op_type == "Conv"]
    inner = {convs[number] for number in (2, 5, 8)}
    stream = part_of(ranking, *(name for name in convs if name not in inner))
    assert ranking.errors[stream] == max(ranking.errors)
    every = [tensor for part in ranking.parts for tensor in part.tensors]
    assert len(every) == len(set(every))


def test_keeping_a_stream_recovers_what_keeping_its_readers_does_not() -> None:
    graph = streaming_network()
    prepared = prepare(graph, SPLIT, Settings(X86, "minmax"))
    ranking = prepared.ranking(SPLIT)
    whole = relative_error(graph, prepared.quantized())
    kept = ranking.first(1)
    assert relative_error(graph, prepared.quantized(kept)) < 0.05 * whole
    readers = kept[1::2]  # the stem first, then readers and writers by turns
    assert relative_error(graph, prepared.quantized(readers)) > 0.5 * whole


def test_sensitivity_is_the_error_of_the_network_with_one_part_in_8_bits() -> None:
    graph = outlying_network()
    settings = Settings(X86, "minmax", corrects_biases=False)
    prepared = prepare(graph, SPLIT, settings)
    ranking = prepared.ranking(SPLIT)
    x = SPLIT.inputs["x"]
    wanted = run(graph, x)
    # The graph's input is read by the first layer alone, and what that gives by the second: with
    # both in 8 bits three tensors are.
    both = [index for index, part in enumerate(ranking.parts) if part.layers <= {0, 1}]
    given = run(prepared.quantized(ranking.layers[2:]), x)
    error = float(((given - wanted) ** 2).mean() / wanted.var())
    third = next(i for i, part in enumerate(ranking.parts) if part.layers == {1, 2})
    assert error == pytest.approx(sum(ranking.errors[i] for i in both), rel=0.5)
    assert ranking.errors[third] < 0.1 * ranking.errors[part_of(
        ranking, f"conv{2 * (BAD - 1)}", f"conv{2 * BAD}")]  # fmt: skip


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

    assert fewest(len(ranking.parts), is_enough, 4) == 1


def chain(n: int) -> list[Part]:
    """As of `n` layers one behind the other."""
    return [
        Part(frozenset({str(index)}), frozenset({index - 1, index} - {-1})) for index in range(n)
    ]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_layers_are_kept_within_the_share_of_the_work(share: float) -> None:
    rng = np.random.default_rng(4)
    errors, of_costs = rng.uniform(size=50).tolist(), rng.uniform(1, 100, 50).tolist()
    kept = kept_within(chain(50), errors, of_costs, share)
    assert sum(of_costs[index] for index in kept) <= share * sum(of_costs) * 1.001
    assert list(kept) == sorted(kept)
    assert len(kept) == 50 if share == 1 else len(kept) < 50


def test_parts_are_ranked_by_what_an_operation_in_fp32_saves() -> None:
    alone = [Part(frozenset({str(one)}), frozenset({one})) for one in range(3)]
    assert ranked(alone, [1.0, 4.0, 3.0], [1.0, 8.0, 2.0]) == (2, 0, 1)
    assert ranked(alone[:2], [0.0, 0.0], [5.0, 5.0]) == (0, 1)


def test_layers_that_are_kept_already_cost_nothing_more() -> None:
    # The first takes layer 0; then the third has only layer 2 to pay for.
    parts = [Part(frozenset({str(i)}), frozenset(one)) for i, one in enumerate([{0}, {1}, {0, 2}])]
    assert ranked(parts, [9.0, 1.0, 1.5], [8.0, 2.0, 2.0]) == (0, 2, 1)


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
