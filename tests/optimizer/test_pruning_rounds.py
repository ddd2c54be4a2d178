"""Pruning in rounds: how much goes in each, what is trained between them, and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.blocks import named_blocks
from optimizer.builder import Builder
from optimizer.data.splits import Samples as Read
from optimizer.latency_table import latency_table
from optimizer.pruning.graph import trace
from optimizer.pruning.groups import Network, network_of
from optimizer.pruning.narrowing import Narrowing
from optimizer.pruning.rounds import Pruned, Schedule, in_rounds, replay
from optimizer.recipe import Recipe
from optimizer.space import Categorical, Value, defaults
from optimizer.spec import TrainingSpec
from optimizer.store import Store
from optimizer.techniques import Context
from optimizer.techniques.pruning import Pruning
from optimizer.torch_variant import load_torch, read_plan
from optimizer.variant import Json, TorchModel, TorchVariant
from tests.optimizer.networks import TOPOLOGIES, case, inputs_of
from tests.optimizer.test_pruning import context_of, model_of, samples, seconds
from tests.optimizer.test_recovery_technique import Dying, Killed
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

# --- the schedule


@dataclass
class Trainings:
    """Records what it is given to train; changes nothing unless told how."""

    kill: Mapping[int, str] = field(default_factory=dict)
    """Round → the layer whose last filter its training sets to zero."""
    rounds: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    """Of those layers, in those rounds."""

    def __call__(self, module: nn.Module, index: int, operations: Sequence[Json]) -> None:
        assert not module.training
        self.rounds.append(index)
        if index in self.kill:
            weight = module.get_submodule(self.kill[index]).weight
            assert isinstance(weight, nn.Parameter)
            self.widths.append(len(weight))
            with torch.no_grad():
                weight[-1] = 0


def narrowing(name: str, **given: object) -> Narrowing:
    data, inputs = samples(name), TOPOLOGIES[name].inputs
    plain = {
        "criterion": "l2", "allocation": "uniform", "multiple": 1, "residual": True,
        "samples": data, "inputs": inputs,
        "layers": lambda module: named_blocks(module, data.inputs),
    }  # fmt: skip
    return Narrowing(**{**plain, **given})  # type: ignore[arg-type]


def pruned(name: str, by: Narrowing, ratio: float, n: int, train: Trainings) -> Pruned:
    def find(module: nn.Module) -> Network:
        return network_of(trace(module, TOPOLOGIES[name].inputs))

    one = case(name)
    return in_rounds(one.module, one.network, by, Schedule(ratio, n), find, train)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shares_fall_by_equal_factors_to_what_the_ratio_leaves(n: int) -> None:
    kept = [1.0, *Schedule(0.6, n).kept()]
    factors = [now / before for before, now in pairwise(kept)]
    assert len(factors) == n
    assert kept[-1] == pytest.approx(0.4)
    assert max(factors) == pytest.approx(min(factors))


@pytest.mark.parametrize(
    "allocation",
    [
        "cost",
        *(
            pytest.param(one, marks=pytest.mark.full)
            for one in ("uniform", "sensitivity", "latency")
        ),
    ],
)
def test_rounds_come_to_the_ratio_with_a_training_between_each_and_the_next(
    allocation: str,
) -> None:
    layers = named_blocks(case("resnet").module(), samples("resnet").inputs)
    table = latency_table(layers.values(), seconds)
    by, train = narrowing("resnet", allocation=allocation, table=table), Trainings()
    made = pruned("resnet", by, 0.5, 3, train)
    assert train.rounds == [0, 1]
    assert len(made.operations) == 3
    for left, wanted in zip(made.left, Schedule(0.5, 3).kept(), strict=True):
        assert wanted - 0.12 < left <= wanted
    again = replay(case("resnet").module(), made.operations)
    again.load_state_dict(made.module.state_dict())
    inputs = inputs_of(TOPOLOGIES["resnet"].inputs, 3)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(*inputs), made.module(*inputs), rtol=0, atol=0)


def test_one_round_is_what_pruning_at_once_gives() -> None:
    by, train, one = narrowing("resnet"), Trainings(), case("resnet")
    made = pruned("resnet", by, 0.5, 1, train)
    module, operations = by.narrowed(one.module, one.network, 0.5)
    assert train.rounds == []
    assert made.operations == (operations,)
    state = made.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_next_round_takes_what_the_training_made_unimportant() -> None:
    by, train = narrowing("resnet", residual=False), Trainings({0: "2.0.first.0"})
    made = pruned("resnet", by, 0.5, 2, train)
    first, second = (
        {(name, axis): stay for name, axis, stay in one["kept"]} for one in made.operations
    )
    width = train.widths[0]
    assert width == len(first["2.0.first.0.weight", 0])
    assert width - 1 not in second["2.0.first.0.weight", 0]
    untouched = pruned("resnet", by, 0.5, 2, Trainings())
    kept = {(name, axis): stay for name, axis, stay in untouched.operations[1]["kept"]}
    assert kept["2.0.first.0.weight", 0] != second["2.0.first.0.weight", 0]


def test_round_takes_nothing_and_trains_nothing_when_multiples_took_its_share_before() -> None:
    by, train = narrowing("resnet", multiple=8, residual=False), Trainings()
    made = pruned("resnet", by, 0.25, 4, train)
    taken = [now < before for before, now in pairwise((1.0, *made.left))]
    assert not all(taken)
    assert train.rounds == [index for index, took in enumerate(taken[:-1]) if took]
    assert len(made.operations) == sum(taken)
    assert made.left[-1] <= 0.75


def test_rounds_go_on_from_a_trace_when_the_modules_own_forward_cannot_be_narrowed() -> None:
    made = pruned("resnet_option_a", narrowing("resnet_option_a"), 0.5, 2, Trainings())
    assert [one["form"] for one in made.operations] == ["trace", "trace"]
    assert made.left[-1] <= 0.5


def test_ratio_that_would_empty_a_layer_is_refused_before_all_training() -> None:
    train = Trainings()
    with pytest.raises(ValueError, match=r"ratio: got 0\.7, want at most 0.*would empty a layer"):
        pruned("resnet", narrowing("resnet", multiple=8), 0.7, 4, train)
    assert train.rounds == []


# --- the technique


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    return make_torch_bench(tmp_path_factory.mktemp("study"))


def at(context: Context, **training: object) -> Context:
    quick = {"batch_size": 16, "pruning_rounds": 3, "pruning_round_epochs": 2.0}
    return replace(context, training=TrainingSpec(**{**quick, **training}))  # type: ignore[arg-type]


def parameters_of(model: TorchModel, context: Context, **given: Value) -> dict[str, Value]:
    space = Pruning().space(model, context)
    return defaults(space, **{"multiple": 1, "allocation": "uniform", "ratio": 0.6, **given})


def built(model: TorchModel, context: Context, directory: Path, **given: Value) -> TorchVariant:
    directory.mkdir()
    technique = Pruning()
    assert technique.check(model, context) is None
    parameters = parameters_of(model, context, **given)
    return technique.apply(model, parameters, context, directory)


def test_pruning_in_rounds_is_pure_and_trains_between(bench: TorchBench, tmp_path: Path) -> None:
    context = at(bench.context, augmentation="flip")
    one, other = (built(bench.torch, context, tmp_path / name) for name in ("one", "other"))
    assert one.digest == other.digest
    (step,) = read_plan(one).steps
    assert sorted(step.operations) == ["rounds"]
    assert len(step.operations["rounds"]) == 3
    assert one.notes[-1].endswith("of the multiply-adds left after the rounds")
    only_pruned = replay(load_torch(bench.torch), step.operations["rounds"]).state_dict()
    trained = load_torch(one).state_dict()
    assert trained["0.weight"].shape[0] < 16
    assert {name: len(value) for name, value in trained.items() if value.ndim} == {
        name: len(value) for name, value in only_pruned.items() if value.ndim
    }
    assert not torch.allclose(trained["7.weight"], only_pruned["7.weight"])
    at_once = built(bench.torch, at(bench.context, pruning_rounds=1), tmp_path / "at once")
    assert list(read_plan(at_once).steps[0].operations) == ["widths"]


def test_pruning_goes_on_in_the_round_where_it_was_killed_and_leaves_nothing(
    bench: TorchBench, tmp_path: Path
) -> None:
    context, kept = at(bench.context), tmp_path / "kept"
    counted = Dying(bench, n_reads=1000)
    whole = built(bench.torch, replace(context, train=counted), tmp_path / "whole")
    n_whole = counted.n_reads
    # A round reads for statistics, for two epochs of four steps, and for statistics again; here
    # it is killed in the second epoch of the second round.
    dying = Dying(bench, n_reads=n_whole // 2 + 7)
    with pytest.raises(Killed):
        built(bench.torch, replace(context, train=dying, checkpoints=kept), tmp_path / "killed")
    assert len(list(kept.iterdir())) == 2
    counted = Dying(bench, n_reads=1000)
    again = replace(context, train=counted, checkpoints=kept)
    assert built(bench.torch, again, tmp_path / "again").digest == whole.digest
    assert counted.n_reads <= n_whole - 8 - 4  # three of four epochs had been kept
    assert not list(kept.iterdir())


@dataclass
class Seen:
    """A split that records the rows of its larger reads."""

    split: object
    rows: list[tuple[int, ...]] = field(default_factory=list)
    name: str = "train"

    def __post_init__(self) -> None:
        self.digest, self.labels = self.split.digest, self.split.labels  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def read(self, indices: np.ndarray) -> Read:
        self.rows.append(tuple(np.asarray(indices).tolist()))
        return self.split.read(indices)  # type: ignore[attr-defined,no-any-return]


def test_rounds_see_other_samples_when_each_is_a_part_of_an_epoch(
    bench: TorchBench, tmp_path: Path
) -> None:
    seen = Seen(bench.context.train)
    context = replace(at(bench.context, pruning_round_epochs=0.1), train=seen)
    built(bench.torch, context, tmp_path / "made")
    read = [rows for rows in seen.rows if len(rows) == 16]
    n_each = len(read) // 2  # of two trainings
    assert n_each >= 1
    assert not {frozenset(rows) for rows in read[:n_each]} & {
        frozenset(rows) for rows in read[n_each:]
    }


def test_parameters_have_the_rounds_and_all_of_their_training(bench: TorchBench) -> None:
    context = at(bench.context, patience=3, alphas=(0.25, 1.0), learning_rate=0.05)
    technique = Pruning()
    parameters = parameters_of(bench.torch, context)
    own = set(parameters_of(bench.torch, at(bench.context, pruning_rounds=1)))
    assert {name: value for name, value in parameters.items() if name not in own} == {
        "rounds": 3, "epochs": 2.0, "round_loss": "answers", "round_alpha": 0.25,
        "round_temperature": 4.0, "round_batch_size": 16, "round_weight_decay": 5e-4,
        "round_schedule": "one_cycle", "round_augmentation": "none", "round_precision": "fp32",
        "round_embeddings": "kept", "round_patience": 0, "round_optimizer": "sgd",
        "round_learning_rate": 0.05, "round_learns": "classes", "round_output": "logits",
    }  # fmt: skip
    assert technique.epochs(parameters, context) == 4.0
    assert technique.describe(parameters) == "60% pruned by l2 in 3 rounds"
    space = technique.space(bench.torch, context)
    searched = [n for n, one in space.items() if isinstance(one, Categorical) and one.choices[1:]]
    assert not {one for one in searched if one.startswith("round") or one == "epochs"}


def test_parameters_are_as_ever_when_all_goes_at_once(bench: TorchBench) -> None:
    plain = Pruning().space(bench.torch, bench.context)
    assert "rounds" not in plain
    assert "epochs" not in plain
    parameters = defaults(plain)
    assert Pruning().epochs(parameters, bench.context) == 0
    choice = Recipe(bench.torch.kind).then(Pruning.traits, parameters).choices[0]
    assert not choice.trains


@pytest.mark.parametrize(
    ("what", "wanted"),
    [("blocks", ["bypassed"]), ("both", ["bypassed", "rounds"])],
)
def test_blocks_go_at_once_and_channels_in_rounds_after_them(
    what: str, wanted: list[str], tmp_path: Path
) -> None:
    model, context = model_of("resnet"), context_of("resnet")
    context = at(
        replace(context, train=context.calibration), batch_size=2, pruning_rounds=2,
        pruning_round_epochs=1.0,
    )  # fmt: skip
    made = built(model, context, tmp_path / "made", what=what, ratio=0.4, residual=False)
    (step,) = read_plan(made).steps
    assert sorted(step.operations) == wanted


def test_pruning_in_rounds_is_refused_when_nothing_can_be_trained(bench: TorchBench) -> None:
    context = at(replace(bench.context, train=None))
    reason = "training.pruning_rounds is 3, and there is no training data"
    assert Pruning().check(bench.torch, context) == reason
    once = at(replace(bench.context, train=None), pruning_rounds=1)
    assert Pruning().check(bench.torch, once) is None


def test_builder_counts_the_rounds_once_and_does_not_train_for_an_outline(
    bench: TorchBench, tmp_path: Path
) -> None:
    context, technique = at(bench.context), Pruning()
    recipe = Recipe(bench.torch.kind).then(
        technique.traits, parameters_of(bench.torch, context, criterion="l1")
    )
    with Store(tmp_path / "store.sqlite") as store:
        builder = Builder(store, bench.torch, {"pruning": technique}, context, bench.inputs)
        (variant_id,) = builder.ids(recipe)
        assert builder.epochs_first(recipe) == {variant_id: 4.0}
        assert builder.blocks(recipe) is None
        variant = builder.build(recipe)
        assert variant.id == variant_id
        blocks = builder.blocks(recipe)
        assert blocks is not None
        assert {block.n_outputs for block in blocks if block.kind == "conv"} < set(range(16))


@pytest.mark.parametrize("part", ["train", "calibration", "epochs"])
def test_ids_cover_what_decides_the_rounds(part: str, bench: TorchBench, tmp_path: Path) -> None:
    def id_in(context: Context) -> str:
        recipe = Recipe(bench.torch.kind).then(Pruning.traits, parameters_of(bench.torch, context))
        builder = Builder(store, bench.torch, {"pruning": Pruning()}, context, bench.inputs)
        return builder.variant_id(recipe)

    context = at(bench.context)
    if part == "epochs":
        other = at(bench.context, pruning_round_epochs=1.0)
    else:
        split = Seen(getattr(context, part))
        split.digest = "another"
        other = replace(context, **{part: split})
    with Store(tmp_path / "store.sqlite") as store:
        assert id_in(context) == id_in(at(bench.context))
        assert id_in(context) != id_in(other)
