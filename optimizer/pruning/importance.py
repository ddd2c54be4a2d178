"""Importance: how much each unit of a group matters, by criteria from the literature.

Scores are aggregated over all tensors that a unit has a part in, since it goes from all of them.
What is done with scores is for `optimizer.pruning.allocation`.
"""

# ruff: noqa: ARG001  every criterion takes what the table passes

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from optimizer.pruning.graph import named_tensors
from optimizer.pruning.groups import Group, Place
from optimizer.pruning.outputs import first_output
from optimizer.pruning.scales import norm_scales
from optimizer.pruning.surgeon import costs_of_going, readers_of

Scores = NDArray[np.float64]
"""[unit] of a group, in its order: at least 0, the least important first to go."""
_TINY = 1e-12
_BATCH_SIZE = 32
_N_SIGNS = 4
"""Draws of random signs for each batch."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What criteria need beside the weights. Labels are int64 [n], or None."""

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    seed: int
    has_classes: bool = True
    """Whether the columns of the first output are classes, and labels say which."""


Tensors = Mapping[str, torch.Tensor]
Criterion = Callable[[nn.Module, Sequence[Group], Samples], list[Scores]]


def score(
    criterion: str, module: nn.Module, groups: Sequence[Group], samples: Samples
) -> list[Scores]:
    """The scores of each group's units, comparable between groups. Raises ValueError for an
    unknown criterion, or one that says nothing about any group; a group about which alone it says
    nothing gets infinite scores."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, want one of {', '.join(CRITERIA)}")
    found = CRITERIA[criterion](module, groups, samples)
    if groups and not any(np.isfinite(scores).any() for scores in found):
        raise ValueError(f"criterion: {criterion} says nothing about any layer of this model")
    return found


def magnitude(power: int) -> Criterion:
    """Norms of the weights (Li et al. 2017, "Pruning Filters for Efficient ConvNets", for L1).
    Every tensor has the same say: its norms are divided by their mean."""

    def scores(module: nn.Module, groups: Sequence[Group], samples: Samples) -> list[Scores]:
        tensors = named_tensors(module)
        return [
            _mean(
                [
                    _normed(_norms(tensors, group, place, power))
                    for place in _weights(tensors, group)
                ]
            )
            for group in groups
        ]

    return scores


def batch_norm_scale(module: nn.Module, groups: Sequence[Group], samples: Samples) -> list[Scores]:
    """|γ| (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming"),
    averaged over coupled layers. It says nothing about groups without batch normalization."""
    scales = norm_scales(module)
    tensors = named_tensors(module)
    found = []
    for group in groups:
        places = [place for place in group.places if place[0] in scales]
        if places:
            found.append(_mean([_norms(tensors, group, place, 1) for place in places]))
        else:
            found.append(np.full(len(group.units), np.inf))
    return found


def lamp(module: nn.Module, groups: Sequence[Group], samples: Samples) -> list[Scores]:
    """The squared norm by the sum of those that aren't smaller (Lee et al. 2021, "Layer-adaptive
    Sparsity for the Magnitude-based Pruning", equation 4, for whole units)."""
    tensors = named_tensors(module)
    return [
        _mean([_lamp(_norms(tensors, group, place, 2) ** 2) for place in _weights(tensors, group)])
        for group in groups
    ]


def geometric_median(module: nn.Module, groups: Sequence[Group], samples: Samples) -> list[Scores]:
    """The sum of distances to the other filters (He et al. 2019, "Filter Pruning via Geometric
    Median", section 3.3): what is near all others can be replaced by them. Filters are what makes
    a unit, scales of a single weight left out, where there are others."""
    tensors = named_tensors(module)
    found = []
    for group in groups:
        parts = []
        for place in _filters(tensors, group):
            rows = _rows(tensors, group, place)
            distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
            parts.append(_normed(distances.sum(dim=1).numpy()))
        found.append(_mean(parts))
    return found


def taylor(module: nn.Module, groups: Sequence[Group], samples: Samples) -> list[Scores]:
    """First-order change of the loss when a unit goes (Molchanov et al. 2019, "Importance
    Estimation for Neural Network Pruning", equation 8, at the gate of section 3.2): (Σ gradient ·
    weight)² averaged over batches; over scale and shift where units are normalized by batch, else
    over the tensors that make the unit.

    The loss is the cross-entropy of the first output with the labels, or with the model's own
    answers where there are none. Of outputs that are no classes it is their sum with random signs,
    several times over: such squares add up to those along each output (Hutchinson 1990), where a
    squared norm wouldn't move with embeddings of unit length. Infinite where no gradient comes.
    """
    tensors = named_tensors(module)
    norms = {
        f"{name}.{part}"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for part in ("weight", "bias")
    }
    sums = [np.zeros(len(group.units)) for group in groups]
    n_losses = 0
    with _differentiable(module):
        for loss in _losses(module, samples):
            module.zero_grad(set_to_none=True)
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            n_losses += 1
            for index, group in enumerate(groups):
                sums[index] += _first_order(tensors, group, norms) ** 2
        module.zero_grad(set_to_none=True)
    return [total / max(1, n_losses) for total in sums]


def surgeon(module: nn.Module, groups: Sequence[Group], samples: Samples) -> list[Scores]:
    """What the squared error of the outputs grows by when the units that stay make up for it
    (Kurtic et al. 2023, "ZipLM"; `optimizer.pruning.surgeon`)."""
    batches = [one.inputs for one in _batches(samples)]
    return costs_of_going(module, groups, batches, samples.seed)


def chance(module: nn.Module, groups: Sequence[Group], samples: Samples) -> list[Scores]:
    """Uniform numbers, by the seed: a control."""
    rng = np.random.default_rng(samples.seed)
    return [rng.random(len(group.units)) for group in groups]


CRITERIA: Mapping[str, Criterion] = {
    "l2": magnitude(2),
    "l1": magnitude(1),
    "taylor": taylor,
    "bn_scale": batch_norm_scale,
    "lamp": lamp,
    "fpgm": geometric_median,
    "obs": surgeon,
    "random": chance,
}


def criteria_for(module: nn.Module, groups: Sequence[Group]) -> tuple[str, ...]:
    """Those that say something of one of the groups at least, but for the control."""
    silent = {"random"}
    scales = norm_scales(module)
    if not any(name in scales for group in groups for name, _ in group.places):
        silent.add("bn_scale")
    if not any(readers_of(module, group) for group in groups):
        silent.add("obs")
    return tuple(name for name in CRITERIA if name not in silent)


def _weights(tensors: Tensors, group: Group) -> list[Place]:
    """Places in tensors of two axes or more."""
    return [place for place in group.places if tensors[place[0]].ndim > 1]


def _norms(tensors: Tensors, group: Group, place: Place, power: int) -> Scores:
    """[unit]: the norm of all of a unit's elements in one tensor."""
    name, axis = place
    weight = tensors[name].detach().abs().double() ** power
    others = [one for one in range(weight.ndim) if one != axis]
    by_index = (weight.sum(dim=others) if others else weight).numpy()
    sums = np.array([by_index[indices].sum() for indices in group.places[place]])
    return np.asarray(sums ** (1.0 / power))


def _rows(tensors: Tensors, group: Group, place: Place) -> torch.Tensor:
    """[unit, elements]: each unit's weights in one tensor, shorter ones filled up with zeros."""
    weight = tensors[place[0]].detach().double().movedim(place[1], 0).flatten(1)
    rows = [weight[torch.from_numpy(indices)].flatten() for indices in group.places[place]]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _normed(scores: Scores) -> Scores:
    return np.asarray(scores / max(_TINY, float(scores.mean())))


def _mean(parts: Sequence[Scores]) -> Scores:
    return np.asarray(np.mean(parts, axis=0))


def _lamp(squares: Scores) -> Scores:
    order = np.argsort(squares, kind="stable")
    not_smaller = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = squares[order] / np.maximum(_TINY, not_smaller)
    return scores


def _filters(tensors: Tensors, group: Group) -> list[Place]:
    """The makers whose rows have several elements; all where none has."""
    wide = [
        (name, axis)
        for name, axis in group.makers
        if tensors[name].numel() > tensors[name].shape[axis]
    ]
    return wide or list(group.makers)


def _first_order(tensors: Tensors, group: Group, norms: Collection[str]) -> Scores:
    """[unit]: Σ gradient · weight over the tensors that make it; infinite where none has one."""
    # A normalized unit is γ·x̂ + β whatever its filter's scale: these two alone take it to zero.
    normalized = any(place[0] in norms for place in group.places)
    total, has_gradient = np.zeros(len(group.units)), False
    for place, indices in group.places.items():
        tensor = tensors[place[0]]
        makes = place[0] in norms if normalized else place in group.makers or tensor.ndim == 1
        if tensor.grad is not None and makes:
            has_gradient = True
            product = (tensor.grad * tensor.detach()).movedim(place[1], 0)
            by_index = product.reshape(len(product), -1).sum(dim=1).double().numpy()
            total += [by_index[one].sum() for one in indices]
    return total if has_gradient else np.full(len(group.units), np.inf)


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Gradients for all weights, frozen ones too, which are frozen again afterwards."""
    frozen = [
        one for one in module.parameters() if one.is_floating_point() and not one.requires_grad
    ]
    try:
        for one in frozen:
            one.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for one in frozen:
            one.requires_grad_(False)


def _batches(samples: Samples) -> list[Samples]:
    n = len(samples.inputs[0])
    return [
        replace(
            samples,
            inputs=tuple(one[start : start + _BATCH_SIZE] for one in samples.inputs),
            labels=None if samples.labels is None else samples.labels[start : start + _BATCH_SIZE],
        )
        for start in range(0, n, _BATCH_SIZE)
    ]


def _losses(module: nn.Module, samples: Samples) -> Iterator[torch.Tensor]:
    """Of each batch one, or several of random signs."""
    generator = torch.Generator().manual_seed(samples.seed)
    for batch in _batches(samples):
        outputs = first_output(module(*batch.inputs))
        if _are_logits(outputs, samples):
            labels = outputs.argmax(dim=1) if batch.labels is None else batch.labels
            yield nn.functional.cross_entropy(outputs, labels)
        else:
            for _ in range(_N_SIGNS):
                signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2.0 - 1
                yield (outputs * signs).sum()


def _are_logits(outputs: torch.Tensor, samples: Samples) -> bool:
    """Whether they are [n, class] of several classes, all of the labels among them."""
    if not samples.has_classes or outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    labels = samples.labels
    if labels is None:
        return True
    is_index = not labels.is_floating_point() and labels.ndim == 1
    return is_index and int(labels.min()) >= 0 and int(labels.max()) < outputs.shape[1]
