"""The techniques that put another network in the model's place: supernet, and the search in it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from optimizer import estimates
from optimizer.architecture.exploration import Trail, everything, explore, ranking, regrets
from optimizer.architecture.halving import first_epochs, halved, survivors, total_epochs
from optimizer.architecture.judging import N_RECALIBRATED
from optimizer.architecture.options import ArchitectureSpec
from optimizer.architecture.plan import plan_of_json
from optimizer.architecture.proposers import RandomSearch
from optimizer.architecture.reward import Reward
from optimizer.architecture.search import Looked, Worth
from optimizer.architecture.setting import N_WHOLE, Setting
from optimizer.architecture.worth import Shared
from optimizer.architectures import architectures
from optimizer.blocks import PROTOCOL_VERSION, Block
from optimizer.builder import Builder
from optimizer.errors import SpecInvalid
from optimizer.kernels import precision_of
from optimizer.quantization.processor import kernel_layout
from optimizer.quantization.qdq import Arithmetic
from optimizer.recipe import Recipe
from optimizer.report import render_html
from optimizer.space import Value, defaults
from optimizer.spec import TrainingSpec, read_spec
from optimizer.store import Store
from optimizer.study import Options, optimize
from optimizer.techniques import Context, load_technique
from optimizer.techniques.architecture import ArchitectureSearch
from optimizer.techniques.supernet import SupernetTraining
from optimizer.torch_source import load_source
from optimizer.torch_variant import load_torch, read_plan
from optimizer.training.fake_quantization import fake_quantized
from optimizer.training.recalibration import recalibrate
from optimizer.variant import Stage, TorchModel, TorchVariant
from serve.engines import load_engine
from serve.machine import this_machine
from tests.optimizer.test_recovery_technique import Dying, Killed
from tests.optimizer.tiny_study import QUICK, FakeVerifier, write_study
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

SPACE: dict[str, Any] = {
    "kind": "vision",
    "stems": [4, 8],
    "stages": [
        {"depths": [1, 2], "widths": [4, 8], "kernels": [3, 5]},
        {"depths": [1], "widths": [8, 16], "blocks": ["depthwise", "mbconv"], "stride": 2},
    ],
}


INT8_SHARE = 0.02
"""Of an fp32 layer's time."""
BOTH = ["fp32", "int8"]


def spec(**given: Any) -> ArchitectureSpec:
    quick = {"space": SPACE, "epochs": 2.0, "evaluations": 6, "speedups": [1.0]}
    return ArchitectureSpec(**{**quick, **given})


def seconds(block: Block) -> float:
    """Of a made-up target: by multiply-accumulates, and a little for each layer."""
    pixels = np.prod(block.input_shape[1:]) / np.prod(block.stride or (1,))
    kernel = np.prod(block.kernel or (1,))
    macs = block.input_shape[0] // block.groups * block.n_outputs * kernel * pixels
    whole = 1e-9 * macs + 1e-6
    return float(whole if block.precision == "fp32" else INT8_SHARE * whole)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    return make_torch_bench(tmp_path_factory.mktemp("study"))


def context(bench: TorchBench, **training: Any) -> Context:
    quick = {"batch_size": 16, "alphas": (0.5,)}
    made = TrainingSpec(**{**quick, **training})
    return replace(bench.context, training=made, block_seconds=seconds)


def supernet(bench: TorchBench, at: Context, directory: Path, **given: Any) -> TorchVariant:
    directory.mkdir()
    technique = SupernetTraining(spec(**given))
    assert technique.check(bench.torch, at) is None
    parameters = defaults(technique.space(bench.torch, at))
    return technique.apply(bench.torch, parameters, at, directory)


def found(
    model: TorchModel,
    at: Context,
    directory: Path,
    given: Mapping[str, Any] | None = None,
    **parameters: Value,
) -> TorchVariant:
    directory.mkdir()
    technique = ArchitectureSearch(spec(**(given or {})))
    assert technique.check(model, at) is None
    chosen = defaults(technique.space(model, at), **parameters)
    return technique.apply(model, chosen, at, directory)


@pytest.fixture(scope="module")
def trained(bench: TorchBench, tmp_path_factory: pytest.TempPathFactory) -> TorchVariant:
    return supernet(bench, context(bench), tmp_path_factory.mktemp("supernet") / "made")


def test_what_is_found_has_the_supernets_weights_and_can_be_built_from_its_plan_alone(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    at = context(bench)
    made = found(trained, at, tmp_path / "made")
    network, whole = load_torch(made), load_torch(trained)
    for name, weight in network.named_parameters():
        assert torch.equal(weight, whole.part(name, weight.shape))  # type: ignore[operator]
    (step,) = [one for one in read_plan(made).steps if one.technique == "architecture"]
    plan = plan_of_json(step.operations["plan"])
    assert plan.image == (1, 8, 8)  # type: ignore[union-attr]
    assert network(torch.zeros(3, 1, 8, 8)).shape == (3, 4)


def test_same_inputs_give_the_same_network_and_another_seed_another_supernet(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    at = context(bench)
    again = supernet(bench, at, tmp_path / "again")
    assert again.digest == trained.digest
    other = supernet(bench, replace(at, seed=1), tmp_path / "other")
    assert other.digest != trained.digest
    first, second = (found(trained, at, tmp_path / name) for name in ("first", "second"))
    assert first.digest == second.digest


@pytest.mark.parametrize("controller", ["reinforce", "ppo", "predictor"])
def test_each_controller_runs_beside_its_controls_on_one_budget(
    bench: TorchBench, trained: TorchVariant, controller: str, tmp_path: Path
) -> None:
    given = {"controllers": [controller]}
    made = found(trained, context(bench), tmp_path / "made", given)
    record = json.loads((made.directory / "architecture.json").read_text())
    assert list(record["trails"]) == [controller, "evolution", "random"]
    assert {len(looked) for looked in record["trails"].values()} == {6}
    latencies = [one["latency_s"] for one in record["front"]]
    accuracies = [one["accuracy"] for one in record["front"]]
    assert latencies == sorted(latencies)
    assert accuracies == sorted(accuracies)
    own = [note for note in made.notes if note.startswith(("evolution", "random", controller))]
    assert len(own) == 3


def test_chosen_is_the_most_accurate_within_the_target(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    made = found(trained, context(bench), tmp_path / "made", {"speedups": [2.5]})
    record = json.loads((made.directory / "architecture.json").read_text())
    looked = [one for trail in record["trails"].values() for one in trail]
    within = [one for one in looked if one["latency_s"] <= record["target_s"]]
    assert within
    best = max(one["accuracy"] for one in within)
    (step,) = [one for one in read_plan(made).steps if one.technique == "architecture"]
    setting = Setting(spec(), bench.torch.source, context(bench))
    table = setting.table()
    assert table is not None
    chosen = [
        one
        for one in within
        if setting.space.plan(one["choices"]) == plan_of_json(step.operations["plan"])
    ]
    assert chosen[0]["accuracy"] == best
    assert table.seconds(tuple(chosen[0]["choices"])) == chosen[0]["latency_s"]


def test_screening_looks_at_as_many_networks(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    made = found(trained, context(bench), tmp_path / "made", {"screen": "naswot"})
    record = json.loads((made.directory / "architecture.json").read_text())
    assert {len(looked) for looked in record["trails"].values()} == {6}


def test_search_tells_how_far_it_is_and_the_front_as_it_stands(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    told: list[str] = []
    made = found(trained, replace(context(bench), tell=told.append), tmp_path / "made")
    record = json.loads((made.directory / "architecture.json").read_text())
    networks = {tuple(one["choices"]) for trail in record["trails"].values() for one in trail}
    assert len(told) == len(networks)
    assert told[0].startswith("1 of at most 18 networks, ")
    best = max(record["front"], key=lambda one: one["accuracy"])
    shown = f"front {best['accuracy']:.1%} in {1e3 * best['latency_s']:.3g} ms"
    assert told[-1].startswith(f"{len(networks)} of at most 18 networks, ")
    assert shown in told[-1]


def test_networks_of_their_own_are_trained_from_scratch(bench: TorchBench, tmp_path: Path) -> None:
    given = {"weights": "own", "evaluations": 3, "epochs": 4.5}
    technique = ArchitectureSearch(spec(**given))
    at = context(bench)
    parameters = defaults(technique.space(bench.torch, at))
    assert technique.epochs(parameters, at) == total_epochs(9, 4.5) == 9 * 0.5 + 3 * 1.5 + 4.5
    made = found(bench.torch, at, tmp_path / "made", given)
    again = found(bench.torch, at, tmp_path / "again", given)
    assert made.digest == again.digest
    assert load_torch(made)(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_halving_ends_with_the_best_of_those_that_came_to_the_last_round() -> None:
    asked: list[tuple[int, float]] = []

    def score(one: int, epochs: float) -> float:
        asked.append((one, epochs))
        return float(one)

    assert halved(list(range(18)), 9.0, score) == 5
    assert survivors(18) == [6, 2]
    assert asked == [*((one, 3.0) for one in range(6)), (5, 9.0), (4, 9.0)]
    assert first_epochs(9.0) == 1.0
    with pytest.raises(ValueError, match="want at least one"):
        halved([], 9.0, score)


def test_no_network_is_evaluated_twice_though_each_proposer_counts_it() -> None:
    from optimizer.architecture.making import Place, space_of

    space = space_of(spec(), Place((1, 8, 8), 4))
    asked: list[tuple[int, ...]] = []

    def evaluate(choices: tuple[int, ...]) -> Worth:
        asked.append(choices)
        return Worth(0.5, 1e-3)

    proposers = {name: RandomSearch(space, 0) for name in ("one", "other")}
    trails = explore(proposers, evaluate, Reward(1e-3), 8)
    assert [len(trail.looked) for trail in trails] == [8, 8]
    assert len(asked) == len(set(asked)) == len(everything(trails)) == 8


def test_ranking_puts_what_is_within_the_target_first() -> None:
    def looked(number: int, accuracy: float, latency_s: float) -> Looked:
        return Looked(number, (number,), Worth(accuracy, latency_s), accuracy / latency_s)

    trail = Trail("random", (looked(0, 0.9, 3.0), looked(1, 0.5, 1.0), looked(2, 0.6, 0.9)))
    assert [one.number for one in ranking([trail], 1.0)] == [2, 1, 0]


def test_regret_is_counted_from_the_best_that_any_found() -> None:
    def trail(name: str, *rewards: float) -> Trail:
        worth = Worth(0.5, 1.0)
        looked = (Looked(n, (n,), worth, reward) for n, reward in enumerate(rewards))
        return Trail(name, tuple(looked))

    found = regrets([trail("reinforce", 1.0, 0.5, 3.0), trail("random", 2.0, 2.5, 1.0)])
    assert found == {"reinforce": (2.0, 2.0, 0.0), "random": (1.0, 0.5, 0.5)}


# --- precision


def test_precision_is_searched_with_the_network_and_both_are_in_the_record(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    at = context(bench)
    given = {"precisions": BOTH, "speedups": [30.0]}
    made = found(trained, at, tmp_path / "made", given)
    record = json.loads((made.directory / "architecture.json").read_text())
    assert record["decisions"][-1] == {"name": "precision", "options": ["int8", "fp32"]}
    looked = [one for trail in record["trails"].values() for one in trail]
    assert {one["choices"][-1] for one in looked} == {0, 1}
    (step,) = [one for one in read_plan(made).steps if one.technique == "architecture"]
    assert step.operations["precision"] == "int8", "fp32 doesn't reach it"
    assert any(note.startswith("found in int8") for note in made.notes)


def test_int8_network_is_judged_as_it_rounds_and_timed_by_int8_layers(
    bench: TorchBench, trained: TorchVariant
) -> None:
    at = context(bench)
    given = spec(precisions=BOTH)
    setting = Setting(given, bench.torch.source, at)
    parameters = defaults(ArchitectureSearch(given).space(trained, at))
    worth = Shared(setting, parameters, load_torch(trained))
    in_int8 = setting.space.extreme(is_largest=False)
    in_fp32 = (*in_int8[:-1], 1)
    network = load_torch(trained).extract(in_int8)  # type: ignore[operator]
    learned, held_out = setting.parts()
    recalibrate(network, learned.each(np.arange(len(learned))[:N_RECALIBRATED], 128, whole=True))
    batch = held_out.read(np.arange(len(held_out)))
    arithmetic = setting.rounding(in_int8, parameters)
    assert arithmetic is not None
    assert setting.rounding(in_fp32, parameters) is None

    def accuracy() -> float:
        with torch.inference_mode():
            return float((network(*batch.inputs).argmax(1) == batch.labels).double().mean())

    assert worth.accuracy(in_fp32) == pytest.approx(accuracy())
    with fake_quantized(network, learned.each(np.arange(len(learned)), 128), arithmetic):
        assert worth.accuracy(in_int8) == pytest.approx(accuracy())

    table = setting.table()
    assert table is not None
    fast, slow = table.seconds(in_int8), table.seconds(in_fp32)
    assert slow is not None
    assert fast == pytest.approx(INT8_SHARE * slow)


def test_rounding_costs_a_network_a_little_and_leaves_its_weights_as_they_were(
    bench: TorchBench,
) -> None:
    network = load_source(bench.torch.source)
    setting = Setting(spec(), bench.torch.source, context(bench))
    judge = setting.judge({"output": "logits", "learns": "values"})
    judge = replace(judge, base=network)
    before = [one.clone() for one in network.parameters()]
    assert judge(network) == 1.0
    rounded = judge(network, Arithmetic(signed=False, pairs_saturate=False, least_error=True))
    assert 0.9 < rounded < 1.0
    assert all(map(torch.equal, before, network.parameters()))


def test_network_that_has_no_finite_activations_is_worth_nothing_in_int8(bench: TorchBench) -> None:
    judge = Setting(spec(), bench.torch.source, context(bench)).judge(
        {"output": "logits", "learns": "classes"}
    )
    network = load_source(bench.torch.source)
    with torch.no_grad():
        next(iter(network.parameters())).fill_(float("nan"))
    assert judge(network, Arithmetic(False, False, least_error=True)) == 0.0


def test_step_with_a_fixed_precision_looks_at_it_alone_and_binds_the_quantization(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    at, given = context(bench), {"precisions": BOTH, "evaluations": 3}
    technique = ArchitectureSearch(spec(**given))
    space = technique.space(trained, at)
    assert space["network_precision"].choices == ("searched", "fp32", "int8")  # type: ignore[union-attr]
    made = found(trained, at, tmp_path / "made", given, network_precision="int8")
    record = json.loads((made.directory / "architecture.json").read_text())
    assert record["decisions"][-1]["options"] == ["int8"]

    def recipe(precision: str) -> Recipe:
        start = Recipe(bench.torch.kind)
        for one in (SupernetTraining(spec(**given)), technique):
            chosen = {"network_precision": precision} if one is technique else {}
            start = start.then(one.traits, defaults(one.space(bench.torch, at), **chosen))
        return start

    activations, reduce_range = kernel_layout(at.machine)
    assert recipe("int8").wanted(Stage.PRECISION) == {
        "format": ("static",), "activations": (activations,), "reduce_range": (reduce_range,),
    }  # fmt: skip
    for free in ("searched", "fp32"):
        assert recipe(free).wanted(Stage.PRECISION) == {}
        assert recipe(free).lacks == frozenset()


def test_precision_that_reaches_no_speedup_is_no_choice(bench: TorchBench) -> None:
    technique, at = ArchitectureSearch(spec(precisions=BOTH, speedups=[30.0])), context(bench)
    assert technique.check(bench.torch, at) is None
    space = technique.space(bench.torch, at)
    assert space["network_precision"].choices == ("searched", "int8")  # type: ignore[union-attr]
    (missing,) = technique.missing(bench.torch, at).items()
    assert missing[0] == "architecture in fp32"
    assert "the fastest of" in missing[1]


def test_supernet_and_its_id_are_the_same_whatever_the_precisions(bench: TorchBench) -> None:
    plain, joint = (SupernetTraining(spec(precisions=one)) for one in (["fp32"], BOTH))
    at = context(bench)
    assert plain.space(bench.torch, at) == joint.space(bench.torch, at)
    spaces = [
        Setting(spec(precisions=one), bench.torch.source, at).space for one in (BOTH, ["int8"])
    ]
    assert {one.structures.n_networks for one in spaces} == {spaces[1].n_networks}
    assert spaces[0].n_networks == 2 * spaces[1].n_networks


# --- resuming


def test_killed_supernet_goes_on_to_the_same_weights(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    at = replace(context(bench), checkpoints=tmp_path / "kept")
    dying = replace(at, train=Dying(bench, n_reads=5))
    with pytest.raises(Killed):
        supernet(bench, dying, tmp_path / "killed")
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert supernet(bench, at, tmp_path / "again").digest == trained.digest
    assert not list((tmp_path / "kept").iterdir())


def test_killed_search_looks_at_nothing_twice(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    at = context(bench)
    whole = found(trained, at, tmp_path / "whole")
    at = replace(at, checkpoints=tmp_path / "kept")
    with pytest.raises(Killed):
        found(trained, replace(at, train=Dying(bench, n_reads=9)), tmp_path / "killed")
    (kept,) = (tmp_path / "kept").iterdir()
    assert json.loads(kept.read_text())
    assert found(trained, at, tmp_path / "again").digest == whole.digest
    assert not list((tmp_path / "kept").iterdir())


# --- refusals


def test_speedup_that_no_network_reaches_is_told_with_the_fastest(bench: TorchBench) -> None:
    assert "the fastest of" in (
        SupernetTraining(spec(speedups=[1e6])).check(bench.torch, context(bench)) or ""
    ), "before anything is trained"
    technique, at = ArchitectureSearch(spec(speedups=[1.0, 1e6])), context(bench)
    assert technique.check(bench.torch, at) is None
    assert technique.space(bench.torch, at)["speedup"].choices == (1.0,)  # type: ignore[union-attr]
    (reason,) = technique.missing(bench.torch, at).values()
    assert "the fastest of" in reason
    assert "stem 4" in reason
    alone = ArchitectureSearch(spec(speedups=[1e6])).check(bench.torch, at)
    assert alone is not None
    assert "allow smaller ones, or a higher target" in alone


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        pytest.param({"block_seconds": None}, "the target's times of the layers are missing",
                     id="no times"),
        pytest.param({"train": None}, "there is no training data", id="no data"),
    ],
)  # fmt: skip
def test_search_is_refused_without_what_it_needs(
    bench: TorchBench, changed: dict[str, Any], reason: str
) -> None:
    refusal = ArchitectureSearch(spec()).check(bench.torch, replace(context(bench), **changed))
    assert refusal is not None
    assert reason in refusal


def test_unknown_block_is_refused_by_name(bench: TorchBench) -> None:
    stages = [{"depths": [1], "widths": [4], "blocks": ["mystery"]}]
    technique = SupernetTraining(spec(space={**SPACE, "stages": stages}))
    refusal = technique.check(bench.torch, context(bench))
    assert refusal is not None
    assert refusal.startswith("there is no block 'mystery', want one of")


def test_block_that_cannot_be_built_is_refused_by_name(bench: TorchBench, tmp_path: Path) -> None:
    from optimizer.importable import Importable

    (tmp_path / "mine.py").write_text("def broken(plan, n_in):\n    raise RuntimeError('no')\n")
    stages = [{"depths": [1], "widths": [4], "blocks": ["mine"]}]
    given = spec(
        space={**SPACE, "stages": stages}, blocks={"mine": Importable("mine", "broken", tmp_path)}
    )
    refusal = SupernetTraining(given).check(bench.torch, context(bench))
    assert refusal is not None
    assert "the block 'mine' can't be built: RuntimeError: no" in refusal


def test_encoders_do_not_stand_in_a_place_for_images(bench: TorchBench) -> None:
    given = {"kind": "encoder", "n_tokens": 10, "max_length": 8, "depths": [1], "widths": [8],
             "heads": [1], "inners": [8]}  # fmt: skip
    refusal = SupernetTraining(spec(space=given)).check(bench.torch, context(bench))
    assert refusal is not None
    assert "want" not in refusal.split(",")[0]
    assert "FP32 [1, 8, 8]" in refusal


def test_search_without_a_supernet_before_it_is_no_recipe(bench: TorchBench) -> None:
    technique, at = ArchitectureSearch(spec()), context(bench)
    parameters = defaults(technique.space(bench.torch, at))
    recipe = Recipe(bench.torch.kind)
    assert not recipe.can_take(technique.traits)
    with pytest.raises(ValueError, match="architecture can't come without a supernet before"):
        recipe.then(technique.traits, parameters)


def test_table_of_another_target_is_refused(
    bench: TorchBench, trained: TorchVariant, tmp_path: Path
) -> None:
    technique, at = ArchitectureSearch(spec()), context(bench)
    parameters = defaults(technique.space(trained, at))
    other = replace(at, block_seconds=lambda block: 2 * seconds(block))
    with pytest.raises(ValueError, match="table: got"):
        technique.apply(trained, parameters, other, tmp_path)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"space": {**SPACE, "stems": [8, 4]}}, "want rising values in stems"),
        ({"space": {**SPACE, "stages": [{"depths": [1], "widths": [4], "kernels": [4]}]}},
         "want odd sizes"),
        ({"space": {**SPACE, "stages": [{"depths": [1], "widths": [4],
                                         "shortcuts": [True, True]}]}},
         "want every value once in shortcuts"),
        ({"space": {"kind": "graph"}}, "kind"),
        ({"speedups": [2.0, 2.0]}, "want every value once in speedups"),
        ({"evaluations": 1}, "evaluations"),
        ({"controllers": ["guess"]}, "controllers"),
        ({"precisions": ["int4"]}, "precisions"),
        ({"precisions": ["int8", "int8"]}, "want every value once in precisions"),
    ],
)  # fmt: skip
def test_spec_refuses_a_space_that_cannot_be(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        spec(**given)


def test_spec_refuses_the_search_when_recovery_is_left_out(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    plain = "techniques: {exclude: [torch_compilation]}"
    given = f"techniques: {{exclude: [recovery], architecture: {json.dumps({'space': SPACE})}}}"
    path.write_text(path.read_text().replace(plain, given))
    with pytest.raises(SpecInvalid, match="want recovery among those left"):
        read_spec(path)


def test_spec_refuses_int8_networks_when_quantization_is_left_out(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    plain = "techniques: {exclude: [torch_compilation]}"
    searched = json.dumps({"space": SPACE, "precisions": BOTH})
    given = f"techniques: {{exclude: [quantization], architecture: {searched}}}"
    path.write_text(path.read_text().replace(plain, given))
    with pytest.raises(SpecInvalid, match="want quantization among those left: architecture"):
        read_spec(path)


# --- the table, corrected


FIXED_S, FACTOR, MODEL_S = 3e-5, 1.5, 2e-4
"""What whole networks of a made-up target take: so much, and so often their layers; the model."""


def whole_seconds(
    technique: ArchitectureSearch, bench: TorchBench, at: Context
) -> dict[str, float]:
    """By key, what that target takes for the networks that the technique wants timed."""
    setting = Setting(technique._spec, bench.torch.source, at)
    found = {setting.base_key: MODEL_S}
    for precision in technique._spec.precisions:
        one = setting.at(precision)
        table = one.table()
        assert table is not None
        sums = {key: table.seconds(choices) for key, choices in one.whole().items()}
        found |= {key: FIXED_S + FACTOR * (total or 0.0) for key, total in sums.items()}
    return found


@pytest.mark.parametrize("precisions", [["fp32"], BOTH])
def test_networks_to_be_timed_are_the_model_and_some_of_each_precision(
    precisions: list[str], bench: TorchBench, tmp_path: Path
) -> None:
    technique, at = ArchitectureSearch(spec(precisions=precisions)), context(bench)
    wanted = technique.timed_networks(bench.torch, at)
    assert len({one.key for one in wanted}) == len(wanted) == 1 + N_WHOLE * len(precisions)
    assert {one.key for one in wanted} == set(whole_seconds(technique, bench, at))
    ends = (wanted[0], wanted[1], wanted[-1])
    made = []
    for number, one in enumerate(ends):
        directory = tmp_path / str(number)
        directory.mkdir()
        made.append(one.write(directory))
    assert [one.precision for one in made] == ["fp32", "fp32", precisions[-1]]
    assert len({one.digest for one in made}) == len(ends)
    for one in made:
        assert precision_of(one.directory / one.spec.file) == one.precision
        engine = load_engine(one.directory, one.spec)
        try:
            (output,) = engine.run(dict(bench.inputs)).values()
        finally:
            engine.close()
        assert output.shape == (len(next(iter(bench.inputs.values()))), 4)


def test_no_network_is_timed_whole_before_its_layers_are(bench: TorchBench) -> None:
    at = replace(context(bench), block_seconds=None)
    assert ArchitectureSearch(spec()).timed_networks(bench.torch, at) == []


def test_table_is_corrected_by_networks_that_were_timed_whole(
    bench: TorchBench, tmp_path: Path, trained: TorchVariant
) -> None:
    technique, plain = ArchitectureSearch(spec(precisions=BOTH)), context(bench)
    known = whole_seconds(technique, bench, plain)
    at = replace(plain, network_seconds=known.get)
    before = Setting(technique._spec, bench.torch.source, plain).table()
    setting = Setting(technique._spec, bench.torch.source, at)
    table = setting.table()
    assert before is not None
    assert table is not None
    assert table.digest != before.digest
    assert setting.base_s(table) == MODEL_S
    rng = np.random.default_rng(1)
    for _ in range(20):
        choices = setting.space.sample(rng)
        total = before.seconds(choices)
        assert total is not None
        assert table.seconds(choices) == pytest.approx(FIXED_S + FACTOR * total, rel=1e-6)
    assert set(table.trusts) == set(BOTH)
    made = found(trained, at, tmp_path / "made", {"speedups": [0.5]})
    (note,) = [one for one in made.notes if "timed whole" in one]
    assert note.startswith("latencies in fp32 are corrected by 6 networks timed whole")
    assert note.endswith("0.0% off on average, rank correlation 1.00")
    record = json.loads((made.directory / "architecture.json").read_text())
    assert record["target_s"] == pytest.approx(MODEL_S / 0.5)


@pytest.mark.parametrize("left_out", ["the model", "a precision"])
def test_table_stays_sums_when_too_few_networks_were_timed_whole(
    left_out: str, bench: TorchBench, tmp_path: Path
) -> None:
    technique, plain = ArchitectureSearch(spec(precisions=BOTH)), context(bench)
    known = whole_seconds(technique, bench, plain)
    setting = Setting(technique._spec, bench.torch.source, plain)
    gone = {setting.base_key} if left_out == "the model" else set(setting.at("int8").whole())
    kept = {key: one for key, one in known.items() if key not in gone}
    before = setting.table()
    after = Setting(
        technique._spec, bench.torch.source, replace(plain, network_seconds=kept.get)
    ).table()
    assert before is not None
    assert after is not None
    assert after.digest == before.digest
    assert not after.trusts


def test_networks_timed_whole_are_built_once_and_kept_in_the_store(
    bench: TorchBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.architecture.setting.N_WHOLE", 2)
    techniques: dict[str, Any] = {"architecture": ArchitectureSearch(spec())}
    with Store(tmp_path / "store.sqlite") as store:
        builder = Builder(store, bench.torch, techniques, context(bench), bench.inputs)
        first = builder.timed_networks("architecture", 600.0)
        assert len(first) == 3
        again = builder.timed_networks("architecture", 600.0)
        assert [(key, one.id, one.model) for key, one in again] == [
            (key, one.id, one.model) for key, one in first
        ]
        assert all(one.model.directory.is_dir() for _, one in first)
        assert builder.timed_networks("architecture", 0.0) == []


# --- in a study


def test_steps_share_the_supernet_in_the_store(bench: TorchBench, tmp_path: Path) -> None:
    given = spec(controllers=["reinforce", "ppo"])
    techniques: dict[str, Any] = {
        "supernet": SupernetTraining(given),
        "architecture": ArchitectureSearch(given),
        "recovery": load_technique("recovery"),
    }
    at = context(bench)
    with Store(tmp_path / "store.sqlite") as store:
        builder = Builder(store, bench.torch, techniques, at, bench.inputs)
        assert {one.traits.name for one in builder.options(Recipe(bench.torch.kind))} == {
            "supernet"
        }
        ids = []
        for controller in ("reinforce", "ppo"):
            recipe = Recipe(bench.torch.kind)
            for name, chosen in (("supernet", {}), ("architecture", {"controller": controller})):
                technique = techniques[name]
                parameters = defaults(technique.space(bench.torch, at), **chosen)
                recipe = recipe.then(technique.traits, parameters)
            assert recipe.is_structural
            built = builder.build(recipe)
            ids.append(builder.ids(recipe))
            assert builder.blocks(recipe), "known once it is in the store"
            assert builder.find(built.id) is not None
        assert ids[0][0] == ids[1][0]
        assert ids[0][1] != ids[1][1]
        recovery = techniques["recovery"]
        parameters = defaults(recovery.space(bench.torch, at))
        behind = builder.build(recipe.then(recovery.traits, parameters).with_effort("recalibrate"))
        records = architectures(
            [behind.id, "unknown", ids[0][0], *(one[1] for one in ids)], builder
        )
        assert [one.id for one in records] == [ids[1][1], ids[0][1]]
        assert [one.proposers[0].name for one in records] == ["ppo", "reinforce"]
        assert {one.name: len(one.networks) for one in records[0].proposers} == {
            "ppo": 6, "evolution": 6, "random": 6,
        }  # fmt: skip
        assert records[0].label == "another network, 1x, by ppo"
        assert {one.precision for one in records[0].front} == {"fp32"}


@pytest.mark.full
def test_study_finds_a_network_of_the_space_and_shows_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(estimates, "_WHOLE_EFFORT", QUICK)
    path = write_study(tmp_path, max_drop_points=90.0)
    architecture = {
        "space": SPACE, "epochs": 2, "evaluations": 4, "speedups": [0.05],
        "precisions": ["int8"],
    }  # fmt: skip
    plain = "techniques: {exclude: [torch_compilation]}"
    given = {"exclude": ["torch_compilation"], "architecture": architecture}
    text = path.read_text().replace(plain, f"techniques: {json.dumps(given)}")
    # A fifth of the time is for tables, which a busy machine needs more of.
    text = text.replace("wall_clock_s: 600, trials: 3", "wall_clock_s: 3600, trials: 12")
    path.write_text(text + "training: {batch_size: 16, epochs: 1, short_epochs: 0.5}\n")
    options = Options(
        store=tmp_path / "store.sqlite", verifier=FakeVerifier(), effort=QUICK, isolate=False
    )
    result = optimize(path, tmp_path / "repository", options)
    labels = [row.label for row in result.variants]
    assert any("another network" in label for label in labels), labels
    (record, *_) = result.architectures
    looked = {one.precision for trail in record.proposers for one in trail.networks}
    assert looked == {"int8"}
    assert f"Looking for {record.label}" in render_html(result)
    with Store(tmp_path / "store.sqlite") as store:
        timed = list(store.values("network", PROTOCOL_VERSION, this_machine()))
    assert len(timed) == 1 + N_WHOLE
