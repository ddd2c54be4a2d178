"""Masks: single weights set to zero, and kept there by whoever trains afterwards.

A masked layer is named in the plan; its zeros are the mask, so that no second file can disagree
with the weights. Dense kernels compute with zeros as with anything else: which targets gain is
`why_no_speed`'s to say.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from serve.machine import Machine

MASKS = "masks"
"""The key under which a plan's operations name the masked layers."""
PATTERNS = ("layer", "global", "2:4")
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
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


def mask(module: nn.Module, pattern: str, sparsity: float) -> tuple[str, ...]:
    """Set the smallest weights to zero, in place; returns the names of the masked layers.

    `layer` takes the share `sparsity` of every layer, `global` of all together, `2:4` two of
    every four neighbours along a filter (Mishra et al. 2021, "Accelerating Sparse Deep Neural
    Networks", section 3), whatever `sparsity` is; a filter whose length is no multiple of four
    stays dense. Raises ValueError.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: got {pattern!r}, want one of {', '.join(PATTERNS)}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity:g}, want more than 0 and less than 1")
    weights = maskable(module)
    if pattern == "2:4":
        weights = {name: one for name, one in weights.items() if one[0].numel() % 4 == 0}
    if not weights:
        raise ValueError(f"pattern: {pattern} fits no layer of the model")
    kept = _kept([weight.detach() for weight in weights.values()], pattern, sparsity)
    for name, keep in zip(weights, kept, strict=True):
        if not keep.any():
            raise ValueError(
                f"sparsity: got {sparsity:g}, which leaves nothing of {name}, want less, or "
                "pattern layer"
            )
    with torch.no_grad():
        for weight, keep in zip(weights.values(), kept, strict=True):
            weight.mul_(keep)
    return tuple(weights)


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


def _kept(weights: Sequence[torch.Tensor], pattern: str, sparsity: float) -> list[torch.Tensor]:
    if pattern == "2:4":
        return [_two_of_four(weight) for weight in weights]
    if pattern == "layer":
        return [_largest(weight.abs().flatten(), sparsity).view_as(weight) for weight in weights]
    together = torch.cat([weight.abs().flatten() for weight in weights])
    parts = torch.split(_largest(together, sparsity), [weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def _largest(magnitudes: torch.Tensor, sparsity: float) -> torch.Tensor:
    """[n]: whether one is among the largest, of which the share 1 - sparsity stays."""
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[magnitudes.argsort(stable=True)[: round(sparsity * len(magnitudes))]] = False
    return keep


def _two_of_four(weight: torch.Tensor) -> torch.Tensor:
    fours = weight.flatten(1).abs().reshape(-1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool)
    largest = fours.argsort(dim=1, descending=True, stable=True)[:, :2]
    return keep.scatter_(1, largest, value=True).view_as(weight)
