"""Masks: single weights set to zero, and kept there by whoever trains afterwards.

A masked layer is named in the plan; its zeros are the mask, so that no second file can disagree
with the weights. A schedule in the plan says that zeros are still to come, from whoever trains:
which they are is decided here all the same. Dense kernels compute with zeros as with anything
else: which targets gain is `why_no_speed`'s to say.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from serve.machine import Machine

MASKS = "masks"
"""The key under which a plan's operations name the masked layers."""
GRADUAL = "gradual"
"""The key of {pattern, sparsity} that those layers come to while they are trained, where they are
given without new zeros."""
TWO_OF_FOUR = "2:4"
_SHARES = ("global", "layer")
PATTERNS = (TWO_OF_FOUR, *_SHARES)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OF_FOUR = 0.5
_SPARSE_RUNTIMES = ("onnxruntime-gpu",)
"""What may run 2:4 kernels, by TensorRT, on a GPU that has them."""


def why_no_speed(machine: Machine) -> str:
    """Why zeros among the weights make nothing faster on the target; empty where they may."""
    if any(name in machine.runtimes for name in _SPARSE_RUNTIMES):
        return ""
    return (
        "no engine for this target has kernels for sparse weights (ONNX Runtime, OpenVINO and "
        "torch compute on CPUs with zeros as with any number), so zeros make nothing faster"
    )


def maskable(module: nn.Module) -> dict[str, torch.Tensor]:
    """Layer → weight, of convolutions and linear layers, each tied one once."""
    layers = {name: part for name, part in module.named_modules() if isinstance(part, _LAYERS)}
    found: dict[str, torch.Tensor] = {}
    for name, part in layers.items():
        if not any(part.weight is weight for weight in found.values()):
            found[name] = part.weight
    return found


def patterns_for(module: nn.Module) -> tuple[str, ...]:
    """Those that fit a layer of the module at least."""
    fits = any(map(_is_in_fours, maskable(module).values()))
    return (TWO_OF_FOUR, *_SHARES) if fits else _SHARES


def mask(module: nn.Module, pattern: str, sparsity: float) -> tuple[str, ...]:
    """Set the smallest weights to zero, in place; returns the names of the masked layers.

    `layer` takes the share `sparsity` of every layer, `global` of all together, `2:4` two of
    every four neighbouring input channels, at each place of a kernel by itself (Mishra et al. 2021,
    "Accelerating Sparse Deep Neural Networks", section 3; the TensorRT developer guide, "Sparsity",
    for the axis), where `sparsity` has to be 0.5; a layer whose filters read no multiple of four
    channels stays dense. Raises ValueError.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: got {pattern!r}, want one of {', '.join(PATTERNS)}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity:g}, want more than 0 and less than 1")
    if pattern == TWO_OF_FOUR and sparsity != _OF_FOUR:
        raise ValueError(f"sparsity: got {sparsity:g}, want {_OF_FOUR:g} for {pattern}")
    weights = maskable(module)
    if pattern == TWO_OF_FOUR:
        weights = {name: one for name, one in weights.items() if _is_in_fours(one)}
    if not weights:
        raise ValueError(f"pattern: {pattern} fits no layer of the model")
    kept = largest({name: one.detach().abs() for name, one in weights.items()}, pattern, sparsity)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(kept[name])
    return tuple(weights)


def largest(
    magnitudes: Mapping[str, torch.Tensor], pattern: str, sparsity: float
) -> dict[str, torch.Tensor]:
    """Layer → which of its weights [out, ...] stay, all but the share `sparsity` with the least
    magnitudes; of equal ones the first go.

    For `2:4` those that go are among the two least of every four: with a `sparsity` below 0.5, some
    of them. Raises ValueError where it is more, for a layer without fours, and where nothing stays
    of a layer.
    """
    if pattern == TWO_OF_FOUR:
        _check_fours(magnitudes, sparsity)
    kept = dict(zip(magnitudes, _kept([*magnitudes.values()], pattern, sparsity), strict=True))
    for name, keep in kept.items():
        if not keep.any():
            raise ValueError(
                f"sparsity: got {sparsity:g}, which leaves nothing of {name}, want less, or "
                "pattern layer"
            )
    return kept


def compressed_bytes(module: nn.Module, names: Sequence[str]) -> tuple[int, int]:
    """(bytes with the masked layers' weights as a bit each and the values that aren't zero, bytes
    as they are), of the whole state."""
    state = module.state_dict()
    dense = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    saved = 0
    for name in names:
        tensor = state[f"{name}.weight" if name else "weight"]
        n_kept = int((tensor != 0).sum())
        packed = math.ceil(tensor.numel() / 8) + n_kept * tensor.element_size()
        saved += tensor.numel() * tensor.element_size() - packed
    return dense - saved, dense


def _is_in_fours(weight: torch.Tensor) -> bool:
    """Whether the input channels of a weight [out, in, ...] can be taken in fours."""
    return weight.shape[1] % 4 == 0


def _check_fours(magnitudes: Mapping[str, torch.Tensor], sparsity: float) -> None:
    if sparsity > _OF_FOUR:
        raise ValueError(f"sparsity: got {sparsity:g}, want at most {_OF_FOUR:g} for {TWO_OF_FOUR}")
    for name, one in magnitudes.items():
        if not _is_in_fours(one):
            raise ValueError(
                f"{name}: got {one.shape[1]} input channels, want a multiple of 4 for {TWO_OF_FOUR}"
            )


def _kept(magnitudes: Sequence[torch.Tensor], pattern: str, sparsity: float) -> list[torch.Tensor]:
    if pattern == TWO_OF_FOUR:
        magnitudes = [_with_two_of_four_safe(one) for one in magnitudes]
    if pattern != "global":
        return [_without_least(one.flatten(), sparsity).view_as(one) for one in magnitudes]
    together = torch.cat([one.flatten() for one in magnitudes])
    parts = torch.split(_without_least(together, sparsity), [one.numel() for one in magnitudes])
    return [part.view_as(one) for part, one in zip(parts, magnitudes, strict=True)]


def _without_least(magnitudes: torch.Tensor, sparsity: float) -> torch.Tensor:
    """[n]: whether one is among the largest, of which the share 1 - sparsity stays."""
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[magnitudes.argsort(stable=True)[: round(sparsity * len(magnitudes))]] = False
    return keep


def _with_two_of_four_safe(magnitudes: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] with the two largest of every four input channels as infinite."""
    last = magnitudes.movedim(1, -1)
    fours = last.reshape(-1, 4)
    safe = fours.argsort(dim=1, descending=True, stable=True)[:, :2]
    return fours.scatter(1, safe, math.inf).view(last.shape).movedim(-1, 1)
