"""Moments: what the inputs of layers look like on samples, as matrices of second moments.

It runs a module and leaves it as it was. What is made of a moment is the factors' matter.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from optimizer.decomposition.factors import Array
from optimizer.decomposition.sites import Site

MAX_INPUTS = 4096
"""A layer with more inputs has no moment: it would take over 128 MiB and minutes."""


def second_moments(
    module: nn.Module, sites: Sequence[Site], batches: Iterable[Sequence[torch.Tensor]]
) -> dict[str, Array]:
    """Site's name → E[x x'] [in, in] of the input of each linear layer or 1x1 convolution.

    `module` is in eval mode and has the sites' layers. The mean is over samples and positions,
    those that a stride passes over included. Sites with more than `MAX_INPUTS` have none.
    """
    wanted = [site for site in sites if site.geometry.n_in <= MAX_INPUTS]
    sums = {s.name: np.zeros((s.geometry.n_in, s.geometry.n_in)) for s in wanted}
    counts = dict.fromkeys(sums, 0)

    def hook(name: str) -> Any:
        def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            features = inputs[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs[0]
            rows = features.reshape(-1, features.shape[-1])  # [samples x positions, in]
            sums[name] += (rows.T @ rows).double().numpy()
            counts[name] += len(rows)

        return add

    hooks = [site.layer.register_forward_pre_hook(hook(site.name)) for site in wanted]
    try:
        with torch.inference_mode():
            for batch in batches:
                module(*batch)
    finally:
        for one in hooks:
            one.remove()
    return {name: total / max(1, counts[name]) for name, total in sums.items()}
