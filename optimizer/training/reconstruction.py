"""Reconstruction: layers of a changed network solved, so that they give what the whole one's give.

A layer that reads fewer inputs than before can make up for those that went, as far as what is left
tells of them: its weights become the least squares fit of the whole network's outputs there to
what the changed network feeds it (He et al. 2017, "Channel Pruning for Accelerating Very Deep
Neural Networks", section 3.1, step ii, with the inputs of section 3.2). The last layer of a chain
that stands where one layer stood is fitted likewise. In the order in which they run, each sees
what those before it were solved to. There are no steps and no rate. Departure: weights are held to
what they were by a small ridge, so that inputs that hardly vary don't blow them up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
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
from optimizer.training.batches import Batch
from optimizer.training.stops import Run, Unreached, stopping

MAX_FEATURES = 4608
"""A layer with more is left as it is: to solve it would take minutes."""
_MAX_ROWS = 65_536
"""That a layer is fitted to, over all samples and positions."""
_MAX_HELD = 1024**3
"""Bytes that runs which wait at layers hold, of either network."""
_RIDGE = 1e-3
"""Of the mean square of a layer's inputs."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer to solve, and the part of the whole network whose outputs it is to give."""

    name: str
    layer: Layer
    whole: Layer


def changed_pairs(module: nn.Module, whole: nn.Module, example: Batch) -> list[Pair]:
    """The layers of `module`, which was made of `whole`, in the order in which they run, that read
    less than those of the same name there, and have as many outputs: fewer features, or as the last
    of a chain. Those that run more than once or share their weights aren't among them, nor those
    with weights that are exactly zero, which somebody wants to stay so."""
    theirs = {name: part for name, part in whole.named_modules() if has_rows(part)}
    found = {}
    for name, target in theirs.items():
        try:
            part = module.get_submodule(name)
        except AttributeError:
            continue
        layer = _last(part)
        if layer is None or len(layer.weight) != len(target.weight):
            continue
        is_changed = layer is not part or n_features(layer) < n_features(target)
        is_masked = bool((layer.weight == 0).any())
        if is_changed and not is_masked and n_features(layer) <= MAX_FEATURES:
            found[name] = Pair(name, layer, target)
    runs = _runs(module, {name: pair.layer for name, pair in found.items()}, example)
    known = _runs(whole, {name: pair.whole for name, pair in found.items()}, example)
    once = [name for name in dict.fromkeys(runs) if runs.count(name) == known.count(name) == 1]
    return [found[name] for name in once]


def reconstruct(
    module: nn.Module, whole: nn.Module, batches: Sequence[Batch], seed: int
) -> dict[str, tuple[float, float]]:
    """Solve the changed layers of `module`; both are in eval mode, and `whole` stays as it is.

    A layer without a bias gets none. Returns by name the squared error of the layer's outputs
    before and after, in shares of their squares; a layer that wouldn't get better stays.
    """
    pairs = changed_pairs(module, whole, batches[0])
    if not pairs:
        return {}
    n_each = max(1, _MAX_ROWS // sum(len(batch.rows) for batch in batches))
    errors = {}
    with (
        stopping(module, [one.layer for one in pairs], batches, "inputs", _MAX_HELD) as runs,
        stopping(whole, [one.whole for one in pairs], batches, "output", _MAX_HELD) as known,
    ):
        for pair in pairs:
            fit = _fitted(pair, zip(batches, runs, known, strict=True), n_each, seed)
            if fit is not None:
                errors[pair.name] = fit.solve()
    return errors


def _fitted(
    pair: Pair, runs: Iterable[tuple[Batch, Run, Run]], n_each: int, seed: int
) -> "_Fit | None":
    """The layer's sums over all batches; None where one of them doesn't come to it, or finds other
    positions there than in the whole network."""
    generator = torch.Generator().manual_seed(seed)
    fit = _Fit(pair.layer)
    for batch, own, whole in runs:
        try:
            inputs, outputs = own.reach(pair.layer), whole.reach(pair.whole)
        except Unreached:
            return None
        rows, wanted = input_rows(pair.layer, inputs), output_rows(pair.whole, outputs)
        if rows.shape[:2] != wanted.shape[:2]:
            return None
        fit.add(*_drawn(batch, rows, wanted, n_each, generator))
    return fit


def _drawn(
    batch: Batch, rows: torch.Tensor, wanted: torch.Tensor, n_each: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """[drawn, features] of both, at the same positions at random: `n_each` for each sample, of
    texts as many on average, and none of their padding."""
    given, target = batch.unpadded(rows), batch.unpadded(wanted)
    if given is rows:
        chosen = positions(len(rows), rows.shape[1], n_each, generator)
        return sampled(rows, chosen), sampled(wanted, chosen)
    order = torch.randperm(len(given), generator=generator)[: n_each * len(rows)]
    return given[order], target[order]


class _Fit:
    """Sums over rows from which a layer's weights, and its bias as the last of them, are solved."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        n = n_features(layer) + (layer.bias is not None)
        self._moment = torch.zeros(n, n, dtype=torch.float64)
        self._product = torch.zeros(n, len(layer.weight), dtype=torch.float64)
        self._power = 0.0

    def add(self, rows: torch.Tensor, wanted: torch.Tensor) -> None:
        """[n, features] and [n, outputs]."""
        rows, wanted = rows.double(), wanted.double()
        if self._layer.bias is not None:
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        self._moment += rows.T @ rows
        self._product += rows.T @ wanted
        self._power += float(wanted.square().sum())

    def solve(self) -> tuple[float, float]:
        """Sets the layer; the errors before and after."""
        layer = self._layer
        before = weight_matrix(layer)
        if layer.bias is not None:
            before = torch.cat([before, layer.bias.detach().double()[None]])
        power = self._moment.diagonal().mean()
        if not power > 0:  # nothing reaches it, or what is no number
            return self._error(before), self._error(before)
        ridge = _RIDGE * power * torch.eye(len(before)).double()
        after = torch.linalg.solve(self._moment + ridge, self._product + ridge @ before)
        errors = self._error(before), self._error(after)
        if not errors[1] < errors[0]:
            return errors[0], errors[0]
        n = n_features(layer)
        with torch.no_grad():
            layer.weight.copy_(after[:n].T.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(after[n])
        return errors

    def _error(self, weights: torch.Tensor) -> float:
        square = (weights * (self._moment @ weights)).sum()
        left = float(square - 2 * (weights * self._product).sum()) + self._power
        return max(left, 0.0) / max(self._power, 1e-30)


def _last(part: nn.Module) -> Layer | None:
    """The part, or the last of a chain; None for what can't be solved."""
    while isinstance(part, nn.Sequential) and len(part):
        part = part[-1]
    return part if has_rows(part) else None


def _runs(module: nn.Module, layers: dict[str, Layer], example: Batch) -> list[str]:
    """The names of the layers, each time that one runs; several names of one layer all count."""
    found: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: found.append(name))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            module(*example.inputs)
    finally:
        for one in hooks:
            one.remove()
    return found
