"""Encoded or raw images to float32 input tensors, as the server makes them.

It translates `optimizer.spec.ImageSpec` for `serve.transform`, whose code it calls, and knows no
files.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optimizer.spec import ImageSpec
from serve.transform.images import (
    ImageInput,
    ImageUnreadable,
    Pixels,
    frame_pixels,
    normalized,
    read_pixels,
)

__all__ = ["ImageUnreadable", "decode", "from_pixels", "image_input"]


def decode(encoded: bytes, spec: ImageSpec) -> NDArray[np.float32]:
    """Decode and preprocess one image to [channel, y, x]. Raises ImageUnreadable."""
    declared = image_input(spec)
    return normalized(read_pixels(encoded, declared), declared)


def from_pixels(pixels: Pixels, spec: ImageSpec) -> NDArray[np.float32]:
    """Preprocess one raw image, [y, x] or [y, x, channel], to [channel, y, x]. Raises
    ImageUnreadable where it would be scaled to too many pixels."""
    grey = pixels.ndim == 3 and pixels.shape[2] == 1
    image = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    declared = image_input(spec)
    return normalized(frame_pixels(image, declared), declared)


def image_input(spec: ImageSpec, name: str = "image", tensor: str = "image") -> ImageInput:
    """What a manifest declares to have the server preprocess images as `spec` says."""
    return ImageInput(
        name=name, tensor=tensor, mean=spec.mean, std=spec.std, size=spec.size, resize=spec.resize
    )
