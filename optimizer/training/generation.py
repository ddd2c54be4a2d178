"""Generation: inputs that look to a network like its training data, from its batch-norm statistics.

For calibration where there is no data: what each batch normalization sees of them has the mean and
the deviation that it saw in training (Cai et al. 2020, "ZeroQ", section 3.1, equation 2; their code
also holds the inputs at mean 0 and deviation 1, which not every model takes). They are no pictures
of anything, and carry no labels. It knows no quantization.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

N_STEPS = 100
"""Of the optimizer, for each batch; the paper's code takes 500, and little changes after 100."""
_BATCH = 32
_LEARNING_RATE = 0.2
_SMALL = 1e-5


def can_generate(module: nn.Module) -> bool:
    """Whether it has batch normalization with statistics."""
    return any(_has_statistics(part) for part in module.modules())


def generate(
    module: nn.Module, shape: tuple[int, ...], n: int, seed: int, n_steps: int = N_STEPS
) -> NDArray[np.float32]:
    """[n, *shape] for a module with one input, which is left as it was. Equal seeds and numbers of
    threads give equal inputs. Raises ValueError without batch normalization."""
    norms = [part for part in module.modules() if _has_statistics(part)]
    if not norms:
        raise ValueError(
            "the model has no batch normalization, of whose statistics inputs are made"
        )
    generator = torch.Generator().manual_seed(seed)
    training = [part for part in module.modules() if part.training]
    gradients = [one for one in module.parameters() if one.requires_grad]
    try:
        module.eval().requires_grad_(False)
        batches = [
            _batch(module, norms, torch.randn((size, *shape), generator=generator), n_steps)
            for size in _sizes(n)
        ]
    finally:
        for one in gradients:
            one.requires_grad_(True)
        for part in training:
            part.training = True
    return np.concatenate(batches).astype(np.float32)


def _sizes(n: int) -> list[int]:
    """Of batches, as even as can be: a deviation over few samples says little."""
    n_batches = max(1, round(n / _BATCH))
    return [len(part) for part in np.array_split(np.arange(n), n_batches)]


def _batch(
    module: nn.Module, norms: list[nn.Module], start: torch.Tensor, n_steps: int
) -> NDArray[Any]:
    inputs = start.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    terms: list[torch.Tensor] = []

    def note(part: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        terms.append(_distance(given[0], part.running_mean, part.running_var))

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        for _ in range(n_steps):
            optimizer.zero_grad()
            terms.clear()
            module(inputs)
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
    finally:
        for hook in hooks:
            hook.remove()
    return np.asarray(inputs.detach().numpy())


def _distance(seen: torch.Tensor, mean: Any, variance: Any) -> torch.Tensor:
    """Squared distances of mean and deviation, over the channels' mean variance: layers of large
    and of small values count alike (the paper sums them as they are)."""
    axes = [axis for axis in range(seen.ndim) if axis != 1]
    deviation = (seen.var(axes, correction=0) + _SMALL).sqrt()
    apart = (seen.mean(axes) - mean).square() + (deviation - (variance + _SMALL).sqrt()).square()
    return torch.as_tensor(apart.mean() / (variance.mean() + _SMALL))


def _has_statistics(part: nn.Module) -> bool:
    return isinstance(part, _BatchNorm) and part.running_mean is not None
