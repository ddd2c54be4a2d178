"""Importance, allocation and masks against plain references, and the technique itself."""

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
from optimizer.latency_table import latency_table
from optimizer.pruning import masks
from optimizer.pruning.allocation import RULES, Candidates, allocate
from optimizer.pruning.costs import Costs
from optimizer.pruning.graph import InputShape, named_tensors, trace
from optimizer.pruning.groups import Group, network_of
from optimizer.pruning.importance import CRITERIA, Samples, Scores, criteria_for, score
from optimizer.pruning.latency import Latency
from optimizer.pruning.sensitivity import Sensitivity
from optimizer.recipe import Recipe
from optimizer.space import Value, check_parameters, defaults
from optimizer.spec import InputSpec, ModuleSource, OutputSpec, TaskSpec
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


@pytest.mark.parametrize("is_head_frozen", [False, True])
def test_taylor_sees_frozen_layers_too_and_leaves_them_frozen(is_head_frozen: bool) -> None:
    one, data = case("vgg"), samples("vgg")
    module = one.module().requires_grad_(False)
    module.get_submodule("10").requires_grad_(not is_head_frozen)
    before = [weights.requires_grad for weights in module.parameters()]
    given = score("taylor", module, one.network.groups, data)
    want = score("taylor", one.module(), one.network.groups, data)
    for scores, free in zip(given, want, strict=True):
        np.testing.assert_array_equal(scores, free)
    assert [weights.requires_grad for weights in module.parameters()] == before
    assert all(weights.grad is None for weights in module.parameters())


def squared_changes(module: nn.Module, weights: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """[unit]: of a tensor [unit], the squared first-order change of each output when one goes."""
    total = np.zeros(len(weights))
    for value in module(x).flatten():
        (slope,) = torch.autograd.grad(value, weights, retain_graph=True)
        total += (slope * weights).detach().double().numpy() ** 2
    return total


@pytest.mark.parametrize(
    ("n_outputs", "labels", "has_classes"),
    [
        pytest.param(1, None, True, id="one column"),
        pytest.param(1, torch.zeros(400, dtype=torch.int64), True, id="one column, labels of 0"),
        pytest.param(4, None, False, id="outputs that are no classes"),
        pytest.param(4, torch.rand(400), True, id="labels that are no indices"),
        pytest.param(4, torch.full((400,), 4), True, id="labels beyond the columns"),
        pytest.param(4, torch.arange(400) % 3 - 1, True, id="labels below 0"),
    ],
)
def test_taylor_is_the_change_of_each_output_when_those_are_no_classes(
    n_outputs: int, labels: torch.Tensor | None, has_classes: bool
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten(),
                           nn.Linear(10, n_outputs)).eval()  # fmt: skip
    x = torch.randn(400, 3, 2)
    shape = InputShape("FP32", (3, 2))
    (group,) = network_of(trace(module, [shape])).groups
    with torch.no_grad():
        module[1].weight.mul_(torch.tensor([1.0, 0.1, 2.0, 0.5, 0.01]))
    (given,) = score("taylor", module, [group], Samples((x,), labels, 0, has_classes))
    # Of a batch, which has 31 samples on average.
    want = squared_changes(module, module[1].weight, x) / 13
    np.testing.assert_allclose(given, want, rtol=0.7)  # of 52 draws


def test_taylor_moves_when_embeddings_are_of_unit_length() -> None:
    class Unit(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(super().forward(x), dim=1)

    torch.manual_seed(0)
    module = Unit(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        module[2].weight[:, 2] *= 1e-3
    (group,) = network_of(trace(module, [InputShape("FP32", (4,))])).groups
    data = Samples((torch.randn(64, 4),), None, 0, has_classes=False)
    (scores,) = score("taylor", module, [group], data)
    assert int(np.argmin(scores)) == 2
    assert np.delete(scores, 2).min() > 1e-3


def test_groups_stay_when_no_gradient_comes_to_them() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
            self.up, self.down = nn.Linear(6, 5), nn.Linear(5, N_CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(self.fixed(x).detach()).relu())

    module = built(Fixed)
    groups = network_of(trace(module, [InputShape("FP32", (4,))])).groups
    data = Samples((torch.randn(8, 4),), None, 0)
    for criterion in ("taylor", "obs"):
        scores = dict(zip([g.name for g in groups], score(criterion, module, groups, data),
                          strict=True))  # fmt: skip
        assert np.isinf(scores["fixed.0"]).all()
        assert np.isfinite(scores["up"]).all()


def test_distances_are_between_filters_when_units_have_learned_scales_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
            self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, N_CLASSES, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.scale * self.first(x)).mean((2, 3))

    module = built(Scaled)
    (group,) = network_of(trace(module, [InputShape("FP32", (3, 4, 4))])).groups
    (given,) = score("fpgm", module, [group], Samples((torch.zeros(1, 3, 4, 4),), None, 0))
    rows = module.first.weight.detach().flatten(1).double()
    distances = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    np.testing.assert_allclose(given, distances / distances.mean(), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "silent"),
    [("vgg", set()), ("vit", {"bn_scale"}), ("a normalization of inputs alone", {"bn_scale"})],
)
def test_criteria_are_those_that_say_something_of_what_can_go(name: str, silent: set[str]) -> None:
    if name in TOPOLOGIES:
        module, groups = case(name).module(), case(name).network.groups
    else:
        module = built(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 2)))
        groups = network_of(trace(module, [InputShape("FP32", (4,))])).groups
    assert set(criteria_for(module, groups)) == set(CRITERIA) - silent - {"random"}


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


def in_fours(weight: torch.Tensor) -> torch.Tensor:
    """[four, 4]: input channels of each filter at each place of the kernel, index by index."""
    n_out, n_in = weight.shape[:2]
    flat = weight.reshape(n_out, n_in, -1)
    fours = [
        flat[one, start : start + 4, place]
        for one in range(n_out)
        for place in range(flat.shape[2])
        for start in range(0, n_in, 4)
    ]
    return torch.stack(fours)


def test_two_of_four_input_channels_stay_when_the_pattern_says_so() -> None:
    module, names = sparse("2:4", 0.5)
    assert names == ("4", "7")  # 3 channels and 10 neurons aren't in fours
    before = named_tensors(case("vgg").module())
    for name in names:
        fours = in_fours(module.get_submodule(name).weight.detach())
        was = in_fours(before[f"{name}.weight"].detach())
        assert ((fours != 0).sum(dim=1) == 2).all()
        for now, then in zip(fours, was, strict=True):
            assert set(now.abs()[now != 0].tolist()) == set(then.abs().topk(2).values.tolist())


@pytest.mark.parametrize(
    ("n_inputs", "groups", "is_masked"),
    [
        pytest.param(6, 1, False, id="filters of 24 weights that read 6 channels"),
        pytest.param(8, 2, True, id="groups of 4 channels"),
        pytest.param(8, 4, False, id="groups of 2 channels"),
    ],
)
def test_two_of_four_takes_a_layer_when_its_filters_read_channels_in_fours(
    n_inputs: int, groups: int, is_masked: bool
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(n_inputs, 8, 2, groups=groups), nn.Conv2d(8, 4, 1))
    assert masks.mask(module, "2:4", 0.5) == (("0", "1") if is_masked else ("1",))
    assert bool((module[0].weight != 0).all()) is not is_masked
    assert ("2:4" in masks.patterns_for(module[:1])) is is_masked


def test_zeros_of_rising_sparsity_are_among_the_two_least_of_four_channels() -> None:
    torch.manual_seed(0)
    magnitudes = torch.rand(3, 8, 2, 2)
    (kept,) = masks.largest({"one": magnitudes}, "2:4", 0.3).values()
    assert int((~kept).sum()) == round(0.3 * kept.numel())
    least = in_fours(magnitudes).argsort(dim=1)[:, :2]
    gone = in_fours(~kept)
    assert int(gone.gather(1, least).sum()) == int(gone.sum())
    with pytest.raises(ValueError, match="one: got 6 input channels, want a multiple of 4"):
        masks.largest({"one": torch.rand(4, 6, 2, 2)}, "2:4", 0.5)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "reason"),
    [
        pytest.param("layer", 1.0, "sparsity: got 1", id="everything"),
        pytest.param("2:4", 0.3, r"sparsity: got 0\.3, want 0\.5 for 2:4", id="fewer of four"),
        pytest.param("blocks", 0.5, "pattern: got 'blocks', want one of 2:4", id="no pattern"),
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
    return model_from(built(topology.build), topology.inputs, name)


def model_from(module: nn.Module, shapes: Sequence[InputShape], name: str) -> TorchModel:
    inputs = tuple(
        InputSpec(name=f"x{index}", datatype=one.datatype, shape=one.shape)  # type: ignore[arg-type]
        for index, one in enumerate(shapes)
    )
    model = source_model(ModuleSource(module, inputs, (OutputSpec(name="y"),)), name)
    assert isinstance(model, TorchModel)
    return model


def context_of(name: str) -> Context:
    return context_with(samples(name))


def context_with(data: Samples) -> Context:
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


class Layer(nn.Module):
    """Adds to its second argument, which is called `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.gate = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, memory: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x).relu() * torch.sigmoid(self.gate(memory))


class Remembering(nn.Module):
    """Runs with one of its layers at least."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.memory = nn.Linear(5, 6), nn.Linear(5, 6)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(6, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not any(isinstance(layer, Layer) for layer in self.layers):
            raise RuntimeError("no layer left")
        memory, x = self.memory(x), self.stem(x)
        for layer in self.layers:
            x = layer(memory, x=x)
        return nn.functional.normalize(self.head(x), dim=1)


def remembering() -> tuple[TorchModel, Context]:
    shape = InputShape("FP32", (5,))
    (x,) = inputs_of((shape,), N_SAMPLES)
    data = Samples((x,), torch.arange(N_SAMPLES) % N_CLASSES, seed=0)
    return model_from(built(Remembering), [shape], "remembering"), context_with(data)


def test_variant_without_a_block_hands_on_what_the_block_adds_to(tmp_path: Path) -> None:
    technique = load_technique("pruning")
    model, context = remembering()
    parameters = defaults(technique.space(model, context), what="blocks")
    made = technique.apply(model, parameters, context, tmp_path)
    assert isinstance(made, TorchVariant)
    whole, module = load_torch(model), load_torch(made)
    (gone,) = read_plan(made).steps[0].operations["bypassed"]
    for weights in whole.get_submodule(f"{gone}.branch").parameters():
        nn.init.zeros_(weights)
    (x,) = inputs_of((InputShape("FP32", (5,)),), 3)
    with torch.no_grad():
        torch.testing.assert_close(module(x), whole(x))


def test_blocks_are_refused_when_the_model_does_not_run_without_all_of_them(
    tmp_path: Path,
) -> None:
    model, context = remembering()
    given = {"what": "blocks", "blocks": 2}
    with pytest.raises(ValueError, match=r"without layers\.0, layers\.1: RuntimeError: no layer"):
        load_technique("pruning").apply(model, given, context, tmp_path)


@pytest.mark.parametrize(
    ("kind", "stay"), [("classification", [4, 5, 6, 7]), ("embedding", [0, 1, 2, 3])]
)
def test_scores_are_of_classes_when_the_task_is_to_classify(
    kind: str, stay: list[int], tmp_path: Path
) -> None:
    module = built(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, N_CLASSES)))
    with torch.no_grad():
        module[2].weight[:, :4] = 3.0  # moves all alike, and so no probability
    (x,) = inputs_of((InputShape("FP32", (5,)),), N_SAMPLES)
    context = context_with(Samples((x,), torch.arange(N_SAMPLES) % N_CLASSES, seed=0))
    context = replace(context, task=TaskSpec(kind=kind))  # type: ignore[arg-type]
    model = model_from(module, [InputShape("FP32", (5,))], "perceptron")
    technique = load_technique("pruning")
    space = technique.space(model, context)
    assert "bn_scale" not in repr(space["criterion"])
    parameters = defaults(space, criterion="taylor", multiple=1, ratio=0.5)
    made = technique.apply(model, parameters, context, tmp_path)
    assert isinstance(made, TorchVariant)
    assert torch.equal(load_torch(made)[0].weight, module[0].weight[stay])  # type: ignore[index]


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
