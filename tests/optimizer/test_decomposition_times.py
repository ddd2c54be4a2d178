"""Decomposition by the target's times: the table, sums of links, and what is replaced by them."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from optimizer.blocks import Block, named_blocks
from optimizer.decomposition.chain_times import ChainTimes, layers_of_table, link_blocks
from optimizer.decomposition.forms import (
    CONVOLUTIONS,
    Geometry,
    Layer,
    Link,
    chain,
    convolution_geometry,
    linear_geometry,
    links_of,
)
from optimizer.latency_table import LatencyTable, latency_table, table_blocks
from optimizer.recipe import Traits
from optimizer.space import Categorical, Parameters, defaults
from optimizer.techniques import Context, Timed, load_technique
from optimizer.techniques.decomposition import Decomposition
from optimizer.torch_variant import read_plan, torch_model
from optimizer.variant import Json, Kind, Stage, TorchVariant
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

CONVOLUTION = Block("conv", (32, 8, 8), 32, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
STRIDED = replace(CONVOLUTION, n_outputs=48, stride=(2, 2))
FLAT = replace(CONVOLUTION, kernel=(1, 3), padding=(0, 1, 0, 1), bias=False)
LINEAR = Block("linear", (5, 64), 48)


def n_inputs(block: Block) -> int:
    return block.input_shape[0 if block.kind == "conv" else -1]


def scattered(block: Block) -> float:
    """Seconds that are no sum or product of anything, but the same with a bias and without."""
    return 1e-3 + int(replace(block, bias=True).key[:8], 16) * 1e-12


def by_kernel(block: Block) -> float:
    """Seconds of a machine that computes as much a second whatever the layer."""
    macs = n_inputs(block) // block.groups * block.n_outputs
    return 1e-9 * macs * max(1, torch.Size(block.kernel).numel())


def sides(layer: Block) -> Geometry:
    height, width = layer.kernel or (1, 1)
    return Geometry(n_inputs(layer), layer.n_outputs, (height, width), (1, 1), (1, 1))


def forms_of(layer: Block) -> tuple[str, ...]:
    return CONVOLUTIONS if layer.kind == "conv" else ("svd",)


def table_of(*layers: Block, seconds: Callable[[Block], float] = scattered) -> LatencyTable:
    table = latency_table(layers_of_table({one: forms_of(one) for one in layers}), seconds)
    assert table is not None
    return table


# --- blocks of chains

PADDED = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))


@pytest.mark.parametrize(
    ("layer", "form", "ranks"),
    [
        pytest.param(PADDED, "tucker", [5, 6], id="Tucker"),
        pytest.param(PADDED, "tensor_train", [4, 9, 7], id="tensor train"),
        pytest.param(PADDED, "cp", [6], id="CP"),
        pytest.param(
            nn.Conv2d(6, 8, 3, padding="same", dilation=2), "tensor_train", [3, 4, 5], id="same"
        ),
        pytest.param(nn.Conv2d(6, 8, 1, stride=2, bias=False), "svd", [3], id="1x1, stride"),
        pytest.param(nn.Linear(6, 8), "svd", [3], id="linear"),
    ],
)
def test_blocks_of_a_chain_are_those_that_a_run_of_it_meets(
    layer: Layer, form: str, ranks: list[int]
) -> None:
    is_linear = isinstance(layer, nn.Linear)
    example = torch.zeros(2, 3, 6) if is_linear else torch.zeros(2, layer.weight.shape[1], 9, 10)
    if isinstance(layer, nn.Linear):
        geometry = linear_geometry(layer, 3)
    else:
        geometry = convolution_geometry(layer, (9, 10), (1, 1))
    (own,) = named_blocks(nn.Sequential(layer), [example]).values()
    met = named_blocks(chain(layer, "layer", form, ranks), [example])
    assert link_blocks(own, links_of("layer", geometry, form, ranks)) == list(met.values())


# --- the table

RANKS = {
    "tucker": [[8, 8], [16, 32], [32, 16]],
    "tensor_train": [[8, 16, 8], [16, 48, 32], [32, 96, 32]],
    "cp": [[8], [24], [32]],
    "svd": [[8], [40], [48]],
}


@pytest.mark.parametrize("layer", [CONVOLUTION, LINEAR], ids=["convolution", "linear"])
def test_seconds_of_a_chain_are_the_sum_of_its_links_when_each_was_timed(layer: Block) -> None:
    """Against a sum by hand, one link at a time; the layer is said to be faster or slower by the
    least that tells them apart."""
    layers = layers_of_table({layer: forms_of(layer)})
    timed = {replace(one, bias=True) for one in table_blocks(layers)}
    n_checked = 0
    for form in forms_of(layer):
        for ranks in RANKS[form]:
            links = links_of("layer", sides(layer), form, ranks)
            blocks = [replace(one, bias=True) for one in link_blocks(layer, links)]
            if not timed.issuperset(blocks) or layer in blocks:
                continue
            total = sum(scattered(one) for one in blocks)
            for own, is_faster in ((total * 1.0001, True), (total * 0.9999, False)):
                times = ChainTimes(
                    table_of(layer, seconds=given(layer, own, scattered)), {"layer": layer}
                )
                assert times.is_faster("layer", links) is is_faster, (form, ranks)
            n_checked += 1
    assert n_checked >= 2 * len(forms_of(layer)) - 1


def given(layer: Block, seconds: float, others: Callable[[Block], float]) -> Callable[..., float]:
    """Those of the layer, and what the others take."""
    return lambda block: seconds if block == layer else others(block)


@pytest.mark.parametrize("layer", [CONVOLUTION, STRIDED, FLAT, LINEAR], ids=lambda one: one.kind)
def test_table_has_every_chain_that_rules_can_make(layer: Block) -> None:
    table = table_of(layer)
    geometry = sides(layer)
    widths = [*range(1, max(layer.n_outputs, n_inputs(layer)) + 1, 13), layer.n_outputs]
    for form in forms_of(layer):
        n_ranks = len(RANKS[form][0])
        for ranks in itertools.product(widths, repeat=n_ranks):
            try:
                links = links_of("layer", geometry, form, ranks)
            except ValueError:
                continue
            for block in link_blocks(layer, links):
                assert table.row(block) is not None, (form, ranks, block)


def test_table_has_a_pruned_layer_and_its_chains() -> None:
    narrow = replace(STRIDED, input_shape=(24, 8, 8), n_outputs=40)
    table = table_of(STRIDED)
    for form in CONVOLUTIONS:
        links = links_of("layer", sides(narrow), form, [8] * len(RANKS[form][0]))
        assert all(table.row(block) for block in [narrow, *link_blocks(narrow, links)])


def test_table_needs_nothing_beside_the_layers_when_they_are_matrices() -> None:
    pointwise = Block("conv", (64, 8, 8), 32, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    layers = {LINEAR: ("svd", "weighted_svd"), pointwise: ("svd", "weighted_svd")}
    assert layers_of_table(layers) == [LINEAR, pointwise]


def test_table_shares_links_between_forms_when_only_ranks_differ() -> None:
    layers = layers_of_table({CONVOLUTION: CONVOLUTIONS})
    assert [(one.kernel, n_inputs(one), one.n_outputs, one.groups) for one in layers] == [
        ((3, 3), 32, 32, 1),  # and Tucker's core
        ((1, 1), 32, 32, 1),  # both ends of all three
        ((3, 1), 32, 96, 1),
        ((1, 3), 96, 32, 1),
        ((3, 1), 32, 32, 32),
        ((1, 3), 32, 32, 32),
    ]
    assert len(table_blocks(layers)) <= 6 * 12


def test_layer_stays_when_the_table_lacks_it_or_its_chain() -> None:
    table = latency_table([CONVOLUTION], by_kernel)
    assert table is not None
    links = [Link(32, 8), Link(8, 32)]
    assert not ChainTimes(table, {}).is_faster("layer", links)
    assert not ChainTimes(table, {"layer": CONVOLUTION}).is_faster("layer", links)
    assert not ChainTimes(table, {"layer": LINEAR}).is_faster("layer", links)


# --- the technique

TWO = (
    "nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), "
    "nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), "
    "nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    return make_torch_bench(tmp_path_factory.mktemp("two"), TWO)


def slow_at_eight(block: Block) -> float:
    """A machine on which chains on the smaller images are slower than their layer."""
    is_chain = block.kind == "conv" and 1 in block.kernel
    return by_kernel(block) * (100 if is_chain and block.input_shape[1:] == (4, 4) else 1)


def timed(bench: TorchBench, seconds: Callable[[Block], float | None] = by_kernel) -> Context:
    return replace(bench.context, block_seconds=seconds)


def parameters_of(bench: TorchBench, context: Context, **given: str) -> Parameters:
    space = Decomposition().space(bench.torch, context)
    return defaults(space, **{"rank_by": "share", **given})


def replaced(made: TorchVariant) -> list[str]:
    return list(read_plan(made).steps[-1].operations)


def emptied(directory: Path) -> Path:
    directory.mkdir()
    return directory


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_layer_is_left_when_its_chain_is_slower_on_the_target(
    form: str, bench: TorchBench, tmp_path: Path
) -> None:
    technique = Decomposition()
    made = []
    for seconds in (by_kernel, slow_at_eight):
        context = timed(bench, seconds)
        parameters = parameters_of(bench, context, form=form)
        assert parameters["replaced"] == "faster"
        assert technique.describe(parameters).endswith(", where faster")
        directory = emptied(tmp_path / seconds.__name__)
        made.append(technique.apply(bench.torch, parameters, context, directory))
    assert [replaced(one) for one in made] == [["2", "4"], ["2"]]
    assert made[1].notes == ("1 of 4 layers decomposed",)


def test_layers_are_replaced_by_count_when_the_target_was_not_timed(
    bench: TorchBench, tmp_path: Path
) -> None:
    technique = Decomposition()
    known = set(technique.timed_blocks(bench.torch, bench.context)[1:])
    partly = timed(bench, lambda block: 1.0 if block in known else None)
    for context in (bench.context, partly):
        space = technique.space(bench.torch, context)
        assert space["replaced"] == Categorical(("cheaper",))
        assert "latencies" not in space
    parameters = parameters_of(bench, bench.context)
    assert "faster" not in technique.describe(parameters)
    made = technique.apply(bench.torch, parameters, partly, tmp_path)
    assert replaced(made) == ["2", "4"]


def test_ids_cover_the_table_and_another_one_is_refused(bench: TorchBench, tmp_path: Path) -> None:
    technique = Decomposition()
    one, other = timed(bench), timed(bench, slow_at_eight)
    parameters = parameters_of(bench, one)
    assert parameters["latencies"] != parameters_of(bench, other)["latencies"]
    assert parameters == parameters_of(bench, timed(bench))
    for context in (other, bench.context):
        with pytest.raises(
            ValueError, match=r"latencies: got [0-9a-f]{16}, and the target's table"
        ):
            technique.apply(bench.torch, parameters, context, tmp_path)


def test_timed_blocks_are_all_that_the_table_asks_for(bench: TorchBench) -> None:
    technique = Decomposition()
    assert isinstance(technique, Timed)
    wanted = technique.timed_blocks(bench.torch, bench.context)
    assert len(set(wanted)) == len(wanted)
    asked: list[Block] = []

    def seconds(block: Block) -> float:
        asked.append(block)
        return by_kernel(block)

    assert "latencies" in technique.space(bench.torch, timed(bench, seconds))
    assert set(asked) == set(wanted)
    # Of layers with one input channel or four outputs no chain is worth timing.
    assert {n_inputs(one) for one in wanted if one.kind == "linear"} == set()
    assert 1 not in {n_inputs(one) for one in wanted}


def test_decomposition_is_refused_when_no_chain_is_faster(
    bench: TorchBench, tmp_path: Path
) -> None:
    technique = Decomposition()

    def dear_chains(block: Block) -> float:
        return by_kernel(block) if block.kernel == (3, 3) else 1.0

    context = timed(bench, dear_chains)
    refused = technique.check(bench.torch, context)
    assert refused == "no layer gets faster, not even at a rank of 8"
    assert technique.check(bench.torch, timed(bench)) is None
    with pytest.raises(ValueError, match="no layer gets faster by these ranks, want lower ones"):
        technique.apply(bench.torch, parameters_of(bench, context), context, tmp_path)


def test_table_is_that_of_the_base_when_a_step_lies_between(
    bench: TorchBench, tmp_path: Path
) -> None:
    pruning, technique = load_technique("pruning"), Decomposition()
    wanted = set(technique.timed_blocks(bench.torch, bench.context))
    context = timed(bench, lambda block: by_kernel(block) if block in wanted else None)
    cut = defaults(pruning.space(bench.torch, context), what="channels", ratio=0.3)
    pruned = pruning.apply(bench.torch, cut, context, emptied(tmp_path / "pruned"))
    assert isinstance(pruned, TorchVariant)
    space = technique.space(pruned, context)
    assert space["latencies"] == technique.space(bench.torch, context)["latencies"]
    parameters = defaults(space, rank_by="share")
    made = technique.apply(pruned, parameters, context, emptied(tmp_path / "chain"))
    assert set(replaced(made)) <= {"2", "4"}
    assert replaced(made)


class Swap:
    """Puts another network in the place of the given one."""

    traits = Traits("swap", "1", Stage.ARCHITECTURE, Kind.TORCH, Kind.TORCH, preserves=False)

    def restructure(self, module: nn.Module, operations: Json) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(operations)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 4)).eval()


def test_layers_are_replaced_by_count_when_the_network_is_another(
    bench: TorchBench, tmp_path: Path
) -> None:
    """Of its layers nothing was timed."""
    swap, directory = Swap(), emptied(tmp_path / "swapped")
    module = swap.restructure(nn.Identity(), 1)
    swapped = torch_model(directory, bench.torch, module, swap, 1)
    technique, context = Decomposition(), timed(bench)
    assert "latencies" in technique.space(bench.torch, context)
    parameters = defaults(technique.space(swapped, context), rank_by="share", share=0.25)
    assert parameters["replaced"] == "cheaper"
    made = technique.apply(swapped, parameters, context, emptied(tmp_path / "chain"))
    assert replaced(made) == ["1"]
