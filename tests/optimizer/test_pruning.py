"""Importance, allocation, depth and masks against plain references, and the technique itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from optimizer.blocks import Block, named_blocks
from optimizer.data.splits import Samples as Read
from optimizer.pruning import masks
from optimizer.pruning.allocation import RULES, Candidates, allocate
from optimizer.pruning.costs import Costs
from optimizer.pruning.depth import Bypass, blocks_of, bypass, importance, least_important
from optimizer.pruning.graph import named_tensors, trace
from optimizer.pruning.groups import Group
from optimizer.pruning.importance import CRITERIA, Samples, Scores, score
from optimizer.pruning.latency import Latency
from optimizer.pruning.latency_table import latency_table
from optimizer.pruning.sensitivity import Sensitivity
from optimizer.recipe import Recipe
from optimizer.space import Value, check_parameters, defaults
from optimizer.spec import InputSpec, ModuleSource, OutputSpec
from optimizer.techniques import Context, load_technique
from optimizer.torch_variant import load_torch, read_plan
from optimizer.variant import TorchModel, TorchVariant, source_model
from serve.machine import this_machine
from tests.optimizer.networks import (
    N_CLASSES,
    TOPOLOGIES,
    Case,
    built,
    case,
    inputs_of,
)

N_SAMPLES = 6


def samples(name: str) -> Samples:
    inputs = inputs_of(TOPOLOGIES[name].inputs, N_SAMPLES)
    return Samples(inputs, torch.arange(N_SAMPLES) % N_CLASSES, seed=0)


# --- importance


def group_of(one: Case, name: str) -> Group:
    return next(group for group in one.network.groups if group.name == name)


def by_hand(criterion: str, one: Case, group: Group) -> list[float]:
    """Unit by unit, as the papers have it."""
    tensors = {
        name: tensor.detach().double() for name, tensor in named_tensors(one.module()).items()
    }
    per_place = []
    for (name, axis), by_unit in group.places.items():
        weight = tensors[name]
        is_norm = name.endswith("1.weight") and weight.ndim == 1
        if is_norm != (criterion == "bn_scale") or (weight.ndim == 1 and not is_norm):
            continue
        if criterion == "fpgm" and (name, axis) not in group.makers:
            continue
        units = [torch.cat([weight.select(axis, int(i)).flatten() for i in ids]) for ids in by_unit]
        if criterion == "l1":
            sizes = [float(unit.abs().sum()) for unit in units]
        elif criterion == "fpgm":
            sizes = [sum(float((unit - other).norm()) for other in units) for unit in units]
        elif criterion == "lamp":
            squares = [float(unit.square().sum()) for unit in units]
            sizes = [one / sum(other for other in squares if other >= one) for one in squares]
        else:
            sizes = [float(unit.norm()) for unit in units]
        total = sum(sizes) / len(sizes) if criterion in ("l1", "l2", "fpgm") else 1.0
        per_place.append([size / total for size in sizes])
    return [sum(column) / len(per_place) for column in zip(*per_place, strict=True)]


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "lamp", "fpgm"])
@pytest.mark.parametrize(
    ("name", "group"), [("vgg", "0"), ("densenet", "stem"), ("resnet", "2.1.second.0")]
)
def test_scores_are_those_of_the_papers_when_counted_unit_by_unit(
    criterion: str, name: str, group: str
) -> None:
    one = case(name)
    chosen = group_of(one, group)
    if criterion == "bn_scale" and name == "densenet":
        pytest.skip("its batch normalizations are in a list, which the reference doesn't know")
    (given,) = score(criterion, one.module(), [chosen], samples(name))
    np.testing.assert_allclose(given, by_hand(criterion, one, chosen), rtol=1e-9)


def test_taylor_is_the_first_order_change_of_the_loss_when_a_unit_is_scaled() -> None:
    one, data = case("vgg"), samples("vgg")
    group = group_of(one, "0")
    (given,) = score("taylor", one.module(), [group], data)
    norms = ("1.weight", "1.bias")  # of the batch normalization behind it, which scale the unit
    assert set(norms) < {name for name, _ in group.places}
    step = 1e-6  # hardly ever over a kink
    for index in range(len(group.units)):
        losses = []
        for sign in (1.0, -1.0):
            module = one.module().double()
            tensors = named_tensors(module)
            with torch.no_grad():
                for place, by_unit in group.places.items():
                    if place[0] in norms:
                        tensors[place[0]][by_unit[index]] *= 1 + sign * step
                outputs = module(data.inputs[0].double())
            losses.append(float(nn.functional.cross_entropy(outputs, data.labels)))
        change = (losses[0] - losses[1]) / (2 * step)
        assert given[index] == pytest.approx(change**2, rel=1e-2, abs=1e-8)


def test_taylor_takes_the_models_own_answers_when_there_are_no_labels() -> None:
    one, data = case("vgg"), samples("vgg")
    answers = one.module()(*data.inputs).argmax(dim=1)
    groups = one.network.groups
    own = score("taylor", one.module(), groups, Samples(data.inputs, None, 0))
    told = score("taylor", one.module(), groups, Samples(data.inputs, answers, 0))
    for given, want in zip(own, told, strict=True):
        np.testing.assert_array_equal(given, want)
        assert given.sum() > 0


def test_random_scores_are_decided_by_the_seed_alone() -> None:
    groups, module = case("vgg").network.groups, case("vgg").module()
    inputs = samples("vgg").inputs
    first, again, other = (
        score("random", module, groups, Samples(inputs, None, seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_groups_without_batch_normalization_stay_when_its_scale_is_the_criterion() -> None:
    one = case("vgg")
    scores = score("bn_scale", one.module(), one.network.groups, samples("vgg"))
    said = {
        g.name: bool(np.isfinite(s).all()) for g, s in zip(one.network.groups, scores, strict=True)
    }
    assert said == {"0": True, "4": False, "7": False}
    with pytest.raises(ValueError, match="bn_scale says nothing about any layer"):
        score("bn_scale", case("vit").module(), case("vit").network.groups, samples("vit"))


# --- allocation


def candidates(name: str, multiple: int = 1, criterion: str = "l2") -> Candidates:
    one = case(name)
    groups = one.network.groups
    scores = score(criterion, one.module(), groups, samples(name))
    costs = Costs(one.network, groups)
    layers = named_blocks(one.module(), samples(name).inputs)
    table = latency_table(layers.values(), seconds)
    assert table is not None
    return Candidates(groups, scores, costs, multiple, Latency(costs, layers, table))


def seconds(block: Block) -> float:
    """Of a made-up machine."""
    n_inputs = block.input_shape[0] if block.kind == "conv" else block.input_shape[-1]
    return 1e-6 + 1e-9 * n_inputs * block.n_outputs / block.groups


def none_moves(_group: int, _n_gone: int) -> float:
    raise AssertionError("not asked for")


def sensitivity_of(name: str, given: Candidates) -> Sensitivity:
    one = case(name)
    return Sensitivity(one.module(), one.network, given, samples(name).inputs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["vgg", "resnet_option_a", "densenet", "vit"])
def test_allocation_reaches_the_ratio_when_it_can(rule: str, name: str) -> None:
    given = candidates(name)
    assert given.latency is not None
    left = given.latency.seconds if rule == "latency" else given.costs.operations
    before = left(np.zeros(len(given.groups), dtype=np.int64))
    counts = allocate(rule, given, 0.3, sensitivity_of(name, given))
    assert 0.3 <= 1 - left(counts) / before < 0.6
    assert all(count < len(group.units) for count, group in zip(counts, given.groups, strict=True))


@pytest.mark.parametrize("name", ["vgg", "resnet_option_a", "efficientnet", "bert"])
def test_operations_are_those_of_the_pruned_network_when_units_go(name: str) -> None:
    one = case(name)
    given = candidates(name)
    counts = np.array([len(group.units) // 2 for group in given.groups])
    module, _ = one.pruned(given.gone(counts))
    assert given.costs.operations(counts) == pytest.approx(operations_of_layers(one, module))


def operations_of_layers(one: Case, module: nn.Module) -> float:
    """Multiply-adds of convolutions and linear layers by hooks, and of attention by its heads."""
    total = 0.0
    batch = 2

    def count(part: nn.Module, _given: object, made: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(part.weight, torch.Tensor)
        total += made.numel() / part.weight.shape[0] * part.weight.numel() / batch

    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(count)
    example = tuple(
        torch.zeros((2, *(16 if size == -1 else size for size in shape.shape)),
                    dtype=torch.int64 if shape.datatype == "INT64" else torch.float32)
        for shape in one.topology.inputs
    )  # fmt: skip
    with torch.no_grad():
        module(*example)
    heads = [value for name, value in one.topology.groups.items() if name.endswith("query")]
    # Queries by keys, and weights by values: 16 x 16 positions, heads of 4 channels.
    return total + sum(2 * 16 * 16 * 4 * (n_heads - n_heads // 2) for n_heads in heads)


def test_widths_are_multiples_when_kernels_like_them() -> None:
    given = candidates("resnet", multiple=4)
    counts = allocate("global", given, 0.4, none_moves)
    for group, count in zip(given.groups, counts, strict=True):
        assert (len(group.units) - count) % 4 == 0
    assert counts.any()


def test_uniform_takes_the_same_share_of_every_group_when_multiples_allow() -> None:
    given = candidates("resnet")
    counts = allocate("uniform", given, 0.4, none_moves)
    shares = [count / len(g.units) for count, g in zip(counts, given.groups, strict=True)]
    assert max(shares) - min(shares) <= 1 / 8


def test_global_takes_nothing_that_scores_higher_than_what_it_leaves() -> None:
    given = candidates("vgg")
    counts = allocate("global", given, 0.3, none_moves)
    gone = set(given.gone(counts))
    taken = [s for g, all_ in zip(given.groups, given.scores, strict=True)
             for u, s in zip(g.units, all_, strict=True) if u in gone]  # fmt: skip
    left = [s for g, all_ in zip(given.groups, given.scores, strict=True)
            for u, s in zip(g.units, all_, strict=True) if u not in gone]  # fmt: skip
    assert max(taken) <= min(left)


def test_cost_takes_from_where_most_is_saved_when_all_units_matter_alike() -> None:
    one = case("resnet")
    groups = one.network.groups
    equal: list[Scores] = [np.ones(len(group.units)) for group in groups]
    costs = Costs(one.network, groups)
    counts = allocate("cost", Candidates(groups, equal, costs, 1), 0.05, none_moves)
    saved = [costs.effort(np.zeros(len(groups), dtype=np.int64), 1)
             - costs.effort(np.eye(len(groups), dtype=np.int64)[index], 1)
             for index in range(len(groups))]  # fmt: skip
    assert counts[int(np.argmax(saved))] > 0
    assert counts[int(np.argmin(saved))] == 0


def test_sensitivity_is_how_far_outputs_move_when_one_group_alone_goes() -> None:
    one, given = case("vgg"), candidates("vgg")
    counts = np.array([3, 0, 0])
    with torch.no_grad():
        whole = one.module()(*samples("vgg").inputs)
        pruned = one.pruned(given.gone(counts))[0](*samples("vgg").inputs)
    want = float((pruned - whole).square().mean() / whole.var(correction=0))
    assert sensitivity_of("vgg", given)(0, 3) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_ratio_is_refused_when_it_is_no_share(ratio: float) -> None:
    with pytest.raises(ValueError, match="want more than 0 and less than 1"):
        allocate("uniform", candidates("vgg"), ratio, none_moves)


def test_ratio_is_refused_with_layer_and_bound_when_it_would_empty_one() -> None:
    with pytest.raises(ValueError, match=r"got 0\.99, want at most 0\.\d+.*such as 2\..*keep 1"):
        allocate("global", candidates("resnet"), 0.99, none_moves)
    with pytest.raises(ValueError, match="allocation: got 'best', want one of uniform"):
        allocate("best", candidates("vgg"), 0.3, none_moves)
    with pytest.raises(ValueError, match="criterion: got 'best', want one of l2"):
        score("best", case("vgg").module(), case("vgg").network.groups, samples("vgg"))


# --- depth


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet", ("2.0", "2.2")),
        ("resnet_option_a", ("2.0", "2.2")),
        ("efficientnet", ("3",)),
        ("vit", ("blocks.0", "blocks.1")),
        ("bert", ("layers.0", "layers.1")),
        ("vgg", ()),
        ("densenet", ()),
    ],
)
def test_blocks_are_those_that_hand_on_their_input_when_shapes_stay(
    name: str, blocks: tuple[str, ...]
) -> None:
    one = case(name)
    assert blocks_of(one.module(), one.network.flow.seen) == blocks


@pytest.mark.parametrize(("name", "block"), [("resnet", "2.2"), ("bert", "layers.0")])
def test_bypassed_network_computes_what_its_other_blocks_do(name: str, block: str) -> None:
    one = case(name)
    inputs = samples(name).inputs

    class Skipped(nn.Module):
        def forward(self, x: torch.Tensor, *_others: torch.Tensor) -> torch.Tensor:
            return x

    reference = one.module()
    reference.set_submodule(block, Skipped())
    given = bypass(one.module(), {block: "tensor"})
    with torch.no_grad():
        want, got = reference(*inputs), given(*inputs)
    torch.testing.assert_close(got, want)
    assert not any(key.startswith(f"{block}.") for key in given.state_dict())


def test_block_matters_less_when_it_changes_less() -> None:
    module = case("vit").module()
    for weights in module.get_submodule("blocks.1").parameters():
        nn.init.zeros_(weights)
    scores = importance(module, ["blocks.0", "blocks.1"], samples("vit").inputs)
    assert scores["blocks.1"] == pytest.approx(0, abs=1e-6)
    assert scores["blocks.0"] > 0.01
    assert least_important(scores, 1) == ["blocks.1"]
    with pytest.raises(ValueError, match="got 3 to bypass, want 0 to 2"):
        least_important(scores, 3)
    with pytest.raises(ValueError, match="no block layer9"):
        bypass(module, {"layer9": "tensor"})


def test_bypass_gives_a_tuple_when_the_block_did() -> None:
    x = torch.zeros(1)
    assert Bypass("tuple")(x, None) == (x,)
    assert Bypass("tensor")(x, attention=None) is x


# --- masks


def sparse(pattern: str, sparsity: float) -> tuple[nn.Module, tuple[str, ...]]:
    module = case("vgg").module()
    return module, masks.mask(module, pattern, sparsity)


def test_layerwise_masks_leave_the_largest_weights_of_every_layer() -> None:
    module, names = sparse("layer", 0.75)
    before = named_tensors(case("vgg").module())
    assert names == ("0", "4", "7", "10")
    for name in names:
        tensor = module.get_submodule(name).weight.detach()
        assert float((tensor == 0).float().mean()) == pytest.approx(0.75, abs=0.02)
        lost = before[f"{name}.weight"].detach()[tensor == 0].abs().max()
        assert lost <= tensor[tensor != 0].abs().min()


def test_global_masks_leave_the_largest_weights_of_all_layers_together() -> None:
    module, names = sparse("global", 0.75)
    before = named_tensors(case("vgg").module())
    together = torch.cat([module.get_submodule(name).weight.detach().flatten() for name in names])
    was = torch.cat([before[f"{name}.weight"].detach().flatten() for name in names])
    assert float((together == 0).float().mean()) == pytest.approx(0.75, abs=1e-3)
    assert was[together == 0].abs().max() <= together[together != 0].abs().min()


def test_two_of_four_neighbours_stay_when_the_pattern_says_so() -> None:
    module, names = sparse("2:4", 0.5)
    assert names == ("4", "7")  # filters of 27 and 10 weights aren't in fours
    before = named_tensors(case("vgg").module())
    for name in names:
        fours = module.get_submodule(name).weight.detach().flatten(1).reshape(-1, 4)
        was = before[f"{name}.weight"].detach().flatten(1).reshape(-1, 4)
        assert ((fours != 0).sum(dim=1) == 2).all()
        for now, then in zip(fours, was, strict=True):
            assert set(now.abs()[now != 0].tolist()) == set(then.abs().topk(2).values.tolist())


@pytest.mark.parametrize(
    ("pattern", "sparsity", "reason"),
    [
        pytest.param("layer", 1.0, "sparsity: got 1", id="everything"),
        pytest.param("blocks", 0.5, "pattern: got 'blocks', want one of layer", id="no pattern"),
        pytest.param("global", 0.9999, "leaves nothing of", id="an empty layer"),
    ],
)
def test_masking_is_refused_with_value_and_bound(
    pattern: str, sparsity: float, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        sparse(pattern, sparsity)


def test_compressed_size_counts_bits_for_places_and_bytes_for_values() -> None:
    module = nn.Linear(8, 4, bias=False)
    names = masks.mask(module, "layer", 0.75)
    assert masks.compressed_bytes(module, names) == (32 // 8 + 8 * 4, 32 * 4)


# --- the technique


@dataclass(frozen=True, eq=False)
class Given:
    """A split of samples that are there already."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    name: str = "calibration"
    digest: str = "0"

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def read(self, indices: Sequence[int] | np.ndarray | None = None) -> Read:
        chosen = slice(None) if indices is None else np.asarray(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return Read({n: a[chosen] for n, a in self.inputs.items()}, labels, self.digest)


def model_of(name: str) -> TorchModel:
    topology = TOPOLOGIES[name]
    inputs = tuple(
        InputSpec(name=f"x{index}", datatype=one.datatype, shape=one.shape)  # type: ignore[arg-type]
        for index, one in enumerate(topology.inputs)
    )
    module = built(topology.build)
    model = source_model(ModuleSource(module, inputs, (OutputSpec(name="y"),)), name)
    assert isinstance(model, TorchModel)
    return model


def context_of(name: str) -> Context:
    data = samples(name)
    assert data.labels is not None
    inputs = {f"x{index}": one.numpy() for index, one in enumerate(data.inputs)}
    split = Given(inputs, data.labels.numpy())
    return Context(split, this_machine(), seed=0, max_batch_size=4)


def prune(name: str, directory: Path, **given: Value) -> TorchVariant:
    technique, model, context = load_technique("pruning"), model_of(name), context_of(name)
    assert technique.check(model, context) is None
    parameters = defaults(technique.space(model, context), **given)
    made = technique.apply(model, parameters, context, directory)
    assert isinstance(made, TorchVariant)
    return made


def test_pruning_takes_blocks_and_channels_when_both_are_asked_for(tmp_path: Path) -> None:
    made = prune(
        "resnet_option_a", tmp_path, what="both", residual=True, blocks=1, multiple=4,
        allocation="uniform", ratio=0.5,
    )  # fmt: skip
    (step,) = read_plan(made).steps
    assert len(step.operations["bypassed"]) == 1
    assert step.operations["widths"]["form"] == "trace"
    module = load_torch(made)
    whole = TOPOLOGIES["resnet_option_a"].build()
    n_before = sum(one.numel() for one in whole.parameters())
    assert sum(one.numel() for one in module.parameters()) < 0.6 * n_before
    with torch.no_grad():
        for n in (1, 2, 3):
            assert module(*inputs_of(TOPOLOGIES["resnet_option_a"].inputs, n)).shape == (n, 4)


def test_pruning_keeps_the_models_own_forward_when_residual_streams_stay(tmp_path: Path) -> None:
    made = prune("resnet_option_a", tmp_path, what="channels", multiple=4)
    (step,) = read_plan(made).steps
    assert step.operations["widths"]["form"] == "module"
    assert type(load_torch(made)) is nn.Sequential


@pytest.mark.full  # traces a few times
def test_pruning_takes_variable_lengths_and_dicts_when_the_model_does(tmp_path: Path) -> None:
    technique, model, context = load_technique("pruning"), model_of("bert"), context_of("bert")
    space = technique.space(model, context)
    parameters = defaults(space, ratio=0.4, multiple=4, criterion="taylor")
    made = technique.apply(model, parameters, context, tmp_path)
    assert isinstance(made, TorchVariant)
    module = load_torch(made)
    for n, length in ((1, 3), (3, 9)):
        ids = torch.ones((n, length), dtype=torch.int64)
        outputs = module(ids, ids)
        assert outputs["tokens"].shape == (n, length, 8)


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
def test_pruning_is_pure_when_applied_twice(criterion: str, tmp_path: Path) -> None:
    model = model_of("resnet")
    technique, context = load_technique("pruning"), context_of("resnet")
    before = {key: value.clone() for key, value in load_torch(model).state_dict().items()}
    parameters = defaults(technique.space(model, context), criterion=criterion, multiple=4)
    digests = set()
    for directory in (tmp_path / "first", tmp_path / "second"):
        directory.mkdir()
        digests.add(technique.apply(model, parameters, context, directory).digest)
    assert len(digests) == 1
    for key, value in load_torch(model).state_dict().items():
        assert torch.equal(value, before[key])


def test_pruning_fails_with_the_bound_when_a_ratio_would_empty_a_layer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ratio: got 0\.7, want at most 0.*would empty a layer"):
        prune("resnet", tmp_path, ratio=0.7, multiple=8)


def test_zeros_are_offered_when_the_target_may_have_kernels_for_them(tmp_path: Path) -> None:
    technique, model, context = load_technique("pruning"), model_of("vgg"), context_of("vgg")
    cpu = technique.space(model, context)["what"]
    machine = replace(context.machine, runtimes={"onnxruntime-gpu": "1.32"})
    space = technique.space(model, replace(context, machine=machine))
    assert "weights" not in repr(cpu)
    assert "weights" in repr(space["what"])
    parameters = defaults(space, what="weights", pattern="global", sparsity=0.5)
    check_parameters(space, parameters)
    made = technique.apply(model, parameters, context, tmp_path)
    assert isinstance(made, TorchVariant)
    assert technique.describe(parameters) == "global sparse 50%"
    by_and_by = defaults(space, what="weights", schedule="gradual")
    assert technique.describe(by_and_by) == "2:4 sparse, gradual"
    (step,) = read_plan(made).steps
    names = step.operations[masks.MASKS]
    module = load_torch(made)
    zeros = sum(int((module.get_submodule(name).weight == 0).sum()) for name in names)
    assert zeros == round(0.5 * sum(module.get_submodule(name).weight.numel() for name in names))
    assert "bytes with its zeros packed" in made.notes[0]


def test_sparse_weights_are_said_to_bring_no_speed_when_the_target_is_a_cpu() -> None:
    assert "zeros make nothing faster" in masks.why_no_speed(this_machine())


@pytest.mark.full  # exports
@pytest.mark.parametrize("name", ["resnet_option_a", "vit", "torch's encoder"])
def test_pruned_network_computes_the_same_when_exported(name: str, tmp_path: Path) -> None:
    directory, exported = tmp_path / "pruned", tmp_path / "exported"
    directory.mkdir()
    exported.mkdir()
    scope = {"residual": True} if name == "resnet_option_a" else {}
    made = prune(name, directory, multiple=4, ratio=0.3, allocation="uniform", **scope)
    assert read_plan(made).steps[0].operations["widths"]["form"] == "trace"
    onnx = load_technique("export").apply(made, {}, context_of(name), exported)
    assert onnx.notes == ()
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    module = load_torch(made)
    for n in (1, 2, 3):
        inputs = inputs_of(TOPOLOGIES[name].inputs, n)
        (given,) = session.run(None, {"x0": inputs[0].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(given, module(*inputs).numpy(), rtol=1e-3, atol=1e-4)


def test_recipe_can_hold_pruning_when_it_starts_from_torch() -> None:
    technique, model, context = load_technique("pruning"), model_of("vgg"), context_of("vgg")
    recipe = Recipe(model.kind).then(technique.traits, defaults(technique.space(model, context)))
    assert recipe.is_structural
    assert trace(load_torch(model), TOPOLOGIES["vgg"].inputs).inputs == ("input",)
