"""Recalibration: batch normalization's statistics, taken anew from training samples.

Accuracy after a structural change is near chance before it and says little of what can be won
back (Li et al. 2020, "EagleEye", section 3.3). It changes no weight.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from optimizer.training.batches import Batch

N_SAMPLES = 1024
"""That are looked at, or all where there are fewer."""


def recalibrate(module: nn.Module, batches: Iterable[Batch]) -> None:
    """Set running means and variances to the plain averages of the batches' own, each layer seeing
    what the layers before it give when normalized by the batch.

    Batches count alike, whatever their size. Each holds more than one value a channel. Everything
    else runs in eval mode; all is in eval mode after it. At least
    one batch must come. Without batch normalization it does nothing.
    """
    module.eval()
    norms = [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            module(*batch.inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
