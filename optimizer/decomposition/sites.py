"""Sites: the layers of a module that a chain can take the place of, and why others can't.

A module is traced by a run with hooks, and by one with other modules in the layers' places, since
a layer whose attributes are read past the call can't be replaced. It chooses no form and no rank.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimizer.decomposition.forms import (
    Geometry,
    Layer,
    convolution_geometry,
    linear_geometry,
)

_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules that read their layers' weights without running the layers."""


@dataclass(frozen=True, eq=False)
class Site:
    """A layer that runs, by its name."""

    name: str
    layer: Layer
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class Sites:
    """Those that can be replaced in the module's order, and layer → why another can't."""

    found: tuple[Site, ...]
    refused: Mapping[str, str]

    @property
    def convolutions(self) -> tuple[Site, ...]:
        return tuple(site for site in self.found if not site.geometry.is_matrix)

    @property
    def matrices(self) -> tuple[Site, ...]:
        """Linear layers and 1x1 convolutions."""
        return tuple(site for site in self.found if site.geometry.is_matrix)


def sites_of(module: nn.Module, example: Sequence[torch.Tensor]) -> Sites:
    """Look for sites in a module in eval mode, by runs on `example` (batch first).

    The module is left as it was. Raises what its own run raises.
    """
    layers = {name: part for name, part in module.named_modules() if _is_layer(part)}
    sizes = _sizes(module, layers, example)
    reasons = _refusals(module, layers, sizes)
    left = {name: layer for name, layer in layers.items() if name not in reasons}
    reasons |= _bound(module, left, example)
    found = [
        Site(name, layer, _geometry(layer, *sizes[name]))
        for name, layer in layers.items()
        if name not in reasons
    ]
    return Sites(tuple(found), reasons)


def _is_layer(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _refusals(
    module: nn.Module, layers: Mapping[str, nn.Module], sizes: Mapping[str, Any]
) -> dict[str, str]:
    n_names = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    n_uses = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
    reading = _inside(module, _READS_WEIGHTS)
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        weight = layer.weight
        if not name:
            reasons[name] = "it is the whole model"
        elif type(layer) not in (nn.Linear, nn.Conv2d):
            reasons[name] = f"it is a {type(layer).__name__}"
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            reasons[name] = f"it is grouped ({layer.groups} groups), so its kernels are small"
        elif name in reading:
            reasons[name] = "its weights are read by the attention around it"
        elif n_names[id(layer)] > 1 or n_uses[id(weight)] > 1:
            reasons[name] = "its weights are shared with another layer"
        elif layer._forward_hooks or layer._forward_pre_hooks:
            reasons[name] = "it has hooks of its own"
        elif name not in sizes:
            reasons[name] = "it doesn't run as a layer"
    return reasons


def _inside(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[str]:
    """Names of all modules within one of those kinds."""
    roots = [name for name, part in module.named_modules() if isinstance(part, kinds)]
    return {
        name
        for name, _ in module.named_modules()
        if any(not root or name.startswith(f"{root}.") for root in roots)
    }


def _sizes(
    module: nn.Module, layers: Mapping[str, nn.Module], example: Sequence[torch.Tensor]
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Layer → the shapes of its input and output, of its last run."""
    sizes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def hook(name: str) -> Any:
        def note(_layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
                sizes[name] = (inputs[0].shape, output.shape)

        return note

    # The module is one's own, so its own hooks stay out of the way of those checked above.
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            module(*example)
    finally:
        for one in hooks:
            one.remove()
    return sizes


class _Watch(nn.Module):
    """Takes a layer's place in a run; what is read of the layer past the call is noted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.held = layer
        self.is_called = False
        self.attributes: list[str] = []

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.is_called = True
        return self.held(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        held = vars(self)["_modules"]["held"]
        if name == "held":
            return held
        found = getattr(held, name)
        self.attributes.append(name)
        return found

    @property
    def reason(self) -> str | None:
        """Why the layer can't be replaced, if so."""
        if self.attributes:
            return f"the model reads its {self.attributes[0]} past the call"
        return None if self.is_called else "the model calls it past its name"


def _bound(
    module: nn.Module, layers: Mapping[str, nn.Module], example: Sequence[torch.Tensor]
) -> dict[str, str]:
    """Those of the layers that the module needs for more than a call, with the reason."""
    try:
        return _watched(module, layers, example)
    except Exception as error:  # noqa: BLE001  the forward is the user's code
        if len(layers) == 1:
            failed = f"the model fails without it ({type(error).__name__}: {error})"
            return dict.fromkeys(layers, failed)
    found: dict[str, str] = {}
    for name, layer in layers.items():
        found |= _bound(module, {name: layer}, example)
    return found


def _watched(
    module: nn.Module, layers: Mapping[str, nn.Module], example: Sequence[torch.Tensor]
) -> dict[str, str]:
    watches = {name: _Watch(layer).train(layer.training) for name, layer in layers.items()}
    try:
        for name, watch in watches.items():
            module.set_submodule(name, watch)
        with torch.inference_mode():
            module(*example)
    finally:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
    return {name: reason for name, watch in watches.items() if (reason := watch.reason)}


def _geometry(layer: nn.Module, into: torch.Size, out: torch.Size) -> Geometry:
    if isinstance(layer, nn.Conv2d):
        return convolution_geometry(layer, (into[-2], into[-1]), (out[-2], out[-1]))
    assert isinstance(layer, nn.Linear)
    return linear_geometry(layer, into[1:-1].numel())
