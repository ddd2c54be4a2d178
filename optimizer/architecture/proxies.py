"""Proxies: what an untrained network says of how well it will learn, in one pass.

They screen: what they rate low is left out before anything is trained. Neither is accurate enough
to choose by (White et al. 2021, "How Powerful are Performance Predictors in NAS?").
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_JITTER = 1e-5
"""Added to the kernel's diagonal: equal codes make it singular."""


def naswot(network: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """log |K|, where K counts for each two samples the units that are alike on or off (Mellor et
    al. 2021, "Neural Architecture Search without Training", equation 2). More is better: the
    samples are told apart. Units are those of ReLUs. Batch normalization uses the batch's
    statistics. -inf for a network without ReLUs; at least two samples must be given."""
    n_samples = len(inputs[0])
    kernel = torch.zeros((n_samples, n_samples), dtype=torch.float64)

    def note(_part: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        code = (output > 0).flatten(1).to(torch.float32)
        alike = code @ code.T + (1 - code) @ (1 - code).T
        kernel.add_(alike.to(torch.float64))

    hooks = [
        part.register_forward_hook(note) for part in network.modules() if isinstance(part, nn.ReLU)
    ]
    if not hooks:
        return float("-inf")
    try:
        network.train()
        with torch.no_grad():
            network(*inputs)
    finally:
        network.eval()
        for hook in hooks:
            hook.remove()
    # Relative to the number of units, so that the jitter means the same in small and large ones.
    n_units = float(kernel[0, 0])
    scaled = kernel / n_units + _JITTER * torch.eye(n_samples, dtype=torch.float64)
    sign, logarithm = torch.linalg.slogdet(scaled)
    grown = n_samples * torch.log(torch.tensor(n_units, dtype=torch.float64))
    return float(logarithm + grown) if sign > 0 else float("-inf")


def synflow(network: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """log of Σ |θ ∂R/∂θ|, R the sum of outputs for an input of ones, weights by their magnitude
    (Tanaka et al. 2020, "SynFlow", equation 3; as a score of networks: Abdelfattah et al. 2021).
    Batch normalization is passed over. For networks of images: inputs are taken for their shape."""
    signs = {name: weight.detach().sign() for name, weight in network.named_parameters()}
    hooks = [
        part.register_forward_hook(lambda _part, given, _output: given[0])
        for part in network.modules()
        if isinstance(part, _BatchNorm)
    ]
    try:
        network.eval()
        with torch.no_grad():
            for weight in network.parameters():
                weight.abs_()
        network.zero_grad()
        ones = [torch.ones((1, *given.shape[1:])) for given in inputs]
        # In 64 bits: products of many layers overflow 32.
        network.double()
        total = network(*(one.double() for one in ones)).sum()
        total.backward()
        score = sum(
            float((weight.detach() * weight.grad).abs().sum())
            for weight in network.parameters()
            if weight.grad is not None
        )
    finally:
        network.float()
        network.zero_grad()
        with torch.no_grad():
            for name, weight in network.named_parameters():
                weight.mul_(signs[name])
        for hook in hooks:
            hook.remove()
    return float(torch.log(torch.tensor(score, dtype=torch.float64)))


PROXIES: Mapping[str, Callable[[nn.Module, Sequence[torch.Tensor]], float]] = {
    "naswot": naswot,
    "synflow": synflow,
}
