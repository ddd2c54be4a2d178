"""What a unit's going costs when others make up for it, against least squares done by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.pruning.graph import InputShape, trace
from optimizer.pruning.groups import Network, network_of
from optimizer.pruning.importance import Samples, score
from optimizer.pruning.surgeon import costs_of_going, readers_of

N = 512


def perceptron(n_hidden: int = 6, n_outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, n_hidden), nn.Tanh(), nn.Linear(n_hidden, n_outputs)).eval()


def network_at(module: nn.Module, *shape: int) -> Network:
    return network_of(trace(module, [InputShape("FP32", shape)]))


def inputs(*shape: int) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randn(N, *shape)


def left_without(hidden: np.ndarray, weights: np.ndarray, gone: list[int]) -> float:
    """Mean squared error, summed over outputs, of the best fit by the units that stay."""
    stay = [one for one in range(hidden.shape[1]) if one not in gone]
    wanted = hidden @ weights
    best, *_ = np.linalg.lstsq(hidden[:, stay], wanted, rcond=None)
    return float(np.square(hidden[:, stay] @ best - wanted).sum(axis=1).mean())


def test_costs_add_up_to_the_error_of_the_best_fit_without_those_units() -> None:
    module, x = perceptron(), inputs(4)
    (group,) = network_at(module, 4).groups
    (costs,) = costs_of_going(module, [group], [(part,) for part in x.split(64)], 0)
    with torch.no_grad():
        hidden = module[:2](x).double().numpy()
        weights = module[2].weight.detach().double().T.numpy()
    order = np.argsort(costs, kind="stable")
    first = [left_without(hidden, weights, [one]) for one in range(6)]
    assert order[0] == int(np.argmin(first))
    for n in range(1, 6):
        wanted = left_without(hidden, weights, order[:n].tolist())
        assert costs[order[:n]].sum() == pytest.approx(wanted, rel=0.1)


def test_a_unit_that_another_equals_costs_nothing_however_large_its_weights() -> None:
    module = perceptron()
    with torch.no_grad():
        module[0].weight[1], module[0].bias[1] = module[0].weight[4], module[0].bias[4]
        module[2].weight[:, 1] *= 10
    groups = network_at(module, 4).groups
    samples = Samples((inputs(4),), None, 0)
    (costs,), (norms,) = (score(name, module, groups, samples) for name in ("obs", "l2"))
    twins = {1, 4}
    assert int(np.argmin(costs)) in twins
    assert int(np.argmax(norms)) == 1
    assert costs.min() < 1e-4 * max(costs[1], costs[4]), "one of the two has to stay"


def test_outputs_that_move_the_network_less_count_less() -> None:
    module = nn.Sequential(*perceptron(), nn.Linear(3, 2, bias=False)).eval()
    group = next(one for one in network_at(module, 4).groups if len(one.units) == 6)
    batch = [(inputs(4),)]
    (before,) = costs_of_going(module, [group], batch, 0)
    with torch.no_grad():
        module[3].weight *= 3
    (after,) = costs_of_going(module, [group], batch, 0)
    np.testing.assert_allclose(after, 9 * before, rtol=1e-4)


def test_a_convolutions_channels_go_with_their_windows() -> None:
    torch.manual_seed(5)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.Flatten(),
        nn.Linear(3 * 4, 2),
    ).eval()  # fmt: skip
    network = network_at(module, 2, 4, 4)
    group = next(one for one in network.groups if len(one.units) == 4)
    (reader,) = readers_of(module, group)
    assert reader.name == "2"
    assert [one.tolist() for one in reader.features] == [
        list(range(9 * unit, 9 * unit + 9)) for unit in range(4)
    ]
    with torch.no_grad():
        module[2].weight[:, 2] = 0
    (costs,) = costs_of_going(module, [group], [(inputs(2, 4, 4),)], 0)
    assert int(np.argmin(costs)) == 2
    assert costs[2] == pytest.approx(0, abs=1e-9)
    assert (np.delete(costs, 2) > 0).all()


def test_weights_and_gradients_stay_as_they_are() -> None:
    module = perceptron()
    module[2].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    costs_of_going(module, network_at(module, 4).groups, [(inputs(4),)], 0)
    assert all(torch.equal(before[name], one) for name, one in module.state_dict().items())
    assert [one.grad for one in module.parameters()] == [None] * 4
    assert not module[2].weight.requires_grad


def test_a_group_that_no_such_layer_reads_stays() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(),
                           nn.Linear(16, 2)).eval()  # fmt: skip
    network = network_at(module, 2, 4, 4)
    (group,) = network.groups
    assert [one.name for one in readers_of(module, group)] == ["3"]
    (costs,) = costs_of_going(module, [group], [(inputs(2, 4, 4),)], 0)
    assert np.isfinite(costs).all()
    lone = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Conv1d(4, 2, 1), nn.Flatten()).eval()
    (costs,) = costs_of_going(lone, network_at(lone, 2, 4).groups, [(inputs(2, 4),)], 0)
    assert np.isinf(costs).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_cost_what_the_best_fit_without_them_leaves(batch_first: bool) -> None:
    class Attending(nn.Module):
        """Its output is attention's, position by position."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 3, batch_first=batch_first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x if batch_first else x.transpose(0, 1)
            x = self.attention(x, x, x, need_weights=False)[0]
            return x if batch_first else x.transpose(0, 1)

    torch.manual_seed(3)
    module = Attending().eval()
    with torch.no_grad():
        module.attention.in_proj_bias.normal_()
        module.attention.out_proj.weight[:, 2:4] *= 0.1
    x = inputs(5, 6)
    (group,) = network_at(module, 5, 6).groups
    (costs,) = costs_of_going(module, [group], [(part,) for part in x.split(64)], 0)
    mixed = mixed_by_heads(module.attention, x).reshape(-1, 6).numpy()
    weights = module.attention.out_proj.weight.detach().double().T.numpy()
    first = int(np.argmin(costs))
    assert first == 1
    wanted = 5 * left_without(mixed, weights, [2, 3])  # of each sample, over its positions
    assert costs[first] == pytest.approx(wanted, rel=0.1)


def mixed_by_heads(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """What the output projection is given, by hand: [n, length, features], float64."""
    with torch.no_grad():
        projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        heads = projected.double().unflatten(2, (3, attention.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        shares = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(3)
        return (shares @ value).transpose(1, 2).flatten(2)


def test_units_that_are_read_twice_are_scored_with_those_that_are_read_once() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.up(x))
            return self.down(torch.cat([hidden, hidden[:, :3] ** 2], 1))

    torch.manual_seed(3)
    module, x = Doubled().eval(), inputs(4)
    groups = network_at(module, 4).groups
    found = costs_of_going(module, groups, [(part,) for part in x.split(64)], 0)
    assert sum(len(group.units) for group in groups) == 6
    with torch.no_grad():
        hidden = torch.tanh(module.up(x))
        read = torch.cat([hidden, hidden[:, :3] ** 2], 1).double().numpy()
        weights = module.down.weight.detach().double().T.numpy()
    for group, costs in zip(groups, found, strict=True):
        (reader,) = readers_of(module, group)
        first = int(np.argmin(costs))
        wanted = left_without(read, weights, reader.features[first].tolist())
        assert costs[first] == pytest.approx(wanted, rel=0.1)


def test_a_reader_whose_weight_is_taken_without_a_call_says_nothing() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(torch.tanh(self.up(x)), self.down.weight)

    torch.manual_seed(3)
    module = Functional().eval()
    (costs,) = costs_of_going(module, network_at(module, 4).groups, [(inputs(4),)], 0)
    assert np.isinf(costs).all()
