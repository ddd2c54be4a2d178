"""Surgeon: what a unit's going costs when the units that stay make up for it.

Optimal Brain Surgeon (Hassibi and Stork 1993, "Second Order Derivatives for Network Pruning"), of
whole units and layer by layer, as Kurtic et al. 2023 have it ("ZipLM: Inference-Aware Structured
Pruning of Language Models", section 3.1): units that many others tell of may go, however large
their weights. Departures: a unit may be read by several layers, whose errors are added; errors of
different outputs, and so of different layers, are weighted by how far they move the network's
outputs; and nothing is updated here: making up for what went is recovery's matter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from optimizer.layer_rows import (
    Layer,
    has_rows,
    input_rows,
    n_features,
    output_rows,
    positions,
    sampled,
    weight_matrix,
)
from optimizer.pruning.groups import Group
from optimizer.pruning.outputs import first_output

MAX_FEATURES = 4608
"""A layer with more isn't looked at: its inverse would take minutes."""
_MAX_ROWS = 32_768
_RIDGE = 1e-3
"""Of the mean square of a layer's inputs."""
_STEPS = 192
"""In which the units of a group go, at most."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads a group's units: `features[unit]` are its rows' places of each."""

    name: str
    layer: Layer
    features: Sequence[NDArray[np.int64]]
    """[unit], as many as it has there."""


@dataclass(eq=False)
class _Seen:
    """Of a layer on samples: E[x x'] [features, features], and by output the sum over positions of
    the mean squared slope of the network's outputs [outputs]."""

    moment: torch.Tensor
    slopes: torch.Tensor
    n_rows: int = 0
    n_samples: int = 0
    """Of the slopes: none where no gradient came."""

    @classmethod
    def of(cls, layer: Layer) -> "_Seen":
        """Nothing yet."""
        n, n_outputs = n_features(layer), len(layer.weight)
        double = torch.float64
        return cls(torch.zeros(n, n, dtype=double), torch.zeros(n_outputs, dtype=double))


def readers_of(module: nn.Module, group: Group) -> list[Reader]:
    """The layers that read the group's units, of those that the algebra covers."""
    parts = dict(module.named_modules())
    found = []
    for (name, axis), units in group.places.items():
        path = name.removesuffix(".weight")
        layer = parts.get(path)
        if axis != 1 or path == name or layer is None or not has_rows(layer):
            continue
        if n_features(layer) <= MAX_FEATURES:
            window = layer.weight[0, 0].numel()
            features = [(unit[:, None] * window + np.arange(window)).ravel() for unit in units]
            found.append(Reader(path, layer, features))
    return found


def costs_of_going(
    module: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Sequence[torch.Tensor]],
    seed: int,
) -> list[NDArray[np.float64]]:
    """[unit] of each group: what the squared error of the network's outputs grows by when it goes
    after those with lower scores, to second order; infinite for groups that no layer reads which
    the algebra covers, or that no gradient of the outputs comes to. `module` is in eval mode."""
    readers = [readers_of(module, group) for group in groups]
    if not any(readers):
        return [np.full(len(group.units), np.inf) for group in groups]
    layers = {one.name: one.layer for some in readers for one in some}
    seen = _look(module, layers, batches, seed)
    readers = [[one for one in some if seen[one.name].n_samples] for some in readers]
    return [
        _eliminated([(_Left.of(seen[one.name], one)) for one in some], len(group.units))
        if some
        else np.full(len(group.units), np.inf)
        for group, some in zip(groups, readers, strict=True)
    ]


@dataclass(eq=False)
class _Left:
    """A layer without some units: the inverse of its moment, and its weights, over the features
    that are left; those that went are zero rows."""

    inverse: torch.Tensor
    weights: torch.Tensor
    features: torch.Tensor
    """[unit, features], -1 behind those of units that have fewer than others."""

    @classmethod
    def of(cls, seen: _Seen, reader: Reader) -> "_Left":
        moment = seen.moment / max(1, seen.n_rows)
        ridge = _RIDGE * float(moment.diagonal().mean()) + 1e-12
        inverse = torch.linalg.inv(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
        slopes = (seen.slopes / max(1, seen.n_samples)).sqrt()
        features = [torch.from_numpy(unit) for unit in reader.features]
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=-1)
        return cls(inverse, weight_matrix(reader.layer) * slopes, padded)

    def costs(self, units: torch.Tensor) -> torch.Tensor:
        """[unit]: the error that each, alone, would leave: tr W' (H⁻¹)⁻¹ W over its features."""
        padded = self.features[units]
        n_features = (padded >= 0).sum(1)
        costs = torch.zeros(len(units), dtype=self.weights.dtype)
        for n in sorted(set(n_features.tolist())):
            there = n_features == n
            costs[there] = self._costs(padded[there, :n])
        return costs

    def _costs(self, index: torch.Tensor) -> torch.Tensor:
        """[unit] of units with as many features: `index` [unit, features]."""
        blocks = self.inverse[index[:, :, None], index[:, None, :]]
        weights = self.weights[index]
        solved: torch.Tensor = torch.linalg.solve(blocks, weights)
        return (weights * solved).sum((1, 2))

    def drop(self, units: torch.Tensor) -> None:
        index = self.features[units]
        index = index[index >= 0]
        column = self.inverse[:, index]
        factor = torch.linalg.solve(column[index], column.T)  # [gone, features]
        self.weights -= factor.T @ self.weights[index]
        self.inverse -= column @ factor
        self.weights[index] = 0.0


def _eliminated(layers: Sequence[_Left], n_units: int) -> NDArray[np.float64]:
    costs = np.zeros(n_units)
    left = torch.arange(n_units)
    at_once = -(-n_units // _STEPS)
    reached = 0.0
    while len(left):
        each = torch.stack([layer.costs(left) for layer in layers]).sum(0).clamp(min=0)
        going = each.argsort(stable=True)[: min(at_once, len(left))]
        for unit, cost in zip(left[going].tolist(), each[going].tolist(), strict=True):
            reached = max(reached, cost)  # what goes later isn't cheaper but by rounding
            costs[unit] = reached
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[going] = False
        if stays.any():
            for layer in layers:
                layer.drop(left[going])
        left = left[stays]
    return costs


def _look(
    module: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Sequence[torch.Tensor]],
    seed: int,
) -> dict[str, _Seen]:
    """By name of each layer, with slopes along random signs of the outputs: their squares' mean is
    the sum of those along each output (Hutchinson 1990)."""
    seen = {name: _Seen.of(layer) for name, layer in layers.items()}
    n_each = max(1, _MAX_ROWS // max(1, sum(len(batch[0]) for batch in batches)))
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), _watched(module, layers, seen, n_each, generator):
        for batch in batches:
            outputs = first_output(module(*batch))
            if not outputs.requires_grad:
                continue
            signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2.0 - 1
            weights = [layer.weight for layer in layers.values()]
            torch.autograd.backward((outputs * signs).sum(), inputs=weights)
            for weight in weights:
                weight.grad = None
    return seen


@contextmanager
def _watched(
    module: nn.Module,
    layers: Mapping[str, Layer],
    seen: Mapping[str, _Seen],
    n_each: int,
    generator: torch.Generator,
) -> Iterator[None]:
    """Adds to `seen` in the runs within, by up to `n_each` positions of each sample."""
    needed = {name: layer.weight.requires_grad for name, layer in layers.items()}
    hooks = []
    for name, layer in layers.items():
        keep = _keeper(layer, seen[name], n_each, generator)
        hooks.append(layer.register_forward_hook(_call(keep)))
        around = module.get_submodule(name.rpartition(".")[0])
        if isinstance(around, nn.MultiheadAttention):
            hooks.append(around.register_forward_hook(_projection(keep), with_kwargs=True))
    try:
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        yield
    finally:
        for one in hooks:
            one.remove()
        for name, layer in layers.items():
            layer.weight.requires_grad_(needed[name])


_Turn = Callable[[torch.Tensor], torch.Tensor]
_Keep = Callable[[torch.Tensor, torch.Tensor, _Turn], None]
"""Takes what a layer was given and gave, and what puts the samples of both first."""


def _keeper(layer: Layer, seen: _Seen, n_each: int, generator: torch.Generator) -> _Keep:
    """Adds to `seen`, and nothing where gradients are off."""

    def keep(given: torch.Tensor, made: torch.Tensor, turn: _Turn) -> None:
        if not made.requires_grad:
            return
        rows = input_rows(layer, turn(given.detach()))
        rows = sampled(rows, positions(len(rows), rows.shape[1], n_each, generator))
        seen.moment += (rows.T @ rows).double()
        seen.n_rows += len(rows)
        made.register_hook(lambda slope: add(turn(slope)))  # type: ignore[no-untyped-call]

    def add(slope: torch.Tensor) -> None:
        seen.slopes += output_rows(layer, slope).double().square().sum((0, 1))
        seen.n_samples += len(slope)

    return keep


def _call(keep: _Keep) -> Callable[..., None]:
    def hook(_layer: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        keep(given[0], made, lambda features: features)

    return hook


def _projection(keep: _Keep) -> Callable[..., None]:
    """For attention's output projection, whose weight it takes without calling it: what goes into
    that is what the same attention gives with the unit matrix in its place."""

    def hook(part: nn.Module, given: Any, named: Any, made: Any) -> None:
        assert isinstance(part, nn.MultiheadAttention)
        if not made[0].requires_grad:
            return  # also the run below, which comes here too
        unit = {"out_proj.weight": torch.eye(part.embed_dim, dtype=made[0].dtype)}
        if part.out_proj.bias is not None:
            unit["out_proj.bias"] = torch.zeros_like(part.out_proj.bias)
        with torch.no_grad():
            mixed, _ = torch.func.functional_call(part, unit, given, named)
        keep(mixed, made[0], partial(_samples_first, is_first=part.batch_first))

    return hook


def _samples_first(features: torch.Tensor, is_first: bool) -> torch.Tensor:
    """[n, length, features]; without `n` it's one sample."""
    if features.ndim < 3:
        return features[None]
    return features if is_first else features.transpose(0, 1)
