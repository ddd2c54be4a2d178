"""Images: encoded ones to pixels, scaled, cropped and normalized.

Orientation tags in EXIF are not applied, transparency is dropped, and of an animation the first
frame counts: a trained model saw what torchvision's `ImageFolder` gave it, which does the same.
For that reason grey images of 16 bits a pixel are clipped to 255 too, as Pillow converts them. It
doesn't know requests' other inputs, nor who declares.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from serve.engines import EngineUnavailable
from serve.errors import InvalidRequest
from serve.tensor import NUMPY_DTYPES, Array, TensorSpec
from serve.transform.checks import Check, Problem, first_problem
from serve.transform.rows import allocated

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
DATATYPES = ("FP32", "FP16", "UINT8")
"""Of the engine's input. UINT8 takes pixels as they are."""
MAX_AXIS = 4096
"""Of `size` and `resize`."""
MAX_PIXELS = 50_000_000
"""A header that promises more is refused before anything is decompressed, and so is a shape that
scaling would blow up to more."""

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for bytes that no encoder wrote."""


class ImageUnreadable(ValueError):
    """Bytes that aren't an image of a known format and bounded size."""

    def __init__(self, got: str, want: str) -> None:
        super().__init__(f"want {want}, got {got}")
        self.got = got
        self.want = want


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The public input `name`, BYTES [row, 1] of encoded images, becomes the engine's `tensor`.

    Pixels / 255, less `mean`, by `std`; one mean makes images grey, three make them RGB. `resize`
    scales the short side to that many pixels; `size` [height, width] is a centre crop, for which
    an image is first scaled to just cover it unless `resize` is given. Scaling down antialiases.
    Without `size` all images of a request must come out equally large. Where the engine's tensor
    is UINT8 it gets pixels from 0 to 255, and `mean` must be 0 and `std` 1.
    """

    name: str
    tensor: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    resize: int | None = None
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    kind: Literal["image"] = "image"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The engine's inputs that are made."""
        return (self.tensor,)

    @property
    def files(self) -> tuple[str, ...]:
        return ()

    def problem(self) -> Problem | None:
        """What is out of bounds by itself."""
        return first_problem(self._checks())

    def misfit(self, inputs: Mapping[str, TensorSpec]) -> Problem | None:
        """What doesn't fit the engine's inputs."""
        return first_problem(self._fits(inputs))

    def _checks(self) -> Iterator[Check]:
        finite = all(map(math.isfinite, self.mean))
        fits = len(self.mean) in (1, 3) and finite
        yield "mean", list(self.mean), fits, "1 (grey) or 3 (RGB) finite numbers"
        fits = all(0 < value < math.inf for value in self.std)
        fits = fits and len(self.std) == len(self.mean)
        yield "std", list(self.std), fits, f"{len(self.mean)} finite numbers above 0, as in mean"
        fits = self.size is None or all(1 <= axis <= MAX_AXIS for axis in self.size)
        yield "size", self.size, fits, f"[height, width] of 1 to {MAX_AXIS}"
        least = max(self.size or (1,))
        fits = self.resize is None or least <= self.resize <= MAX_AXIS
        yield "resize", self.resize, fits, f"{least} (the longer side of size) to {MAX_AXIS}"

    def _fits(self, inputs: Mapping[str, TensorSpec]) -> Iterator[Check]:
        yield "tensor", self.tensor, self.tensor in inputs, f"one of {', '.join(inputs)}"
        spec = inputs[self.tensor]
        known = spec.datatype in DATATYPES
        yield "tensor", spec.datatype, known, f"an input of one of {', '.join(DATATYPES)}"
        sides = self.size or (-1, -1)
        channels = len(self.mean)
        shape = (-1, channels, *sides) if self.layout == "NCHW" else (-1, *sides, channels)
        fits = len(spec.shape) == 4 and all(
            have in (-1, make) for have, make in zip(spec.shape, shape, strict=True)
        )
        made = f"an input that takes {list(shape)}, which is made of it"
        yield "tensor", list(spec.shape), fits, made
        raw = spec.datatype != "UINT8" or (set(self.mean), set(self.std)) == ({0.0}, {1.0})
        wanted = "0 as mean and 1 as std for a UINT8 input"
        yield "mean", [list(self.mean), list(self.std)], raw, wanted
        finite = bool(np.isfinite(level_table(self, spec.datatype)).all())
        yield "std", list(self.std), finite, f"numbers that keep pixels finite in {spec.datatype}"


@dataclass(frozen=True, eq=False)
class ImageStep:
    """A declared image input at work; from any number of threads at a time."""

    spec: ImageInput
    table: Array
    """Of `level_table`."""

    def tensors(self, rows: Sequence[bytes]) -> dict[str, Array]:
        """The engine's input. Raises InvalidRequest that names the row."""
        batch: Array | None = None
        for row, encoded in enumerate(rows):
            pixels = self._pixels(row, encoded)
            shape = tensor_shape(pixels, self.spec.layout)
            if batch is None:
                batch = allocated(self.spec.name, (len(rows), *shape), self.table.dtype)
            if batch.shape[1:] != shape:
                got, want = list(shape), f"{list(batch.shape[1:])} as of row 0: no size is declared"
                raise InvalidRequest(f"inputs.{self.spec.name}[{row}]", got, want)
            fill(batch[row], pixels, self.table, self.spec.layout)
        assert batch is not None
        return {self.spec.tensor: batch}

    def _pixels(self, row: int, encoded: bytes) -> Pixels:
        try:
            return read_pixels(encoded, self.spec)
        except ImageUnreadable as error:
            field = f"inputs.{self.spec.name}[{row}]"
            raise InvalidRequest(field, error.got, error.want) from error


def load_images(spec: ImageInput, inputs: Mapping[str, TensorSpec]) -> ImageStep:
    """Make ready what `spec` declares, which fits `inputs`. Raises EngineUnavailable."""
    try:
        from PIL import Image, WebPImagePlugin
    except ImportError as error:
        raise EngineUnavailable(
            f"images of input {spec.name!r} can't be decoded ({error}); "
            "pip install 'trimserve[image]'"
        ) from error
    Image.preinit()  # the first image would otherwise register formats, in any of the threads
    assert WebPImagePlugin
    return ImageStep(spec, level_table(spec, inputs[spec.tensor].datatype))


def read_pixels(encoded: bytes, spec: ImageInput) -> Pixels:
    """Decode, scale and crop one image to [y, x, channel]. Raises ImageUnreadable."""
    from PIL import Image, UnidentifiedImageError

    too_large = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_pixels(image.size)
            image.load()
            # Without effect on pixels; but Pillow warns of some forms of it.
            image.info.pop("transparency", None)
            return frame_pixels(image, spec)
    except ImageUnreadable:
        raise
    except too_large as error:
        raise ImageUnreadable("more", f"at most {MAX_PIXELS} pixels in all") from error
    except UnidentifiedImageError as error:
        want = f"an image as {', '.join(FORMATS)}"
        raise ImageUnreadable(f"{len(encoded)} other bytes", want) from error
    except _DAMAGE as error:
        raise ImageUnreadable(f"a damaged one: {error}", "a whole image") from error


def frame_pixels(image: "Image.Image", spec: ImageInput) -> Pixels:
    """Scale and crop to [y, x, channel]. Raises ImageUnreadable where a long, narrow image would
    be scaled to too many pixels."""
    from PIL import Image

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    framed = image.convert("RGB" if len(spec.mean) == 3 else "L")
    scale = _scale(framed.size, spec)
    if scale != 1:
        scaled = (max(1, round(framed.width * scale)), max(1, round(framed.height * scale)))
        _check_pixels(scaled, f" when scaled from {framed.width} x {framed.height}")
        framed = framed.resize(scaled, filters[spec.interpolation])
    if spec.size is not None:
        height, width = spec.size
        left, top = (framed.width - width) // 2, (framed.height - height) // 2
        framed = framed.crop((left, top, left + width, top + height))
    return np.asarray(framed).reshape(framed.height, framed.width, len(spec.mean))


def level_table(spec: ImageInput, datatype: str = "FP32") -> Array:
    """What each level of each channel becomes, [channel, 256]: there are only 256 of them, and
    looking them up takes a tenth of the time of calculating with each pixel."""
    levels = np.arange(256, dtype=np.uint8)
    if datatype == "UINT8":
        return np.tile(levels, (len(spec.mean), 1))
    with np.errstate(over="ignore"):  # to infinity, which `misfit` refuses
        mean, std = (np.asarray(values, np.float32)[:, None] for values in (spec.mean, spec.std))
        unit = levels.astype(np.float32) / np.float32(255)
        return ((unit - mean) / std).astype(NUMPY_DTYPES[datatype])


def tensor_shape(pixels: Pixels, layout: Literal["NCHW", "NHWC"]) -> tuple[int, int, int]:
    """Of one row's tensor."""
    height, width, channels = pixels.shape
    return (channels, height, width) if layout == "NCHW" else (height, width, channels)


def fill(tensor: Array, pixels: Pixels, table: Array, layout: Literal["NCHW", "NHWC"]) -> None:
    """Write the levels of `pixels` into one row's `tensor`."""
    planes = tensor if layout == "NCHW" else tensor.transpose(2, 0, 1)
    for channel, levels in enumerate(table):
        planes[channel] = levels[pixels[:, :, channel]]


def normalized(pixels: Pixels, spec: ImageInput) -> NDArray[np.float32]:
    """One row's tensor in FP32, without its batch axis."""
    tensor = np.empty(tensor_shape(pixels, spec.layout), np.float32)
    fill(tensor, pixels, level_table(spec), spec.layout)
    return tensor


def _check_pixels(size: tuple[int, int], note: str = "") -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        got = f"{width} x {height}{note}"
        raise ImageUnreadable(got, f"at most {MAX_PIXELS} pixels in all")


def _scale(size: tuple[int, int], spec: ImageInput) -> float:
    if spec.resize is not None:
        return spec.resize / min(size)
    if spec.size is not None:
        height, width = spec.size
        return max(width / size[0], height / size[1])
    return 1.0
