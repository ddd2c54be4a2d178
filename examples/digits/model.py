"""A small convolutional network for 8x8 grey digits."""

import torch
from torch import nn


class DigitsNet(nn.Module):
    """Three convolutions and a linear layer: [n, 1, 8, 8] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 64),
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.features(image)  # [n, 64, 4, 4]
        return self.linear(features.mean(dim=(2, 3)))


def _convolution(n_in: int, n_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(n_in, n_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
    ]


def build() -> nn.Module:
    """The network without weights: the spec names this function."""
    return DigitsNet()
