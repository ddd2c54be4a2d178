"""Augmentation: other views of images, a batch at a time, by torch operations.

Images are [n, channel, y, x] after preprocessing; the filling is 0, the mean. Student and teacher
get the same view, since it is made before either.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional

AUGMENTATIONS = ("none", "flip", "flip_and_crop")
_PADDING = 8
"""A crop is out of the image with a border of a side's 1/8: 4 pixels of 32 (He et al. 2016)."""


def augmented(
    name: str, inputs: Sequence[torch.Tensor], generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """New views of a batch, each sample by its own draw. Raises ValueError for inputs that aren't
    one batch of images."""
    if name == "none":
        return tuple(inputs)
    if len(inputs) != 1 or inputs[0].ndim != 4:
        shapes = ", ".join(str(list(one.shape)) for one in inputs)
        raise ValueError(f"augmentation {name}: got inputs {shapes}, want one [n, channel, y, x]")
    images = inputs[0]
    for step in _STEPS[name]:
        images = step(images, generator)
    return (images,)


def _flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every second one from left to right."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def _cropped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to a border's width along each axis."""
    n, _, height, width = images.shape
    border_y, border_x = max(1, height // _PADDING), max(1, width // _PADDING)
    padded = functional.pad(images, (border_x, border_x, border_y, border_y))
    shift_y = torch.randint(2 * border_y + 1, (n,), generator=generator)
    shift_x = torch.randint(2 * border_x + 1, (n,), generator=generator)
    y = (shift_y[:, None] + torch.arange(height))[:, None, :, None]
    x = (shift_x[:, None] + torch.arange(width))[:, None, None, :]
    sample = torch.arange(n)[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[sample, channel, y, x]


_STEPS: Mapping[
    str, tuple[Callable[[torch.Tensor, torch.Generator], torch.Tensor], ...]
] = {"flip": (_flipped,), "flip_and_crop": (_flipped, _cropped)}  # fmt: skip
