"""Inheriting: a supernet that begins as a network that somebody has trained.

The network has the layers of one of the space's largest, in the same order, whatever their names
are; that they compute the same is seen from their answers. Smaller networks have the leading
channels, so the units of every group are sorted by importance first, which changes no answer (Cai
et al. 2020, "Once-for-All", section 3.3; there by the L1 norms of the following layer, here by
those of all weights that a unit has a part in).
"""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import nn

from optimizer.architecture.options import InitialSpec
from optimizer.architecture.supernet import Supernet
from optimizer.pruning.graph import InputShape, Untraceable, named_tensors, trace
from optimizer.pruning.groups import Group, network_of
from optimizer.pruning.importance import Samples, score
from optimizer.spec import TorchKind
from optimizer.torch_source import load_source, load_weights

_CRITERION = "l1"
_TOLERANCE = 1e-3
"""Of the largest answer, by which answers may differ."""


class Unlike(ValueError):
    """The network isn't one of the space's largest; the message says where it differs."""


def load_initial(initial: InitialSpec | str, model: TorchKind) -> nn.Module:
    """The network that the supernet is to begin as, in eval mode; `model` for "model". Raises
    Unlike where the factory fails or the weights don't fit it."""
    if not isinstance(initial, InitialSpec):
        return load_source(model)
    where = f"architecture.initial: {initial.factory}"
    try:
        module = initial.factory.call()
    except Exception as error:
        raise Unlike(f"{where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise Unlike(f"{where} returned {type(module).__name__}, want a torch.nn.Module")
    problems = load_weights(module, initial.weights)
    if problems:
        raise Unlike(f"{where} doesn't fit {initial.weights}: {'; '.join(problems)}")
    return module.eval()


def initial_digest(initial: InitialSpec | str) -> str:
    """What distinguishes it; the model is in a variant's id already."""
    if not isinstance(initial, InitialSpec):
        return initial
    digest = hashlib.sha256(str(initial.factory).encode() + initial.factory.source_bytes())
    digest.update(initial.weights.read_bytes())
    return digest.hexdigest()


def largest_like(
    supernet: Supernet, initial: nn.Module, example: Sequence[torch.Tensor]
) -> nn.Module:
    """That of the space's largest networks which `initial` is, with its weights and statistics;
    eval mode. Raises Unlike for the tensor in which the nearest one differs, or where answers to
    `example` (batch first) do."""
    reasons = []
    for choices in supernet.largest():
        network = supernet.built(choices).eval()
        reason = _filled(network, initial) or _differs(network, initial, example)
        if reason is None:
            return network
        reasons.append(reason)
    raise Unlike(f"architecture.initial is no largest network of the space: {reasons[-1]}")


def inherit(
    supernet: Supernet,
    initial: nn.Module,
    inputs: Sequence[InputShape],
    example: Sequence[torch.Tensor],
) -> str:
    """Lets the supernet begin as `initial`; returns what was done in words. Raises Unlike."""
    network = largest_like(supernet, initial, example)
    try:
        n_sorted = _sort(network, inputs, example)
    except Untraceable as error:
        supernet.begin_with(network)
        return f"begins as a trained network; channels aren't sorted by importance: {error}"
    reason = _differs(network, initial, example)
    if reason is not None:
        raise Unlike(f"architecture.initial: sorting its channels changed its answers: {reason}")
    supernet.begin_with(network)
    return f"begins as a trained network, {n_sorted} groups of channels sorted by importance"


def _filled(network: nn.Module, initial: nn.Module) -> str | None:
    """Why the tensors can't be taken over in their order, or None once they are."""
    wanted, given = network.state_dict(), initial.state_dict()
    for (name, own), (other, tensor) in zip_longest(
        wanted.items(), given.items(), fillvalue=("none", None)
    ):
        if own is None or tensor is None or own.shape != tensor.shape:
            return f"its {other} is {_shape(tensor)}, where the space's {name} is {_shape(own)}"
    network.load_state_dict(dict(zip(wanted, given.values(), strict=True)))
    return None


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))


def _differs(network: nn.Module, initial: nn.Module, example: Sequence[torch.Tensor]) -> str | None:
    with torch.inference_mode():
        own, wanted = network(*example), initial(*example)
    if isinstance(wanted, dict):
        (wanted,) = wanted.values()
    if isinstance(wanted, tuple | list):
        (wanted,) = wanted
    if own.shape != wanted.shape:
        return f"it gives {list(wanted.shape)}, the space's {list(own.shape)}"
    off = float((own - wanted).abs().max())
    allowed = _TOLERANCE * max(1.0, float(wanted.abs().max()))
    if off <= allowed:
        return None
    return f"answers differ by {off:.2g}, want at most {allowed:.2g}: the same layers, all of them"


def _sort(network: nn.Module, inputs: Sequence[InputShape], example: Sequence[torch.Tensor]) -> int:
    """Puts each group's units in the order of their importance, the most important first; returns
    how many groups that were."""
    groups = [one for one in network_of(trace(network, inputs)).groups if _is_even(one)]
    samples = Samples(tuple(example), None, seed=0)
    tensors = named_tensors(network)
    for group, scores in zip(groups, score(_CRITERION, network, groups, samples), strict=True):
        order = np.argsort(-scores, kind="stable")
        for (name, axis), ids in group.places.items():
            there = torch.from_numpy(np.concatenate(ids))
            taken = torch.from_numpy(np.concatenate([ids[unit] for unit in order]))
            with torch.no_grad():
                moved = tensors[name].index_select(axis, taken)
                tensors[name].index_copy_(axis, there, moved)
    return len(groups)


def _is_even(group: Group) -> bool:
    """Whether all units have as many indices in each place, so that they can change places."""
    return all(len({len(one) for one in ids}) == 1 for ids in group.places.values())
