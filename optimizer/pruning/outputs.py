"""Outputs of modules, whatever containers they come in."""

from collections.abc import Mapping
from typing import Any

import torch


def first_output(outputs: Any) -> torch.Tensor:
    """The first of what `forward` returned."""
    while not isinstance(outputs, torch.Tensor):
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        outputs = next(iter(values))
    return outputs
