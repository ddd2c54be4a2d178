"""ResNet for 32x32 images (He et al. 2016, "Deep Residual Learning", section 4.2).

Three stages of basic blocks with 16, 32 and 64 channels. Shortcuts that change the shape are
option A of the paper: every second pixel, and new channels of zeros, so they have no parameters.
"""

import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [n, n_in, y, x] to [n, n_out, y/stride, x/stride]."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = Subsample(n_out - n_in, stride) if stride != 1 else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        residual = functional.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        return functional.relu(residual + self.shortcut(features))


class Subsample(nn.Module):
    """Option A: every `stride`-th pixel, half of the new zero channels before, half after."""

    def __init__(self, n_new: int, stride: int) -> None:
        super().__init__()
        self.n_new = n_new
        self.stride = stride

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        subsampled = features[:, :, :: self.stride, :: self.stride]
        before = self.n_new // 2
        return functional.pad(subsampled, (0, 0, 0, 0, before, self.n_new - before))


class ResNet(nn.Module):
    """Images [n, 3, 32, 32] to logits [n, n_classes]; depth 6 `n_blocks` + 2."""

    def __init__(self, n_blocks: int, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n_blocks, stride=1)
        self.layer2 = _stage(16, 32, n_blocks, stride=2)
        self.layer3 = _stage(32, 64, n_blocks, stride=2)
        self.linear = nn.Linear(64, n_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = functional.relu(self.bn1(self.conv1(image)))
        features = self.layer3(self.layer2(self.layer1(features)))  # [n, 64, 8, 8]
        return self.linear(features.mean(dim=(2, 3)))


def _stage(n_in: int, n_out: int, n_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(n_in, n_out, stride)
    return nn.Sequential(first, *(BasicBlock(n_out, n_out, 1) for _ in range(n_blocks - 1)))


def resnet20() -> nn.Module:
    return ResNet(n_blocks=3)


def resnet56() -> nn.Module:
    return ResNet(n_blocks=9)
