"""Runs that wait at layers, against runs to the end."""

import numpy as np
import pytest
import torch
from greenlet import greenlet
from torch import nn

from optimizer.training.batches import Batch
from optimizer.training.stops import Unreached, stopping

MUCH = 1024**2


def batches(n: int = 3) -> list[Batch]:
    torch.manual_seed(0)
    return [Batch(np.arange(4), (torch.randn(4, 6),), None) for _ in range(n)]


class Branches(nn.Module):
    """Writes into what a layer gave, and runs one layer only where the first input is positive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.rare = (nn.Linear(6, 6) for _ in range(3))

    n_runs = 0
    """Of all, on the class: what a module itself remembers keeps its runs from waiting."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).n_runs += 1
        x = self.first(x).relu_()
        x = self.second(x).relu_()
        return self.rare(x) if bool(x[0, 0] > 0) else x


@pytest.fixture(params=[MUCH, 0], ids=["waiting", "anew"])
def max_bytes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_a_layer_that_is_changed_while_runs_wait_before_it_runs_changed(max_bytes: int) -> None:
    module = Branches().eval()
    with stopping(module, [module.first, module.second], batches(), "inputs", max_bytes) as runs:
        for batch, run in zip(batches(), runs, strict=True):
            assert torch.equal(run.reach(module.first), batch.inputs[0])
        with torch.no_grad():
            module.first.weight.zero_()
            module.first.bias.fill_(2.0)
        for run in runs:
            assert torch.equal(run.reach(module.second), torch.full((4, 6), 2.0))


def test_outputs_are_what_the_layer_gave_though_they_are_written_into_later(
    max_bytes: int,
) -> None:
    module = Branches().eval()
    (batch,) = batches(1)
    wanted = module.first(batch.inputs[0]).detach()
    later = module.second(wanted.relu()).detach()
    layers = [module.first, module.second]
    with stopping(module, layers, [batch], "output", max_bytes) as (run,):
        assert torch.equal(run.reach(module.second), later)
        assert torch.equal(run.reach(module.first), wanted)
    assert bool((wanted < 0).any())


@pytest.mark.parametrize(
    ("max_bytes", "n_waiting"), [(95, 0), (200, 2), (MUCH, 3)], ids=["none", "two", "all"]
)
def test_as_many_wait_as_there_is_memory_for_and_the_others_run_once_a_layer(
    max_bytes: int, n_waiting: int
) -> None:
    """What is alive at the second layer is its input, 96 bytes."""
    module = Branches().eval()
    layers = [module.first, module.second]
    with stopping(module, layers, batches(), "inputs", max_bytes) as runs:
        Branches.n_runs = 0
        for layer in layers:
            for run in runs:
                run.reach(layer)
    assert Branches.n_runs == n_waiting + 2 * (3 - n_waiting)


def test_a_run_that_ends_without_the_layer_says_so(max_bytes: int) -> None:
    module = Branches().eval()
    with torch.no_grad():
        module.second.weight.zero_()
        module.second.bias.fill_(-1.0)
    with stopping(module, [module.rare], batches(), "inputs", max_bytes) as runs:
        for run in runs:
            with pytest.raises(Unreached):
                run.reach(module.rare)


class Remembering(nn.Module):
    """Adds what it has put aside: as an attribute, in a list, or in a buffer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.where, self.aside, self.several = where, torch.zeros(()), list[torch.Tensor]()
        self.register_buffer("kept", torch.zeros(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "attribute":
            self.aside = x
        elif self.where == "list":
            self.several.append(x)
        else:
            self.kept.copy_(x)
        y = self.first(x)
        held = {"attribute": self.aside, "list": (self.several or [x])[-1], "buffer": self.kept}
        return self.second(y + held[self.where])  # type: ignore[no-any-return]


@pytest.mark.parametrize("where", ["attribute", "list", "buffer"])
def test_runs_of_a_module_that_remembers_dont_take_each_others_memory(
    where: str, max_bytes: int
) -> None:
    module = Remembering(where).eval()
    layers = [module.first, module.second]
    with stopping(module, layers, batches(), "inputs", max_bytes) as runs:
        for run in runs:
            run.reach(module.first)
        for batch, run in zip(batches(), runs, strict=True):
            (x,) = batch.inputs
            assert torch.equal(run.reach(module.second), module.first(x) + x)


class Grading(nn.Module):
    """Runs its layer in a mode of torch that it sets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.layer(x)  # type: ignore[no-any-return]


def test_modes_that_a_module_sets_dont_leak() -> None:
    module = Grading().eval()
    with stopping(module, [module.layer], batches(), "output", MUCH) as runs:
        for run in runs:
            run.reach(module.layer)
            assert not torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_what_the_module_raises_comes_out_and_leaves_no_hooks(max_bytes: int) -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    bad = [*batches(1), Batch(np.arange(4), (torch.randn(4, 5),), None)]
    with stopping(module, [module[2]], bad, "inputs", max_bytes) as (good, wrong):
        good.reach(module[2])
        with pytest.raises(RuntimeError, match="shapes"):
            wrong.reach(module[2])
    assert not module[2]._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_other_greenlets_of_the_process_arent_taken_for_runs() -> None:
    module = Branches().eval()
    seen = []
    with stopping(module, [module.first], batches(1), "inputs", MUCH):
        other = greenlet(lambda: seen.append(module(torch.zeros(1, 6)).shape))
        other.switch()
        assert other.dead
    assert seen == [torch.Size([1, 6])]
