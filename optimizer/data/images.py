"""Encoded or raw images to float32 input tensors.

Knows one preprocessing (`optimizer.spec.ImageSpec`) and no files. Orientation tags in EXIF are
not applied: a trained model saw what torchvision's `ImageFolder` gave it, which does neither.
"""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from optimizer.spec import ImageSpec

MAX_PIXELS = 50_000_000
"""A header that promises more is refused before anything is decompressed."""

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for bytes that no encoder wrote."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class ImageUnreadable(ValueError):
    """Bytes that aren't an image of a known format and bounded size; `str()` says why."""


def decode(encoded: bytes, spec: ImageSpec) -> NDArray[np.float32]:
    """Decode and preprocess one image to [channel, y, x]. Raises ImageUnreadable."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageUnreadable(
                    f"got {width} x {height} pixels, want at most {MAX_PIXELS} in all"
                )
            return _tensor(image, spec)
    except ImageUnreadable:
        raise
    except UnidentifiedImageError as error:
        raise ImageUnreadable(f"want an image as {', '.join(FORMATS)}") from error
    except _DAMAGE as error:
        raise ImageUnreadable(f"damaged image: {error}") from error


def from_pixels(pixels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Preprocess one raw image, [y, x] or [y, x, channel], to [channel, y, x]."""
    grey = pixels.ndim == 3 and pixels.shape[2] == 1
    return _tensor(Image.fromarray(pixels[:, :, 0] if grey else pixels), spec)


def _tensor(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    converted = image.convert("RGB" if len(spec.mean) == 3 else "L")
    pixels = np.asarray(_framed(converted, spec), dtype=np.float32) / np.float32(255)
    channels = pixels.reshape(*pixels.shape[:2], len(spec.mean))
    mean, std = (np.asarray(values, dtype=np.float32) for values in (spec.mean, spec.std))
    return np.ascontiguousarray(((channels - mean) / std).transpose(2, 0, 1))


def _framed(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Scale (bilinear, antialiased) and centre-crop as the spec says."""
    scale = _scale(image, spec)
    if scale != 1:
        width, height = (round(axis * scale) for axis in image.size)
        image = image.resize((max(1, width), max(1, height)), Image.Resampling.BILINEAR)
    if spec.size is None:
        return image
    height, width = spec.size
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _scale(image: Image.Image, spec: ImageSpec) -> float:
    if spec.resize is not None:
        return spec.resize / min(image.size)
    if spec.size is not None:
        height, width = spec.size
        return max(width / image.width, height / image.height)
    return 1.0
