"""Layers that are solved after a change, against least squares done by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.space import defaults
from optimizer.techniques.recovery import Recovery
from optimizer.torch_variant import load_torch
from optimizer.training.batches import Batch
from optimizer.training.reconstruction import changed_pairs, reconstruct
from tests.optimizer.synthetic import Narrow
from tests.optimizer.test_recovery_technique import context
from tests.optimizer.torch_bench import TorchBench, make_torch_bench


def batches(*shape: int, n: int = 3) -> list[Batch]:
    torch.manual_seed(0)
    return [Batch(np.arange(shape[0]), (torch.randn(*shape),), None) for _ in range(n)]


def perceptron(n_hidden: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, n_hidden), nn.ReLU(), nn.Linear(n_hidden, 5)).eval()


def without(module: nn.Sequential, gone: int) -> nn.Sequential:
    """The perceptron without one of its hidden units."""
    stay = [one for one in range(module[0].out_features) if one != gone]
    made = perceptron(len(stay))
    with torch.no_grad():
        made[0].weight.copy_(module[0].weight[stay])
        made[0].bias.copy_(module[0].bias[stay])
        made[2].weight.copy_(module[2].weight[:, stay])
        made[2].bias.copy_(module[2].bias)
    return made


def test_a_unit_that_another_equals_is_made_up_for() -> None:
    whole = perceptron(8)
    with torch.no_grad():
        whole[0].weight[3], whole[0].bias[3] = whole[0].weight[5], whole[0].bias[5]
    module = without(whole, 3)
    seen = batches(64, 6)
    wanted = whole(seen[0].inputs[0]).detach()
    errors = reconstruct(module, whole, seen, 0)
    assert list(errors) == ["2"]
    assert errors["2"][1] < 1e-5 < errors["2"][0]
    torch.testing.assert_close(module(seen[0].inputs[0]).detach(), wanted, atol=5e-3, rtol=0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_convolutions_weights_are_the_least_squares_of_its_windows(has_bias: bool) -> None:
    torch.manual_seed(2)
    how = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": has_bias}
    whole = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, **how)).eval()
    module = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, **how)).eval()
    with torch.no_grad():
        module[0].weight.copy_(whole[0].weight[:2])
        module[0].bias.copy_(whole[0].bias[:2])
        module[2].weight.copy_(whole[2].weight[:, :2])
    seen = batches(16, 2, 5, 5)
    errors = reconstruct(module, whole, seen, 0)
    rows, wanted = [], []
    with torch.no_grad():
        for batch in seen:
            (x,) = batch.inputs
            maps = np.pad(module[:2](x).numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
            given = whole(x).numpy()
            for n, i, j in np.ndindex(16, 3, 3):
                window = maps[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].ravel()
                rows.append([*window, 1.0] if has_bias else window)
                wanted.append(given[n, :, i, j])
    inputs, outputs = np.array(rows, np.float64), np.array(wanted, np.float64)
    best, *_ = np.linalg.lstsq(inputs, outputs, rcond=None)
    left = np.square(inputs @ best - outputs).sum() / np.square(outputs).sum()
    assert left <= errors["2"][1] + 1e-9
    assert errors["2"][1] == pytest.approx(left, rel=0.05, abs=1e-4)
    with torch.no_grad():
        given = np.concatenate([module(one.inputs[0]).numpy() for one in seen])
    far = np.square(given.transpose(0, 2, 3, 1).reshape(-1, 4) - outputs).sum()
    assert far / np.square(outputs).sum() == pytest.approx(errors["2"][1], rel=1e-3)


def test_layers_are_solved_in_the_order_in_which_they_run_and_only_where_they_changed() -> None:
    whole = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    module = nn.Sequential(
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)),
        nn.Linear(3, 4),
        nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4)),
    )
    pairs = changed_pairs(module, whole, batches(2, 4)[0])
    assert [one.name for one in pairs] == ["2", "3"]
    assert pairs[1].layer is module[3][1]
    assert pairs[1].whole is whole[3]


def test_a_layer_with_zeros_or_two_runs_is_left_as_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(4, n), nn.Linear(n, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(self.first(self.again(self.first(x))))  # type: ignore[no-any-return]

    example = batches(2, 4)[0]
    assert changed_pairs(Twice(3), Twice(4), example) == []
    masked = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    with torch.no_grad():
        masked[1].weight[0, 0] = 0
    assert changed_pairs(masked, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), example) == []


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Linear(4, 4)], ids=["reads more", "reads as much"]
)
def test_a_layer_that_doesnt_read_less_is_left_as_it_is(layer: nn.Module) -> None:
    whole = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4))
    module = nn.Sequential(nn.Linear(5, layer.in_features), layer)
    assert changed_pairs(module, whole, batches(2, 5)[0]) == []


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_layer_that_nothing_or_no_number_reaches_is_left_as_it_is(value: float) -> None:
    whole = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        module[0].weight.fill_(value)
        module[0].bias.fill_(value)
    before = module[2].weight.detach().clone()
    errors = reconstruct(module.eval(), whole.eval(), batches(8, 4), 0)
    assert torch.equal(module[2].weight, before)
    assert errors["2"] == pytest.approx((1.0, 1.0) if value == 0 else (value, value), nan_ok=True)


def test_where_nothing_changed_nothing_is_solved() -> None:
    module, whole = perceptron(8), perceptron(8)
    assert reconstruct(module, whole, batches(32, 6), 0) == {}
    assert all(
        torch.equal(one, whole.state_dict()[name]) for name, one in module.state_dict().items()
    )


def test_whole_network_stays_as_it_is() -> None:
    whole = perceptron(8)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    reconstruct(without(whole, 0), whole, batches(32, 6), 0)
    assert all(torch.equal(before[name], one) for name, one in whole.state_dict().items())


def test_texts_are_fitted_without_their_padding() -> None:
    """Where padding holds something else, the fit is that of the same texts without it."""
    whole = perceptron(8)
    texts = torch.randn(24, 5, 6, generator=torch.Generator().manual_seed(1))
    kept = torch.arange(5)[None] < torch.arange(1, 25)[:, None] % 5 + 1
    padded = torch.where(kept[..., None], texts, 100.0)
    one, other, naive = (without(whole, 0) for _ in range(3))
    reconstruct(one, whole, [Batch(np.arange(24), (padded,), None, kept)], 0)
    reconstruct(other, whole, [Batch(np.arange(int(kept.sum())), (texts[kept],), None)], 0)
    reconstruct(naive, whole, [Batch(np.arange(24), (padded,), None)], 0)
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name])
    assert any(
        not torch.allclose(weight, one.state_dict()[name])
        for name, weight in naive.state_dict().items()
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    return make_torch_bench(tmp_path_factory.mktemp("study"))


def test_recovery_solves_what_reads_less_where_samples_are_given(
    bench: TorchBench, tmp_path: Path
) -> None:
    narrow = Narrow().apply(bench.torch, {"width": 0.5}, bench.context, _made(tmp_path / "narrow"))
    before = load_torch(narrow).state_dict()
    changed = {}
    for n in (0, 200):
        at = context(bench, reconstruction_samples=n)
        parameters = defaults(Recovery().space(narrow, at), effort="recalibrate")
        made = Recovery().apply(narrow, parameters, at, _made(tmp_path / str(n)))
        after = load_torch(made).state_dict()
        notes = [one for one in made.notes if one.startswith("1 layers that read less were solved")]
        assert len(notes) == (n > 0)
        changed[n] = {name for name, one in after.items() if not torch.equal(one, before[name])}
    weights = {name for name in changed[200] - changed[0] if name.endswith(("weight", "bias"))}
    (solved,) = {name.rpartition(".")[0] for name in weights}
    assert before[f"{solved}.weight"].shape[1] < before[f"{solved}.weight"].shape[0]
    assert not any(name.endswith(("weight", "bias")) for name in changed[0])


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
