"""VGG for 32x32 images (Simonyan and Zisserman 2015, "Very Deep Convolutional Networks").

3x3 convolutions one after the other, here with batch normalization (Ioffe and Szegedy 2015) and
one linear layer. Small enough to be trained in minutes, and as wide as low rank needs.
"""

import torch
from torch import nn

# Output channels of the convolutions; "pool" halves the sides.
WIDTHS = (32, "pool", 64, 128, "pool", 128, 128, "pool", 128, "pool")


class VGG(nn.Module):
    """Images [n, 3, 32, 32] to logits [n, n_classes]."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_channels = 3
        for width in WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(n_channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            n_channels = width
        self.features = nn.Sequential(*layers)  # [n, 128, 2, 2]
        self.linear = nn.Linear(n_channels * 4, n_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(image).flatten(1))


def vgg7() -> nn.Module:
    return VGG()
