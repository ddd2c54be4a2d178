"""Groups of what can only go together, on the topologies that users bring, and taking them out."""

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.pruning.graph import InputShape, Untraceable, trace
from optimizer.pruning.groups import network_of
from optimizer.pruning.surgery import (
    MODULE,
    TRACE,
    difference,
    masked_outputs,
    operate,
    operations_of,
)
from tests.optimizer.networks import (
    TOPOLOGIES,
    Sorted,
    built,
    case,
    flat,
    halved,
    inputs_of,
    zeroed,
)

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_groups_are_those_counted_by_hand_when_a_network_is_traced(name: str) -> None:
    found = {group.name: len(group.units) for group in case(name).network.groups}
    assert found == TOPOLOGIES[name].groups


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_pruned_network_computes_what_zeros_give_when_half_of_every_group_goes(name: str) -> None:
    one = case(name)
    gone = halved(one.network.groups)
    module, form = one.pruned(gone)
    reference = zeroed(one.module(), one.network.groups, gone)
    assert form == one.topology.form
    assert n_parameters(module) < n_parameters(reference)
    for n in (1, 2, 3):
        inputs = inputs_of(one.topology.inputs, n)
        with torch.no_grad():
            wanted, given = flat(reference(*inputs)), flat(module(*inputs))
        for want, got in zip(wanted, given, strict=True):
            torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", [n for n, one in TOPOLOGIES.items() if one.form == MODULE])
def test_trace_computes_the_same_when_it_takes_forwards_place(name: str) -> None:
    one = case(name)
    gone = halved(one.network.groups)
    operations = operations_of(one.network, gone, TRACE, one.topology.inputs)
    module = operate(one.module(), operations)
    for n in (1, 3):
        inputs = inputs_of(one.topology.inputs, n)
        with torch.no_grad():
            want = zeroed(one.module(), one.network.groups, gone)(*inputs)
            torch.testing.assert_close(module(*inputs), want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["resnet", "efficientnet", "densenet", "shuffle"])
def test_groups_can_go_one_by_one_when_all_others_stay(name: str) -> None:
    one = case(name)
    inputs = inputs_of(one.topology.inputs, 2)
    for group in one.network.groups:
        gone = group.units[:1]
        module, _ = one.pruned(gone)
        with torch.no_grad():
            want = zeroed(one.module(), [group], gone)(*inputs)
            torch.testing.assert_close(module(*inputs), want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_layers_know_how_wide_they_are_when_pruned(name: str) -> None:
    one = case(name)
    module, _ = one.pruned(halved(one.network.groups))
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            per_group = part.in_channels // part.groups
            assert tuple(part.weight.shape[:2]) == (part.out_channels, per_group)
        elif isinstance(part, nn.Linear):
            assert tuple(part.weight.shape) == (part.out_features, part.in_features)
        elif isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.num_features == len(part.running_mean)


def test_layers_keep_their_names_and_classes_when_the_trace_takes_forwards_place() -> None:
    one = case("resnet_option_a")
    module, form = one.pruned(halved(one.network.groups))
    assert form == TRACE
    called = {name: type(part) for name, part in module.named_modules() if "." in name}
    for name, part in one.module().named_modules():
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            assert called[name] is type(part)


def test_network_trains_when_its_trace_takes_forwards_place() -> None:
    one = case("resnet_option_a")
    module, _ = one.pruned(halved(one.network.groups))
    norm = module.get_submodule("0.1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    module.train()
    module(*inputs_of(one.topology.inputs, 4)).sum().backward()
    assert not torch.equal(norm.running_mean, before)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_tied_weights_stay_tied_when_pruned() -> None:
    one = case("tied")
    module, _ = one.pruned(halved(one.network.groups))
    first, second = module.get_submodule("first"), module.get_submodule("second")
    assert first.weight is second.weight


def test_widths_of_residual_streams_are_told_apart_when_layers_are_added() -> None:
    residual = {group.name for group in case("resnet").network.groups if group.is_residual}
    assert residual == {"0.0", "2.1.second.0"}
    assert not any(group.is_residual for group in case("vit").network.groups)


def test_axes_are_frozen_when_an_operator_has_no_rule() -> None:
    network = network_of(trace(built(Sorted), (InputShape("FP32", (5,)),)))
    assert network.groups == ()
    assert network.flow.unknown == {"sort"}


class Deciding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_network_is_refused_with_the_reason_when_it_decides_by_values() -> None:
    with pytest.raises(Untraceable, match="Deciding can't be traced"):
        trace(Deciding(), (InputShape("FP32", (5,)),))


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        pytest.param([["up.weight", 0, []]], "up.weight: got 0 indices", id="an empty layer"),
        pytest.param([["up.weight", 0, [8]]], "each below 8", id="an index that isn't there"),
        pytest.param([["down.gain", 0, [0]]], "no tensor down.gain", id="an unknown name"),
    ],
)
def test_operating_is_refused_when_the_plan_doesnt_fit(kept: list[object], reason: str) -> None:
    operations = {"form": MODULE, "inputs": [], "kept": kept}
    with pytest.raises(ValueError, match=reason):
        operate(built(Sorted), operations)


def test_difference_is_told_when_a_module_doesnt_compute_what_it_should() -> None:
    one = case("vgg")
    inputs = inputs_of(one.topology.inputs, 2)
    wanted = masked_outputs(one.module(), one.network, [], inputs)
    assert difference(one.module(), wanted, inputs) == ""
    assert "differs by" in difference(zeroed(one.module(), one.network.groups, list(
        one.network.groups[0].units
    )), wanted, inputs)  # fmt: skip
    assert "an output is" in difference(nn.Flatten(), wanted, inputs)
    assert "RuntimeError" in difference(nn.Linear(5, 5), wanted, inputs)


def test_units_are_found_again_when_only_what_stays_is_known() -> None:
    network = case("densenet").network
    gone = halved(network.groups)
    assert network.gone(network.kept(gone)) == set(gone)


def n_parameters(module: nn.Module) -> int:
    return int(np.sum([parameter.numel() for parameter in module.parameters()]))


@pytest.mark.full  # exports a module, and traces what came of it
def test_exported_program_is_pruned_when_its_trace_takes_forwards_place() -> None:
    topology = TOPOLOGIES["efficientnet"]
    batch = ({0: torch.export.Dim("batch", max=32)},)
    program = torch.export.export(
        built(topology.build), inputs_of(topology.inputs, 2), dynamic_shapes=batch
    )
    network = network_of(trace(program.module(), topology.inputs))
    assert {group.name: len(group.units) for group in network.groups} == topology.groups
    gone = halved(network.groups)
    operations = operations_of(network, gone, TRACE, topology.inputs)
    inputs = inputs_of(topology.inputs, 3)
    wanted = masked_outputs(program.module(), network, gone, inputs)
    assert difference(operate(program.module(), operations), wanted, inputs) == ""
