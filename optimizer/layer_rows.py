"""Rows: what a layer computes as a product of a matrix of inputs and one of weights.

A linear layer's rows are its samples and positions, a convolution's the windows that it reads. So
both are fitted and measured by the same algebra. It knows no networks.
"""

from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional

Layer = nn.Linear | nn.Conv2d


def has_rows(part: nn.Module) -> TypeGuard[Layer]:
    """Whether a part is a linear layer, or a convolution of one group that pads with zeros by
    given numbers."""
    if isinstance(part, nn.Linear):
        return True
    return (
        isinstance(part, nn.Conv2d)
        and part.groups == 1
        and part.padding_mode == "zeros"
        and not isinstance(part.padding, str)
    )


def n_features(layer: Layer) -> int:
    """Of a row: a convolution's windows count for each channel."""
    return layer.weight[0].numel()


def input_rows(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """[n, positions, features] of inputs [n, …, channel], or [n, channel, y, x]."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])
    padding = layer.padding
    assert not isinstance(padding, str)
    windows = functional.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return windows.transpose(1, 2)


def output_rows(layer: Layer, outputs: torch.Tensor) -> torch.Tensor:
    """[n, positions, outputs], position by position those of `input_rows`."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(len(outputs), -1, outputs.shape[-1])
    return outputs.flatten(2).transpose(1, 2)


def weight_matrix(layer: Layer) -> torch.Tensor:
    """[features, outputs], float64: a row times it is the layer's output, but for the bias."""
    return layer.weight.detach().flatten(1).T.double()


def sampled(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[n x chosen, features]: of each sample the rows at the positions `chosen` [n, …]."""
    index = chosen[..., None].expand(-1, -1, rows.shape[-1])
    return rows.gather(1, index).flatten(0, 1)


def positions(n: int, n_positions: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """[n, at most `most`] different positions for each of n samples, at random; int64."""
    if n_positions <= most:
        return torch.arange(n_positions).expand(n, -1)
    return torch.rand(n, n_positions, generator=generator).argsort(1)[:, :most]
