"""Augmentation: other views of images and texts, a batch at a time, by torch operations.

Images are [n, channel, y, x] after preprocessing; the filling is 0, the mean. Texts are inputs
[n, length] of tokens. Student and teacher get the same view, since it is made before either.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional

SWAP_SPANS = "swap_spans"
"""Of texts; the others are of images."""
_PADDING = 8
"""A crop is out of the image with a border of a side's 1/8: 4 pixels of 32 (He et al. 2016)."""


def augmented(
    name: str,
    inputs: Sequence[torch.Tensor],
    generator: torch.Generator,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """New views of a batch, each sample by its own draw. `kept` is a batch's: bool [n, length], the
    positions of texts that aren't padding. Raises ValueError for inputs that aren't one batch of
    images, or for texts without `kept`."""
    if name == "none":
        return tuple(inputs)
    shapes = ", ".join(str(list(one.shape)) for one in inputs)
    if name == SWAP_SPANS:
        if kept is None or any(one.shape != kept.shape for one in inputs):
            raise ValueError(
                f"augmentation {name}: got inputs {shapes}, want texts [n, length] and their "
                "attention_mask"
            )
        return _swapped(inputs, kept, generator)
    if len(inputs) != 1 or inputs[0].ndim != 4:
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


def _swapped(
    inputs: Sequence[torch.Tensor], kept: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """In every second text one span is that of another of the batch (after CutMix, Yun et al. 2019,
    of whose two labels there is nothing here: answers are the teacher's). It lies where both texts
    are, and holds neither's first and last token, which often are marks. Its length is drawn
    evenly, from one position up."""
    n, length = kept.shape
    others = torch.randperm(n, generator=generator)
    both = kept & kept[others]
    # Without those at either end, of either text.
    place = torch.arange(length)
    first = _first(both).clamp(max=length - 1) + 1
    end = length - 1 - _first(both.flip(1))
    room = (end - first).clamp(min=0) * (torch.rand(n, generator=generator) < 0.5)
    taken = (torch.rand(n, generator=generator) * room).long() + (room > 0)
    start = first + (torch.rand(n, generator=generator) * (room - taken + 1)).long()
    swapped = both & (place >= start[:, None]) & (place < (start + taken)[:, None])
    return tuple(torch.where(swapped, one[others], one) for one in inputs)


def _first(chosen: torch.Tensor) -> torch.Tensor:
    """[n] the first place of each row [n, length] that is chosen, or its length."""
    length = chosen.shape[1]
    return torch.where(chosen, torch.arange(length), length).amin(1)


_STEPS: Mapping[
    str, tuple[Callable[[torch.Tensor, torch.Generator], torch.Tensor], ...]
] = {"flip": (_flipped,), "flip_and_crop": (_flipped, _cropped)}  # fmt: skip
