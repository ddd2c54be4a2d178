"""Supernet: one set of weights that all networks of a space share.

A network's tensor is the leading part of the supernet's tensor of that name, and the middle of its
kernel. A network is run with views of them as its weights, so that training it trains the
supernet, and equals the stand-alone network that is extracted. Networks are normalized by their
batches while they train, and have statistics only once extracted and recalibrated.

Cai et al. 2020, "Once-for-All", without their transformation of kernels and the shrinking by
phases; trained by the sandwich rule of Yu et al. 2020, "BigNAS", section 3.1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from optimizer.architecture.networks import BlockFactory, build
from optimizer.architecture.space import ArchitectureSpace, Choices, Decision
from optimizer.training.batches import Batch
from optimizer.training.distillation import Distillation, Kind, Mixture, difference
from optimizer.training.teacher import Answering

_KERNEL_AXES = (2, 3)


class Supernet(nn.Module):
    """Weights for every network of the space, drawn by torch's generator."""

    def __init__(
        self, space: ArchitectureSpace, blocks: Mapping[str, BlockFactory] | None = None
    ) -> None:
        """Raises ValueError where the largest networks can't be built."""
        super().__init__()
        self.space = space
        self._blocks = blocks
        shared: dict[str, torch.Tensor] = {}
        for choices in self.largest():
            for name, weight in build(space.plan(choices), blocks).named_parameters():
                known = shared.get(name)
                if known is None or weight.numel() > known.numel():
                    shared[name] = weight
        self.weights = nn.ParameterDict(
            {_key(name): nn.Parameter(weight.detach()) for name, weight in shared.items()}
        )

    def largest(self) -> list[Choices]:
        """Networks that have among them every weight at its largest."""
        return _largest(self.space)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the largest network gives, extracted and not yet recalibrated."""
        output: torch.Tensor = self.extract(self.space.extreme(is_largest=True))(*inputs)
        return output

    def built(self, choices: Choices) -> nn.Module:
        """The network with weights of its own, as drawn."""
        return build(self.space.plan(choices), self._blocks)

    def network(self, choices: Choices) -> "SharedNetwork":
        """The network with the supernet's weights, to be trained."""
        return SharedNetwork(self, choices)

    def extract(self, choices: Choices) -> nn.Module:
        """The network with a copy of its weights, in eval mode; statistics of batch normalization
        are as new."""
        module = self.built(choices)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                weight.copy_(self.part(name, weight.shape))
        return module.eval()

    def begin_with(self, network: nn.Module) -> None:
        """Takes over the weights of a network of the space. The others stay."""
        with torch.no_grad():
            for name, weight in network.named_parameters():
                self.part(name, weight.shape).copy_(weight)

    def part(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The view of the weight of that name that a network with one of `shape` has."""
        weight: torch.Tensor = self.weights[_key(name)]
        for axis, (size, whole) in enumerate(zip(shape, weight.shape, strict=True)):
            if size > whole:
                raise ValueError(f"{name}: got {list(shape)}, want at most {list(weight.shape)}")
            start = (whole - size) // 2 if axis in _KERNEL_AXES else 0
            weight = weight.narrow(axis, start, size)
        return weight


class SharedNetwork(nn.Module):
    """A network of the supernet's. It owns no weights; gradients go to the supernet's."""

    def __init__(self, supernet: Supernet, choices: Choices) -> None:
        super().__init__()
        with torch.device("meta"):
            skeleton = supernet.built(choices).train()
        # Kept out of the submodules: their parameters are no parameters of this one.
        self._call = _Call(skeleton, supernet)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._call(inputs)


@dataclass(frozen=True, eq=False)
class _Call:
    skeleton: nn.Module
    supernet: Supernet

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        weights = {
            name: self.supernet.part(name, weight.shape)
            for name, weight in self.skeleton.named_parameters()
        }
        # What is written to them is of this batch, and nobody's business.
        buffers = {
            name: torch.zeros_like(buffer, device=inputs[0].device)
            for name, buffer in self.skeleton.named_buffers()
        }
        output: torch.Tensor = functional_call(self.skeleton, (weights, buffers), tuple(inputs))
        return output


class Sandwich:
    """The loss of a batch by the sandwich rule: the largest network learns as `taught` says, the
    smallest and `n_random` others learn the largest one's answers to the same batch (in-place
    distillation). Networks are drawn by torch's generator."""

    def __init__(
        self, taught: Distillation, answer: Answering, kind: Kind = "classes", n_random: int = 2
    ) -> None:
        """`answer` runs a network on a batch; `kind` says what answers differ by."""
        if n_random < 0:
            raise ValueError(f"n_random: got {n_random}, want 0 or more")
        self._taught = taught
        self._answer = answer
        self._inplace = Mixture(kind=kind, temperature=1.0)
        self._n_random = n_random

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._taught.parameters()

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum over the networks. `module` is the supernet."""
        assert isinstance(module, Supernet)
        space = module.space
        largest = self._answer(module.network(space.extreme(is_largest=True)), batch, ())
        total = self._taught.of(largest, batch)
        wanted = largest.output.detach()
        others = [space.extreme(is_largest=False), *(_drawn(space) for _ in range(self._n_random))]
        for choices in others:
            given = self._answer(module.network(choices), batch, ())
            total = total + difference(self._inplace, given.output, wanted)
        return total


def _largest(space: ArchitectureSpace) -> list[Choices]:
    """The last option of each decision, for each option of those that aren't sizes."""
    most = max((len(one.options) for one in space.decisions if _is_kind(one)), default=1)
    return [space.completed(partial(_last, space, nth)) for nth in range(most)]


def _last(space: ArchitectureSpace, nth: int, index: int, _earlier: Sequence[int]) -> int:
    """The largest option of the decision; of kinds the nth, or the last where there are fewer."""
    last = len(space.decisions[index].options) - 1
    return min(nth, last) if _is_kind(space.decisions[index]) else last


def _is_kind(decision: Decision) -> bool:
    """Whether the options are no sizes, but names of blocks."""
    return any(isinstance(option, str) for option in decision.options)


def _drawn(space: ArchitectureSpace) -> Choices:
    return space.completed(
        lambda index, _: int(torch.randint(len(space.decisions[index].options), ()))
    )


def _key(name: str) -> str:
    """The name as a parameter dictionary takes it."""
    return name.replace(".", "/")
