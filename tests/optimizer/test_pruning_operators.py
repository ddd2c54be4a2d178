"""Operators that are easily taken for others: their groups, and networks without them."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from optimizer.pruning.allocation import Candidates, allocate
from optimizer.pruning.costs import Costs
from optimizer.pruning.graph import InputShape, Untraceable, trace
from optimizer.pruning.groups import network_of
from optimizer.pruning.importance import Samples
from optimizer.pruning.narrowing import Narrowing
from optimizer.pruning.surgery import (
    MODULE,
    TRACE,
    difference,
    masked_outputs,
    operate,
    operations_of,
    tolerance_of,
)
from tests.optimizer.networks import (
    IMAGE,
    Case,
    Topology,
    built,
    halved,
    head,
    inputs_of,
    zeroed,
)

TOLERANCE = 1e-5
TOKENS = InputShape("FP32", (5, 12))


class Chain(nn.Module):
    """Layers `one`, `two`, `three` of these widths, put together by a function; and a head."""

    def __init__(self, between: Callable[..., torch.Tensor], *widths: tuple[int, int]) -> None:
        super().__init__()
        self.between = between
        for name, (n_in, n_out) in zip(("one", "two", "three"), widths, strict=False):
            setattr(self, name, nn.Conv2d(n_in, n_out, 1))
        self.gain = nn.Parameter(torch.randn(8, 1, 1))
        self.head = head(widths[-1][1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self, x))


def shuffled(groups: int) -> nn.Module:
    norm = nn.GroupNorm(groups, 8) if groups == 4 else nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), norm, nn.ChannelShuffle(groups), nn.Conv2d(8, 6, 3), nn.ReLU(), head(6)
    )


def normed_without_scale() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8, affine=False), nn.ReLU(), nn.Conv2d(8, 6, 3), head(6)
    )


def rolled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.two(torch.roll(self.one(x), 2, 1))


def split_off(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, rest = self.one(x).split([1, 7], 1)
    return self.two(torch.sigmoid(gate) * rest)


def narrowed(self: Any, x: torch.Tensor) -> torch.Tensor:
    wide = self.one(x)
    return self.two(wide.narrow(1, 0, 4)) + self.three(wide.narrow(1, -4, 4))


def stepped(self: Any, x: torch.Tensor) -> torch.Tensor:
    wide = self.one(x)
    return self.two(wide[:, ::2]) + self.three(wide[:, 1::2])


def folded(self: Any, x: torch.Tensor) -> torch.Tensor:
    rows = torch.softmax(functional.relu(self.one(x)).reshape(x.shape[0] * 2, -1, 8, 8), 1)
    return self.two(rows).reshape(x.shape[0], -1, 5, 8, 8).mean(1)


def repeated_in_part(self: Any, x: torch.Tensor) -> torch.Tensor:
    wide = self.one(x)
    return self.two(torch.cat([wide, wide[:, :4]], 1))


def without_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        gain = torch.sigmoid(self.gain)
        first = self.one(x) * gain
    return self.two(first.view(x.shape[0], 8, 8, 8))


def in_full_precision(self: Any, x: torch.Tensor) -> torch.Tensor:
    wide = self.one(x).view(x.shape[0], 8, 8, 8)
    with torch.autocast("cpu", enabled=False):
        return self.two(wide.float()).square()


def leaves_a_layer(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.one(x)


class Heads(nn.Module):
    """torch's attention at its defaults, which averages weights for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm, self.out = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x + self.attention(x, x, x)[0]).mean(1))


class Rotary(nn.Module):
    """Queries and keys turned by their places: a sum of two activations that one layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(5)[:, None] * torch.ones(4)
        q, k, v = self.qkv(self.norm(x)).view(-1, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        q, k = (one * places.cos() + turned(one) * places.sin() for one in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(-1, 5, 12))
        return self.last(x + self.down(functional.gelu(self.up(x)))).mean(1)


def turned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-x[..., 2:], x[..., :2]], -1)


OPERATORS: Mapping[str, Topology] = {
    "channels shuffled": Topology(
        partial(shuffled, 2), (IMAGE,), {"0": 4, "3": 6}, MODULE
    ),
    "whole groups shuffled": Topology(partial(shuffled, 4), (IMAGE,), {"0": 4, "3": 6}, TRACE),
    "groups normalized without scale": Topology(
        normed_without_scale, (IMAGE,), {"0": 4, "3": 6}, TRACE
    ),
    "channels rolled": Topology(
        partial(Chain, rolled, (3, 8), (8, 6)), (IMAGE,), {"two": 6}, MODULE
    ),
    "one channel split off": Topology(
        partial(Chain, split_off, (3, 8), (7, 6)), (IMAGE,), {"one": 7, "two": 6}, TRACE
    ),
    "parts narrowed to": Topology(
        partial(Chain, narrowed, (3, 8), (4, 6), (4, 6)), (IMAGE,), {"one": 4, "two": 6}, TRACE
    ),
    "every second channel": Topology(
        partial(Chain, stepped, (3, 8), (4, 6), (4, 6)), (IMAGE,), {"two": 6}, MODULE
    ),
    "channels folded into the batch": Topology(
        partial(Chain, folded, (3, 8), (4, 5)), (IMAGE,), {"two": 5}, TRACE
    ),
    "no gradient": Topology(
        partial(Chain, without_gradient, (3, 8), (8, 6)), (IMAGE,), {"gain": 8, "two": 6}, TRACE
    ),
    "autocast": Topology(
        partial(Chain, in_full_precision, (3, 8), (8, 6)), (IMAGE,), {"one": 8, "two": 6}, TRACE
    ),
    "a layer that isn't used": Topology(
        partial(Chain, leaves_a_layer, (3, 8), (8, 8)), (IMAGE,), {"one": 8}, MODULE
    ),
    "attention with its weights": Topology(
        Heads, (TOKENS,), {"attention.in_proj_weight": 3}, TRACE
    ),
    "rotary attention": Topology(Rotary, (TOKENS,), {"qkv": 3, "up": 10}, TRACE),
}  # fmt: skip


@cache
def case(name: str) -> Case:
    topology = OPERATORS[name]
    return Case(topology, network_of(trace(built(topology.build), topology.inputs)))


@pytest.mark.parametrize("name", OPERATORS)
def test_groups_are_those_counted_by_hand_when_an_operator_depends_on_widths(name: str) -> None:
    found = {group.name: len(group.units) for group in case(name).network.groups}
    assert found == OPERATORS[name].groups


@pytest.mark.parametrize("name", OPERATORS)
def test_network_computes_what_zeros_give_whatever_goes(name: str) -> None:
    one = case(name)
    groups = one.network.groups
    few = [unit for group in groups for unit in group.units[: len(group.units) // 3]]
    for gone in (halved(groups), few):
        module, form = one.pruned(gone)
        assert form == one.topology.form
        for n in (1, 3):
            inputs = inputs_of(one.topology.inputs, n)
            with torch.no_grad():
                want = zeroed(one.module(), groups, gone)(*inputs)
                torch.testing.assert_close(module(*inputs), want, rtol=TOLERANCE, atol=TOLERANCE)


def traced_form(name: str) -> tuple[nn.Module, nn.Module]:
    """The network whose trace takes its place with one unit less, and the whole one."""
    one = case(name)
    gone = one.network.groups[0].units[:1]
    operations = operations_of(one.network, gone, TRACE, one.topology.inputs)
    return operate(one.module(), operations), one.module()


def test_gradients_stop_where_the_forward_says_so_when_its_trace_takes_its_place() -> None:
    pruned, whole = traced_form("no gradient")
    for module in (pruned, whole):
        module(*inputs_of((IMAGE,), 2)).sum().backward()
    reached = [
        {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        for module in (pruned, whole)
    ]
    assert reached[0] == reached[1] == {"two.weight", "two.bias", "head.2.weight", "head.2.bias"}


def test_layer_stays_in_full_precision_when_the_trace_is_trained_in_half() -> None:
    for module in traced_form("autocast"):
        seen: list[torch.dtype] = []
        for name in ("one", "two"):
            module.get_submodule(name).register_forward_hook(
                lambda _part, _given, made, seen=seen: seen.append(made.dtype)
            )
        with torch.autocast("cpu", torch.bfloat16):
            module(*inputs_of((IMAGE,), 2))
        assert seen == [torch.bfloat16, torch.float32]


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.up(x),))
        return self.down(wide)


def test_network_is_refused_with_the_operator_when_that_has_operators_of_its_own() -> None:
    with pytest.raises(Untraceable, match="Conditional has cond in its forward"):
        trace(Conditional().eval(), (InputShape("FP32", (5,)),))


class OfFixedSize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), 5)  # a number in the trace, where x.shape[0] would be a variable


def test_network_is_refused_when_its_trace_holds_for_the_example_alone() -> None:
    with pytest.raises(Untraceable, match="axis 0 of the input x only works at 2"):
        trace(OfFixedSize(), (InputShape("FP32", (5,)),))


def test_units_are_in_other_groups_when_they_have_more_inputs() -> None:
    module = built(partial(Chain, repeated_in_part, (3, 8), (12, 6)))
    groups = network_of(trace(module, (IMAGE,))).groups
    assert [(one.name, len(one.units)) for one in groups] == [("one", 4), ("one", 4), ("two", 6)]
    assert [{len(unit) for unit in one.places["two.weight", 1]} for one in groups[:2]] == [{2}, {1}]


# --- residual streams


class Mixer(nn.Module):
    """What is added to the stream was mixed along the tokens alone, so its channels are the
    stream's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(12, 8), nn.Linear(5, 7), nn.Linear(7, 5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        mixed = self.down(functional.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return self.head((x + mixed).mean(1))


def test_heads_are_no_residual_stream_when_queries_are_turned() -> None:
    scope = case("rotary attention").network.in_scope(residual=False)
    assert [group.name for group in scope] == ["qkv", "up"]


def test_stream_is_residual_when_what_is_added_has_its_channels() -> None:
    groups = network_of(trace(built(Mixer), (TOKENS,))).groups
    assert {group.name: group.is_residual for group in groups} == {"stem": True, "up": False}


# --- the comparison with zeros


class Outputs(nn.Module):
    """Gives these for any input."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, _x: torch.Tensor) -> Any:
        return self.given


def compared(got: Any, want: Any, tolerance: float = 1e-4) -> str:
    return difference(Outputs(got), [want], [torch.zeros(1)], tolerance)


def logits(n: int = 40) -> torch.Tensor:
    return torch.randn(2, n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(torch.full((2, 4), -1e4), id="a few masked ones"),
        pytest.param(torch.full((2, 4000), -1e4), id="mostly masked ones"),
        pytest.param(torch.full((2, 400), -torch.inf), id="infinite ones"),
        pytest.param(logits(400) - 1e4, id="mostly masked ones that tell of what is behind"),
    ],
)
def test_difference_is_told_when_large_values_are_among_the_outputs(beside: torch.Tensor) -> None:
    want = torch.cat([logits(), beside], 1)
    assert compared(want.clone(), want) == ""
    assert compared(torch.cat([logits() * 1.01, beside], 1), want).startswith("an output differs")


@pytest.mark.parametrize(
    "want",
    [
        pytest.param(logits(), id="logits"),
        pytest.param(logits() * 1e6, id="huge logits"),
        pytest.param(torch.cat([logits(), logits(1) * 1e6], 1), id="one huge among logits"),
        pytest.param(logits().exp() ** 9, id="many magnitudes"),
        pytest.param(torch.relu(logits()), id="zeros"),
        pytest.param(torch.full((2, 3), 7.0), id="a constant"),
        pytest.param(torch.zeros(2, 3), id="nothing but zeros"),
        pytest.param(torch.zeros(0, 3), id="no outputs"),
    ],
)
def test_difference_is_none_when_sums_come_in_another_order(want: torch.Tensor) -> None:
    assert compared(want * (1 + 1e-6) + 1e-8, want) == ""


def test_difference_is_none_when_one_of_two_numbers_is_small_by_cancellation() -> None:
    want = torch.tensor([[0.01], [-20.0]])
    assert compared(want + 2e-5, want) == ""


def test_difference_is_none_when_a_few_cancel() -> None:
    boxes = torch.linspace(0, 640, 80_000).view(2, -1)
    want = torch.cat([logits(400_000) * 1e-5, boxes], 1)
    assert compared(torch.cat([logits(400_000) * 1e-5, boxes + 3e-5], 1), want) == ""


@pytest.mark.parametrize(
    ("same", "other", "reason"),
    [
        pytest.param(None, 1.0, "an output is 1.0, not None", id="nothing"),
        pytest.param(3.0, 2.0, "an output is 2.0, not 3.0", id="a number"),
        pytest.param(
            torch.tensor([True, False]), torch.tensor([True, True]), "1 of 2 values", id="truths"
        ),
        pytest.param(torch.arange(3), torch.tensor([0, 1, 3]), "1 of 3 values", id="classes"),
    ],
)
def test_difference_is_told_when_outputs_are(same: Any, other: Any, reason: str) -> None:
    assert compared(same, same) == ""
    assert reason in compared(other, same)


def test_not_a_number_always_differs() -> None:
    want = torch.full((2, 3), torch.nan)
    assert "differs by nan" in compared(want, want)


def test_half_precision_is_compared_by_its_own_rounding() -> None:
    def half() -> nn.Module:
        layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), head(32)]
        return built(lambda: nn.Sequential(*layers)).half()

    inputs = (InputShape("FP16", (3, 8, 8)),)
    network = network_of(trace(half(), inputs))
    gone = halved(network.groups)
    given = [one.half() for one in inputs_of((IMAGE,), 2)]
    wanted = masked_outputs(half(), network, gone, given)
    assert wanted[0].dtype == torch.float16
    pruned = operate(half(), operations_of(network, gone, MODULE, inputs))
    assert tolerance_of(network) == pytest.approx(8 * 2**-10)
    assert difference(pruned, wanted, given, tolerance_of(network)) == ""
    none = masked_outputs(half(), network, [], given)
    assert "differs by" in difference(pruned, none, given, tolerance_of(network))


# --- what is refused


@pytest.mark.parametrize("multiple", [0, -8])
def test_multiple_is_refused_with_the_bound_when_it_is_below_one(multiple: int) -> None:
    network = case("channels shuffled").network
    scores = [np.zeros(len(group.units)) for group in network.groups]
    with pytest.raises(ValueError, match=f"multiple: got {multiple}, want 1 or more"):
        Candidates(network.groups, scores, Costs(network, network.groups), multiple)


def test_allocation_is_refused_when_there_are_no_groups() -> None:
    network = case("channels shuffled").network
    with pytest.raises(ValueError, match="groups: got none"):
        allocate("uniform", Candidates([], [], Costs(network, []), 8), 0.5, lambda *_: 0.0)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.other(x))


def test_narrowing_is_refused_with_the_parameter_when_all_is_a_residual_stream() -> None:
    module = built(Stream)
    network = network_of(trace(module, (TOKENS,)))
    samples = Samples(inputs_of((TOKENS,), 4), None, seed=0)
    narrowing = Narrowing("l2", "uniform", 1, False, samples, (TOKENS,), lambda _: {})
    with pytest.raises(ValueError, match="residual: got false, want true"):
        narrowing.check(module, network, 0.5)
