"""Estimates: learned from made-up networks whose seconds are known."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizer.block_times import StoredTimes
from optimizer.blocks import Block, write_block
from optimizer.estimates import Estimates
from optimizer.measuring import Batch, ContenderFailed
from optimizer.recipe import Recipe, Traits
from optimizer.result import InstanceTimes, Variant
from optimizer.search.block_table import MIN_PAIRS
from optimizer.spec import Objective, Spec, read_spec
from optimizer.store import Store, StoredVariant
from optimizer.timing import Contender, Effort, Timing
from optimizer.variant import Kind, Stage
from serve.artifact import ServiceTime, Step
from serve.engines import KernelTime
from serve.machine import Machine
from tests.optimizer.stored import MACHINE
from tests.optimizer.tiny_study import write_study

PRUNE = Traits("pruning", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH, preserves=False)
EXPORT = Traits("export", "1", Stage.EXPORT, Kind.TORCH, Kind.ONNX, optional=False)
COMPILE = Traits("compilation", "1", Stage.COMPILE, Kind.ONNX, Kind.ENGINE, optional=False)
PER_OUTPUT_S, FIXED_S, FACTOR = 1e-5, 5e-4, 0.7
"""A block takes that for each of its outputs and rows; a network takes `FIXED_S` and `FACTOR` times
its blocks."""
SIZES = (1, 8, 32)


def block_s(n_outputs: int, size: int) -> float:
    return n_outputs * size * PER_OUTPUT_S


def network_s(width: int, size: int) -> float:
    return FIXED_S + FACTOR * (2 * block_s(width, size) + block_s(4, size))


def blocks_of(recipe: Recipe) -> Mapping[Block, int] | None:
    """Of a network of two layers as wide as its recipe says, and a last one."""
    width = recipe.choices[0].parameters.get("width") if recipe.is_structural else 64
    if width == "unknown":
        return None
    return {Block("linear", (8,), int(width or 0)): 2, Block("linear", (8,), 4): 1}


@dataclass
class Clockwork:
    """Times made-up seconds, by the outputs of the block that it is given."""

    machine: Machine = MACHINE
    failure: Exception | None = None
    timed: list[int] = field(default_factory=list)

    def time(
        self,
        variant: Contender,
        baseline: Contender | None,
        inputs: Batch,
        batch_sizes: Sequence[int],
        *,
        effort: Effort,
        seed: int,
    ) -> Timing:
        assert len(inputs["x"]) >= max(batch_sizes)
        graph = onnx.load(variant.directory / variant.spec.file).graph
        (n_outputs,) = [one.dims[0] for one in graph.initializer if one.name == "b"]
        self.timed.append(n_outputs)
        if self.failure is not None:
            raise self.failure
        seconds = [(size, block_s(n_outputs, size)) for size in batch_sizes]
        times = tuple(ServiceTime(size, s, s, 9) for size, s in seconds)
        return Timing(InstanceTimes(variant.spec.instances, 1, times))

    def outputs(self, contender: Contender, batches: Iterable[Batch]) -> Iterator[Batch]:
        raise NotImplementedError

    def kernels(self, contender: Contender, batch: Batch, n_runs: int) -> Sequence[KernelTime]:
        raise NotImplementedError

    def memory_bytes(self, contender: Contender, batch: Batch) -> int:
        raise NotImplementedError

    def joules(self, contender: Contender, batch: Batch, seconds: float) -> float | None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return read_spec(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def estimates(
    spec: Spec, store: Store, measurer: Clockwork, base: str = "base", cores: int = 2
) -> Estimates:
    return Estimates(spec, store, measurer, base, cores, blocks_of)


def recipe(width: int | str, engine: str = "onnxruntime") -> Recipe:
    pruned = Recipe(Kind.TORCH).then(PRUNE, {"width": width})
    return pruned.then(EXPORT, {}).then(COMPILE, {"engine": engine})


def row(width: int, cores: int = 2) -> Variant:
    times = tuple(
        ServiceTime(size, network_s(width, size), network_s(width, size), 9) for size in SIZES
    )
    timed = (InstanceTimes(cores, 1, times),)
    return Variant(f"w{width}", "", "unverified", engine="onnxruntime", service_times=timed)


def taught(one: Estimates, widths: Sequence[int] = (16, 24, 32, 48), cores: int = 2) -> Estimates:
    for width in widths:
        one.learn(recipe(width), row(width, cores))
    return one


def test_blocks_are_timed_once_when_networks_and_studies_share_them(
    spec: Spec, store: Store
) -> None:
    first, again = Clockwork(), Clockwork()
    taught(estimates(spec, store, first))
    assert first.timed == [16, 4, 24, 32, 48]
    one = taught(estimates(spec, store, again))
    one.bound(recipe(40))
    assert again.timed == [40]


def test_correction_is_known_from_four_networks_of_different_sums_on(
    spec: Spec, store: Store
) -> None:
    one = taught(estimates(spec, store, Clockwork()), (16, 24, 32, 32, 32))
    assert one.bound(recipe(40)) is None
    taught(one, (48,))
    found = one.corrections('export → compilation {"engine":"onnxruntime"}')
    assert MIN_PAIRS == 4
    assert set(found) == set(SIZES)
    assert found[1].fixed_s == pytest.approx(FIXED_S)
    assert found[1].factor == pytest.approx(FACTOR)


def test_trust_is_told_of_families_with_networks_enough_to_leave_one_out(
    spec: Spec, store: Store
) -> None:
    few = taught(estimates(spec, store, Clockwork()))
    assert few.trusts() == {}
    more = taught(few, (40, 56))
    ((family, found),) = more.trusts().items()
    assert family == 'export → compilation {"engine":"onnxruntime"}'
    assert found.n_networks == 6
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.relative_error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("width", [8, 20, 40, 400])
def test_bound_is_below_what_the_network_takes_but_near(
    width: int, spec: Spec, store: Store
) -> None:
    bound = taught(estimates(spec, store, Clockwork(), cores=1)).bound(recipe(width))
    assert bound is not None
    assert 0.9 * network_s(width, 1) < bound.seconds < network_s(width, 1)


@pytest.mark.parametrize("objective", ["cost", "latency"])
def test_bound_tells_what_is_far_slower_by_the_objective(
    objective: Objective, spec: Spec, store: Store
) -> None:
    one = taught(estimates(replace(spec, objective=objective), store, Clockwork()))
    near, far = one.bound(recipe(40)), one.bound(recipe(800))
    assert near is not None
    assert far is not None
    assert 0 < near.value < far.value / 3


def test_bound_says_nothing_of_the_value_when_the_objective_has_no_seconds(
    spec: Spec, store: Store
) -> None:
    bound = taught(estimates(replace(spec, objective="size"), store, Clockwork())).bound(recipe(40))
    assert bound is not None
    assert bound.value == 0.0


def test_bound_is_unknown_when_the_family_is_another(spec: Spec, store: Store) -> None:
    one = taught(estimates(spec, store, Clockwork()))
    assert one.bound(recipe(40)) is not None
    assert one.bound(recipe(40, engine="openvino")) is None


def test_bound_is_unknown_when_the_network_cannot_be_seen_through(spec: Spec, store: Store) -> None:
    one = taught(estimates(spec, store, Clockwork()))
    assert one.bound(recipe("unknown")) is None


def test_bound_is_unknown_when_the_engine_cannot_run_a_block(spec: Spec, store: Store) -> None:
    measurer = Clockwork()
    one = taught(estimates(spec, store, measurer))
    measurer.failure = ContenderFailed("ended by SIGSEGV")
    assert [one.bound(recipe(40)) for _ in range(2)] == [None, None]
    assert measurer.timed.count(40) == 1


def test_recall_takes_pairs_of_the_same_base_and_cores_only(spec: Spec, store: Store) -> None:
    taught(estimates(spec, store, Clockwork()))
    known = {}
    for base, cores in (("base", 2), ("other", 2), ("base", 1)):
        one = estimates(spec, store, Clockwork(), base, cores)
        one.recall()
        known[base, cores] = one.bound(recipe(40)) is not None
    assert known == {("base", 2): True, ("other", 2): False, ("base", 1): False}


def test_pairs_are_kept_for_each_number_of_cores(spec: Spec, store: Store) -> None:
    for cores in (2, 1):
        taught(estimates(spec, store, Clockwork(), cores=cores), cores=cores)
    for cores in (2, 1):
        one = estimates(spec, store, Clockwork(), cores=cores)
        one.recall()
        assert one.bound(recipe(40)) is not None


def test_nothing_is_learned_when_a_variant_was_not_timed(spec: Spec, store: Store) -> None:
    measurer = Clockwork()
    estimates(spec, store, measurer).learn(recipe(16), Variant("w16", "", "dropped"))
    assert measurer.timed == []


def test_table_is_timed_once_and_found_again_by_techniques(spec: Spec, store: Store) -> None:
    clockwork = Clockwork()
    layers = [Block("linear", (8,), 16), Block("linear", (8,), 24)]
    assert estimates(spec, store, clockwork).measure(layers, lambda: True) == 2
    # Another study, which has no time for more.
    assert estimates(spec, store, clockwork).measure(layers, lambda: False) == 2
    assert clockwork.timed == [16, 24]
    found = StoredTimes(store, MACHINE, 2)
    assert [found(layer) for layer in layers] == [block_s(16, 8), block_s(24, 8)]
    assert found(Block("linear", (8,), 32)) is None
    assert StoredTimes(store, MACHINE, 1)(layers[0]) is None


def test_table_lacks_what_the_engine_cannot_run(spec: Spec, store: Store) -> None:
    layer = Block("linear", (8,), 16)
    clockwork = Clockwork(failure=ContenderFailed("no kernel"))
    assert estimates(spec, store, clockwork).measure([layer], lambda: True) == 0
    assert StoredTimes(store, MACHINE, 2)(layer) is None


def test_table_goes_on_where_it_was_left_when_time_is_up(spec: Spec, store: Store) -> None:
    clockwork = Clockwork()
    layers = [Block("linear", (8,), 8 * n) for n in (1, 2, 3)]
    has_time = iter((True, False, False))
    assert estimates(spec, store, clockwork).measure(layers, lambda: next(has_time)) == 1
    assert estimates(spec, store, clockwork).measure(layers, lambda: True) == 3
    assert clockwork.timed == [8, 16, 24]


def stored_network(store: Store, width: int) -> StoredVariant:
    """Of the shape that the clockwork reads."""
    block = Block("linear", (8,), width)
    with store.workshop() as directory:
        model = write_block(block, "onnxruntime", directory, MACHINE)
        step = Step("technique", "1", {}, 0)
        return store.add(StoredVariant(f"network {width}", "base", step, "", model, 0.0))


def test_whole_networks_are_timed_once_as_far_as_there_is_time(spec: Spec, store: Store) -> None:
    clockwork = Clockwork()
    wanted = [(f"key {width}", stored_network(store, width)) for width in (8, 16, 24)]
    inputs = {"x": np.zeros((32, 8), np.float32)}
    has_time = iter((True, False, False))
    one = estimates(spec, store, clockwork)
    assert one.measure_networks(wanted, inputs, lambda: next(has_time)) == 1
    assert one.measure_networks(wanted, inputs, lambda: True) == 3
    assert clockwork.timed == [8, 16, 24]
    found = StoredTimes(store, MACHINE, 2)
    assert [found.network(key) for key, _ in wanted] == [block_s(8 * n, 8) for n in (1, 2, 3)]
    assert found.network("key 32") is None
    assert StoredTimes(store, MACHINE, 1).network("key 8") is None


def test_network_that_the_engine_cannot_run_has_no_seconds(spec: Spec, store: Store) -> None:
    clockwork = Clockwork(failure=ContenderFailed("no kernel"))
    wanted = [("key", stored_network(store, 8))]
    inputs = {"x": np.zeros((32, 8), np.float32)}
    assert estimates(spec, store, clockwork).measure_networks(wanted, inputs, lambda: True) == 0
    assert StoredTimes(store, MACHINE, 2).network("key") is None
