"""Transforms: images, texts and labels against references made by hand, and what is refused."""

import io
import itertools
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from optimizer.data.images import decode, from_pixels, image_input
from optimizer.spec import ImageSpec
from serve.engines import Signature
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.tensor import NUMPY_DTYPES, Array, TensorSpec
from serve.transform import (
    ImageInput,
    LabelOutput,
    TextInput,
    Transform,
    TransformSpec,
    check_spec,
    files_of,
    load_transform,
    public_signature,
)
from serve.transform.images import MAX_PIXELS
from serve.transform.rows import MAX_TENSOR_BYTES
from serve.transform.text import MAX_TEXT_BYTES

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO = ImageInput(name="photo", tensor="image", mean=MEAN, std=STD)
PLAIN = replace(PHOTO, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
TEXT = TextInput(name="text", file="tokenizer.json", ids="ids", max_length=6)
FULL_TEXT = replace(TEXT, mask="mask", types="types")
LABELS = LabelOutput(tensor="y", file="labels.txt", name="label")
WORDS = ("the", "cat", "sat", "on", "a", "mat")
SCORES = TensorSpec("y", "FP32", (-1, 3))

# --- making images, tokenizers and engines' signatures


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png_of_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and holds hardly any."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + body


def column(*rows: bytes) -> Array:
    """A BYTES tensor [row, 1]."""
    array = np.empty((len(rows), 1), object)
    array[:, 0] = rows
    return array


def write_tokenizer(directory: Path, special: bool = True, unknown: bool = True) -> Tokenizer:
    """A tokenizer of six words, at 3 to 8; other words are [UNK] where it is known."""
    words = ["[PAD]", "[CLS]", "[SEP]", *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    if unknown:
        vocabulary["[UNK]"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def engine(*inputs: TensorSpec, outputs: Sequence[TensorSpec] = (SCORES,)) -> Signature:
    return Signature(inputs, tuple(outputs))


def image_engine(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 3, -1, -1)) -> Signature:
    return engine(TensorSpec("image", datatype, shape))


def text_engine(datatype: str = "INT64", length: int = -1) -> Signature:
    names = ("ids", "mask", "types")
    return engine(*(TensorSpec(name, datatype, (-1, length)) for name in names))


def load_image(spec: ImageInput, datatype: str = "FP32") -> Transform:
    channels = len(spec.mean)
    shape = (-1, channels, -1, -1) if spec.layout == "NCHW" else (-1, -1, -1, channels)
    return load_transform(ROOT, TransformSpec(inputs=(spec,)), image_engine(datatype, shape))


def images(spec: ImageInput, *rows: bytes, datatype: str = "FP32") -> Array:
    return load_image(spec, datatype).before({"photo": column(*rows)})["image"]


def load_text(directory: Path, spec: TextInput, signature: Signature | None = None) -> Transform:
    declared = TransformSpec(inputs=(spec,))
    made = text_engine().inputs
    only_made = engine(*(one for one in made if one.name in spec.tensors))
    return load_transform(directory, declared, signature or only_made)


def load_labels(directory: Path, spec: LabelOutput, *outputs: TensorSpec) -> Transform:
    (directory / "labels.txt").write_text("cat\ndog\nShip ä\n", encoding="utf-8")
    signature = engine(TensorSpec("x", "FP32", (-1, 4)), outputs=outputs or (SCORES,))
    return load_transform(directory, TransformSpec(outputs=(spec,)), signature)


def words(array: Array) -> list[list[str]]:
    return [[word.decode() for word in row] for row in array.tolist()]


def refused(run: Callable[[], object]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        run()
    return caught.value


# --- images: what they become


def by_hand(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """[y, x, channel] of levels to [channel, y, x], one number after the other, in doubles."""
    height, width, channels = pixels.shape
    tensor = np.empty((channels, height, width))
    for y, x, channel in np.ndindex(height, width, channels):
        level = float(pixels[y, x, channel])
        tensor[channel, y, x] = (level / 255 - mean[channel]) / std[channel]
    return tensor


def test_images_are_normalized_channels_first_when_nothing_is_resized() -> None:
    pictures = [noise(5, 7, seed=seed) for seed in range(3)]
    made = images(PHOTO, *map(encoded, pictures))
    assert (made.shape, made.dtype) == ((3, 3, 5, 7), np.float32)
    expected = np.stack([by_hand(picture, MEAN, STD) for picture in pictures])
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_images_are_channels_last_when_the_layout_says_so() -> None:
    picture = encoded(noise(5, 7))
    last = images(replace(PHOTO, layout="NHWC"), picture)
    np.testing.assert_array_equal(last, images(PHOTO, picture).transpose(0, 2, 3, 1))


def test_images_are_grey_when_there_is_one_mean() -> None:
    picture = noise(4, 6, channels=1)
    made = images(replace(PHOTO, mean=(0.5,), std=(0.25,)), encoded(picture))
    np.testing.assert_allclose(made[0], by_hand(picture[:, :, None], [0.5], [0.25]), rtol=1e-5)


def test_images_are_raw_levels_when_the_engine_takes_uint8() -> None:
    picture = noise(4, 6)
    made = images(PLAIN, encoded(picture), datatype="UINT8")
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made[0], picture.transpose(2, 0, 1))


def test_images_are_rounded_last_when_the_engine_takes_fp16() -> None:
    picture = encoded(noise(4, 6))
    made = images(PHOTO, picture, datatype="FP16")
    assert made.dtype == np.float16
    np.testing.assert_array_equal(made, images(PHOTO, picture).astype(np.float16))


@pytest.mark.parametrize(
    ("shape", "resize", "size", "scaled", "box"),
    # `scaled` is (width, height), `box` (left, top, right, bottom): both worked out by hand.
    [
        pytest.param((40, 60), 20, None, (30, 20), None, id="scaled by the short side"),
        pytest.param((60, 40), 20, None, (20, 30), None, id="scaled when upright"),
        pytest.param((10, 12), 20, None, (24, 20), None, id="scaled up"),
        pytest.param((40, 60), 20, (16, 18), (30, 20), (6, 2, 24, 18), id="scaled and cropped"),
        pytest.param((40, 60), None, (20, 20), (30, 20), (5, 0, 25, 20), id="covered"),
        pytest.param((30, 60), None, (20, 10), (40, 20), (15, 0, 25, 20), id="covered upright"),
        pytest.param((21, 31), 21, (20, 20), (31, 21), (5, 0, 25, 20), id="cropped at odd rests"),
    ],
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_as_pillow_makes_them_when(
    shape: tuple[int, int],
    resize: int | None,
    size: tuple[int, int] | None,
    scaled: tuple[int, int],
    box: tuple[int, int, int, int] | None,
    interpolation: Any,
) -> None:
    picture = Image.fromarray(noise(*shape))
    spec = replace(PLAIN, resize=resize, size=size, interpolation=interpolation)
    made = images(spec, encoded(picture), datatype="UINT8")[0]
    expected = picture
    if scaled != picture.size:
        expected = picture.resize(scaled, Image.Resampling[interpolation.upper()])
    expected = expected.crop(box) if box else expected
    np.testing.assert_array_equal(made, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_images_are_decoded_when_they_are(form: str) -> None:
    written = encoded(noise(9, 8), form)
    with Image.open(io.BytesIO(written)) as read:
        expected = np.asarray(read.convert("RGB"))
    made = images(PLAIN, written, datatype="UINT8")[0]
    np.testing.assert_array_equal(made, expected.transpose(2, 0, 1))


def palette(**options: Any) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 10, 0, 200, 20])
    image.putdata([0, 1])
    return encoded(image, **options)


def animated(form: str) -> bytes:
    red, blue = (Image.new("RGB", (2, 1), name) for name in ("red", "blue"))
    options = {"lossless": True} if form == "WEBP" else {}
    return encoded(red, form, save_all=True, append_images=[blue], **options)


def turned() -> bytes:
    """With an orientation tag that asks for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), exif=exif)


@pytest.mark.parametrize(
    ("written", "row"),
    [
        pytest.param(encoded(np.array([[7, 9]], np.uint8)), [[7, 7, 7], [9, 9, 9]], id="grey"),
        pytest.param(encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")),
                     [[0, 0, 0], [255, 255, 255]], id="black and white"),
        pytest.param(encoded(np.array([[100, 40000]], np.uint16)),
                     [[100, 100, 100], [255, 255, 255]], id="grey of 16 bits, clipped"),
        pytest.param(encoded(np.array([[[7, 0], [9, 255]]], np.uint8)), [[7, 7, 7], [9, 9, 9]],
                     id="grey with transparency, dropped"),
        pytest.param(encoded(np.array([[[1, 2, 3, 0], [4, 5, 6, 255]]], np.uint8)),
                     [[1, 2, 3], [4, 5, 6]], id="RGB with transparency, dropped"),
        pytest.param(palette(), [[250, 0, 10], [0, 200, 20]], id="a palette"),
        pytest.param(palette(transparency=b"\x80\x40"), [[250, 0, 10], [0, 200, 20]],
                     id="a palette with transparency, dropped"),
        pytest.param(encoded(Image.new("CMYK", (2, 1), (255, 0, 0, 0)), "JPEG"),
                     [[0, 255, 255], [0, 255, 255]], id="CMYK"),
        pytest.param(animated("PNG"), [[255, 0, 0], [255, 0, 0]], id="an animated PNG, its first"),
        pytest.param(animated("WEBP"), [[255, 0, 0], [255, 0, 0]],
                     id="an animated WEBP, its first"),
        pytest.param(turned(), [[255, 0, 0], [0, 0, 255]], id="tagged as turned, left as it is"),
    ],
)  # fmt: skip
def test_images_become_rgb_when_they_are(written: bytes, row: list[list[int]]) -> None:
    made = images(PLAIN, written, datatype="UINT8")
    assert made[0].transpose(1, 2, 0).tolist() == [row]


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        pytest.param(None, None, id="nothing is resized"),
        pytest.param(16, None, id="they are scaled"),
        pytest.param(None, (12, 10), id="they are covered"),
        pytest.param(16, (12, 10), id="they are scaled and cropped"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_images_are_the_bits_that_the_optimizer_sees_when(
    form: str, channels: int, resize: int | None, size: tuple[int, int] | None
) -> None:
    spec = ImageSpec(mean=MEAN[:channels], std=STD[:channels], resize=resize, size=size)
    picture = noise(23, 31)
    written = encoded(picture, form)
    served = images(image_input(spec, "photo"), written)[0]
    np.testing.assert_array_equal(decode(written, spec), served, strict=True)
    if form == "PNG":
        np.testing.assert_array_equal(from_pixels(picture, spec), served, strict=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_keep_the_bits_of_calculating_in_float32_when_levels_are_looked_up(
    channels: int,
) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = np.stack([levels] * channels, axis=-1)
    mean, std = (np.asarray(values[:channels], np.float32) for values in (MEAN, STD))
    expected = (picture.astype(np.float32) / np.float32(255) - mean) / std
    spec = replace(PHOTO, mean=MEAN[:channels], std=STD[:channels])
    made = images(spec, encoded(levels))
    np.testing.assert_array_equal(made[0], expected.transpose(2, 0, 1), strict=True)


# --- images: what is refused


@pytest.mark.parametrize(
    ("bad", "got", "want"),
    [
        pytest.param(b"", "0 other bytes", "an image as JPEG, PNG, WEBP, BMP", id="nothing"),
        pytest.param(b"GET / HTTP/1.1", "14 other bytes", "an image as", id="no image"),
        pytest.param(encoded(noise(4, 4), "GIF"), "other bytes", "an image as", id="a GIF"),
        pytest.param(encoded(noise(4, 4), "TIFF"), "other bytes", "an image as", id="a TIFF"),
        pytest.param(encoded(noise(40, 40))[:900], "a damaged one", "a whole image",
                     id="a truncated PNG"),
        pytest.param(encoded(noise(40, 40), "JPEG")[:900], "a damaged one", "a whole image",
                     id="a truncated JPEG"),
        pytest.param(encoded(noise(40, 40), "WEBP", lossless=True)[:900], "a damaged one",
                     "a whole image", id="a truncated WEBP"),
        pytest.param(encoded(noise(40, 40), "BMP")[:900], "a damaged one", "a whole image",
                     id="a truncated BMP"),
        pytest.param(png_of_header(60_000, 1_000), "60000 x 1000", f"at most {MAX_PIXELS} pixels",
                     id="a bomb"),
        pytest.param(png_of_header(10_000, 10_000), "more", f"at most {MAX_PIXELS} pixels",
                     id="a bomb that Pillow warns of"),
        pytest.param(png_of_header(50_000, 50_000), "more", f"at most {MAX_PIXELS} pixels",
                     id="a bomb that Pillow refuses"),
    ],
)  # fmt: skip
def test_images_are_refused_by_row_when_one_is(bad: bytes, got: str, want: str) -> None:
    error = refused(lambda: images(PHOTO, encoded(noise(4, 4)), bad))
    assert error.field == "inputs.photo[1]"
    assert got in str(error.got)
    assert want in error.want
    assert "0x" not in str(error)  # no address of an object


def test_images_are_refused_before_scaling_when_that_would_make_too_many_pixels() -> None:
    line = encoded(np.zeros((1, 60_000), np.uint8))
    error = refused(lambda: images(replace(PHOTO, size=(224, 224)), line))
    assert error.got == "13440000 x 224 when scaled from 60000 x 1"


def test_images_are_refused_when_their_sizes_differ_and_none_is_declared() -> None:
    pictures = [encoded(noise(4, 4)), encoded(noise(4, 5))]
    error = refused(lambda: images(PHOTO, *pictures))
    assert (error.field, error.got) == ("inputs.photo[1]", [3, 4, 5])
    assert images(replace(PHOTO, size=(4, 4)), *pictures).shape == (2, 3, 4, 4)


def test_images_are_refused_when_a_request_would_fill_the_memory() -> None:
    spec = replace(PHOTO, size=(4096, 4096))
    rows = [encoded(noise(1, 1))] * 6  # 192 MiB each
    error = refused(lambda: images(spec, *rows))
    assert error.field == "inputs.photo"
    assert str(MAX_TENSOR_BYTES) in error.want


# --- text


@pytest.mark.parametrize("datatype", ["INT64", "INT32"])
def test_text_becomes_numbers_mask_and_segments_when_rows_differ(
    tmp_path: Path, datatype: str
) -> None:
    write_tokenizer(tmp_path)
    made = load_text(tmp_path, FULL_TEXT, text_engine(datatype)).before(
        {"text": column(b"cat", b"the cat sat", b"")}
    )
    assert {array.dtype for array in made.values()} == {NUMPY_DTYPES[datatype]}
    assert made["ids"].tolist() == [[1, 4, 2, 0, 0], [1, 3, 4, 5, 2], [1, 2, 0, 0, 0]]
    assert made["mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert made["types"].tolist() == [[0] * 5] * 3


def test_text_becomes_numbers_alone_when_the_engine_has_no_mask(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    made = load_text(tmp_path, TEXT).before({"text": column(b"a mat")})
    assert {name: array.tolist() for name, array in made.items()} == {"ids": [[1, 7, 8, 2]]}


def test_text_is_truncated_with_its_special_tokens_when_it_is_long(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    made = load_text(tmp_path, TEXT).before({"text": column(b"the cat sat on a mat", b"cat")})
    assert made["ids"].tolist() == [[1, 3, 4, 5, 6, 2], [1, 4, 2, 0, 0, 0]]


def test_text_is_truncated_at_its_start_when_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.enable_truncation(3, direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = load_text(tmp_path, TEXT).before({"text": column(b"the cat sat on a mat")})
    assert made["ids"].tolist() == [[1, 5, 6, 7, 8, 2]]


def test_text_is_filled_up_as_the_file_says_when_it_configures_a_padding(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.enable_padding(pad_id=9, pad_token="[UNK]", pad_type_id=1, length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    transform = load_text(tmp_path, FULL_TEXT)
    made = transform.before({"text": column(b"cat", b"a mat")})
    assert made["ids"].tolist() == [[1, 4, 2, 9], [1, 7, 8, 2]]  # and not to 50
    assert made["mask"].tolist() == [[1, 1, 1, 0], [1] * 4]
    assert made["types"].tolist() == [[0, 0, 0, 1], [0] * 4]
    assert transform.fill_values == {"ids": 9, "mask": 0, "types": 1}


@pytest.mark.parametrize(
    ("vocabulary", "value"),
    [
        pytest.param({"a": 0, "[PAD]": 1}, 1, id="the vocabulary has BERT's"),
        pytest.param({"a": 0, "b": 1, "<pad>": 2}, 2, id="the vocabulary has RoBERTa's"),
        pytest.param({"a": 0, "b": 1}, 0, id="there is none"),
    ],
)
def test_text_is_filled_up_with_the_pad_token_when(
    tmp_path: Path, vocabulary: dict[str, int], value: int
) -> None:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    transform = load_text(tmp_path, TEXT)
    made = transform.before({"text": column(b"a", b"a a")})
    assert made["ids"].tolist() == [[0, value], [0, 0]]
    assert transform.fill_values == {"ids": value}


def test_text_is_filled_up_to_the_engines_length_when_that_is_fixed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    made = load_text(tmp_path, FULL_TEXT, text_engine(length=8)).before({"text": column(b"cat")})
    assert made["ids"].tolist() == [[1, 4, 2, 0, 0, 0, 0, 0]]
    assert made["mask"].sum() == 3


@pytest.mark.parametrize(
    ("bad", "got", "want"),
    [
        pytest.param(b"cat \xff", "byte 0xff at 4", "UTF-8 text", id="no UTF-8"),
        pytest.param(b"cat \xe2\x82", "byte 0xe2 at 4", "UTF-8 text", id="half a letter"),
        pytest.param(b"\xed\xa0\x80", "byte 0xed at 0", "UTF-8 text", id="a lone surrogate"),
        pytest.param(b"a" * (MAX_TEXT_BYTES + 1), f"{MAX_TEXT_BYTES + 1} bytes", "at most",
                     id="too long"),
        pytest.param(b"", "0 bytes of no token", "at least one token", id="empty"),
        pytest.param(b" \n", "2 bytes of no token", "at least one token", id="blank"),
        pytest.param(b"dog", "Missing [UNK]", "can encode", id="not in the vocabulary"),
    ],
)  # fmt: skip
def test_text_is_refused_by_row_when_one_is(
    tmp_path: Path, bad: bytes, got: str, want: str
) -> None:
    write_tokenizer(tmp_path, special=False, unknown=False)
    transform = load_text(tmp_path, TEXT)
    error = refused(lambda: transform.before({"text": column(b"cat", bad)}))
    assert error.field == "inputs.text[1]"
    assert got in str(error.got)
    assert want in error.want


def test_text_is_refused_when_a_request_would_fill_the_memory(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    length = 2**20
    transform = load_text(tmp_path, replace(TEXT, max_length=9), text_engine(length=length))
    rows = MAX_TENSOR_BYTES // (8 * length) + 1
    error = refused(lambda: transform.before({"text": column(*[b"cat"] * rows)}))
    assert (error.field, error.got) == ("inputs.text", f"{rows} rows of [{length}] elements")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the threads")
def test_text_starts_no_thread_and_may_fork_when_it_is_tokenized(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", f"""
import os, sys
from pathlib import Path
import numpy as np
from serve.engines import Signature
from serve.tensor import TensorSpec
from serve.transform import TextInput, TransformSpec, load_transform
threads = len(os.listdir("/proc/self/task"))
spec = TransformSpec(inputs=({TEXT!r},))
signature = Signature((TensorSpec("ids", "INT64", (-1, -1)),), ())
transform = load_transform(Path({str(tmp_path)!r}), spec, signature)
transform.before({{"text": np.full((64, 1), b"the cat sat " * 1000, object)}})
assert len(os.listdir("/proc/self/task")) == threads
child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
"""],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": "/usr/bin:/bin"},  # without TOKENIZERS_PARALLELISM, which hides the warning
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


# --- labels


def test_labels_are_those_of_the_highest_scores_when_asked_for(tmp_path: Path) -> None:
    transform = load_labels(tmp_path, replace(LABELS, top=2, scores="score"))
    y = np.array([[0.1, 0.3, 0.2], [3, 1, 2]], np.float32)
    made = transform.after({"y": y})
    assert list(made) == ["y", "label", "score"]
    assert made["y"] is y
    assert words(made["label"]) == [["dog", "Ship ä"], ["cat", "Ship ä"]]
    np.testing.assert_array_equal(made["score"], np.array([[0.3, 0.2], [3, 2]], np.float32))
    assert (made["label"].dtype, made["score"].dtype) == (np.dtype(object), np.float32)


def test_labels_stand_instead_of_the_scores_when_those_are_not_kept(tmp_path: Path) -> None:
    transform = load_labels(tmp_path, replace(LABELS, name="y", keep=False))
    made = transform.after({"y": np.array([[0, 1, 0]], np.float32)})
    assert words(made["y"]) == [["dog"]]
    assert transform.signature.outputs == (TensorSpec("y", "BYTES", (-1, 1)),)


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        pytest.param([1, 1, 1], ["cat", "dog", "Ship ä"], id="all are equal"),
        pytest.param([1, 2, 2], ["dog", "Ship ä", "cat"], id="the highest are equal"),
        pytest.param([np.nan, 0, 1], ["Ship ä", "dog", "cat"], id="one is NaN"),
        pytest.param([-np.inf, np.nan, np.inf], ["Ship ä", "cat", "dog"], id="some are infinite"),
    ],
)
def test_labels_have_one_order_when(tmp_path: Path, scores: list[float], order: list[str]) -> None:
    transform = load_labels(tmp_path, replace(LABELS, top=3))
    assert words(transform.after({"y": np.array([scores], np.float32)})["label"]) == [order]


def test_labels_have_one_order_when_many_are_equal(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).integers(0, 3, (4, 1000)).astype(np.float32)
    (tmp_path / "many.txt").write_text("\n".join(map(str, range(1000))))
    spec = TransformSpec(outputs=(replace(LABELS, file="many.txt", top=700),))
    signature = engine(outputs=[replace(SCORES, shape=(-1, 1000))])
    made = load_transform(tmp_path, spec, signature).after({"y": scores})["label"]
    for row, found in zip(scores.tolist(), words(made), strict=True):
        assert list(map(int, found)) == sorted(range(1000), key=lambda n: (-row[n], n))[:700]


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_labels_have_scores_in_fp32_when_the_engine_gives(tmp_path: Path, datatype: str) -> None:
    spec = replace(LABELS, top=3, scores="score")
    transform = load_labels(tmp_path, spec, replace(SCORES, datatype=datatype))
    made = transform.after({"y": np.array([[0.5, 0.25, 1]], NUMPY_DTYPES[datatype])})
    assert words(made["label"]) == [["Ship ä", "cat", "dog"]]
    np.testing.assert_array_equal(made["score"], np.array([[1, 0.5, 0.25]], np.float32))


def test_labels_are_left_out_when_the_engine_ran_without_their_scores(tmp_path: Path) -> None:
    other = TensorSpec("z", "INT64", (-1,))
    transform = load_labels(tmp_path, LABELS, SCORES, other)
    assert list(transform.after({"z": np.array([1])})) == ["z"]


def test_labels_are_known_by_output_when_asked_for(tmp_path: Path) -> None:
    transform = load_labels(tmp_path, LABELS, SCORES, TensorSpec("z", "FP32", (-1, 3)))
    assert transform.labels("y") == ("cat", "dog", "Ship ä")
    assert transform.labels("z") == ()


def test_labels_fail_when_the_engine_gives_other_than_one_score_each(tmp_path: Path) -> None:
    transform = load_labels(tmp_path, LABELS, replace(SCORES, shape=(-1, -1)))
    assert words(transform.after({"y": np.eye(3, dtype=np.float32)})["label"])[1] == ["dog"]
    with pytest.raises(ArtifactInvalid, match=r"3 labels, output 'y' has \[1, 4\] scores"):
        transform.after({"y": np.zeros((1, 4), np.float32)})


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        pytest.param(b"a\nb\nc", ("a", "b", "c"), id="doesn't end its last line"),
        pytest.param(b"a\r\nb\r\nc\r\n", ("a", "b", "c"), id="is from Windows"),
        pytest.param(b"\xef\xbb\xbfa\nb\nc\n", ("a", "b", "c"), id="has a byte order mark"),
        pytest.param("a\u2028\nb \nc, d\n".encode(), ("a\u2028", "b ", "c, d"),
                     id="has odd characters"),
    ],
)  # fmt: skip
def test_labels_are_lines_when_the_file(
    tmp_path: Path, content: bytes, labels: tuple[str, ...]
) -> None:
    (tmp_path / "classes").write_bytes(content)
    spec = TransformSpec(outputs=(replace(LABELS, file="classes"),))
    signature = engine(TensorSpec("x", "FP32", (-1, 4)))
    assert load_transform(tmp_path, spec, signature).labels("y") == labels


# --- what clients see


def test_signature_has_the_public_tensors_in_their_places_when_some_are_declared() -> None:
    first, mask, ids, last = (
        TensorSpec("first", "FP32", (-1, 2)),
        TensorSpec("mask", "INT64", (-1, -1)),
        TensorSpec("ids", "INT64", (-1, -1)),
        TensorSpec("last", "FP32", (-1, 2)),
    )
    z = TensorSpec("z", "FP32", (-1,))
    spec = TransformSpec(
        inputs=(replace(TEXT, mask="mask"),), outputs=(replace(LABELS, scores="score", top=2),)
    )
    public = public_signature(spec, engine(first, mask, ids, last, outputs=(SCORES, z)))
    assert public.inputs == (first, TensorSpec("text", "BYTES", (-1, 1)), last)
    assert public.outputs == (
        SCORES,
        TensorSpec("label", "BYTES", (-1, 2)),
        TensorSpec("score", "FP32", (-1, 2)),
        z,
    )
    assert public.batched


def test_signature_is_the_engines_when_nothing_is_declared() -> None:
    transform = load_transform(ROOT, TransformSpec(), text_engine())
    assert transform.signature == text_engine()
    tensors: dict[str, Array] = {"ids": np.ones((1, 2))}
    assert transform.before(tensors) == tensors
    assert transform.after(tensors) == tensors


def test_inputs_of_the_engine_are_passed_on_when_others_are_declared(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    transform = load_text(tmp_path, TEXT, text_engine())
    mask = np.ones((1, 3))
    made = transform.before({"mask": mask, "text": column(b"cat")})
    assert made.keys() == {"mask", "ids"}
    assert made["mask"] is mask


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        pytest.param({}, "inputs", id="missing"),
        pytest.param({"photo": column(b"")[:, 0]}, "inputs.photo.shape", id="of one axis"),
        pytest.param({"photo": np.full((1, 2), b"", object)}, "inputs.photo.shape", id="too wide"),
        pytest.param({"photo": column()}, "inputs.photo.shape", id="without rows"),
        pytest.param({"photo": np.zeros((1, 1), np.uint8)}, "inputs.photo.datatype", id="no bytes"),
    ],
)
def test_input_is_refused_when_it_is(inputs: dict[str, Array], field: str) -> None:
    assert refused(lambda: load_image(PHOTO).before(inputs)).field == field


# --- threads


def test_results_are_the_same_when_many_threads_ask_at_once(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\nship\n")
    spec = TransformSpec(
        inputs=(replace(PHOTO, size=(16, 16)), replace(FULL_TEXT, max_length=64)),
        outputs=(replace(LABELS, top=3, scores="score"),),
    )
    signature = replace(text_engine(), inputs=(*image_engine().inputs, *text_engine().inputs))
    transform = load_transform(tmp_path, spec, signature)
    random = np.random.default_rng(0)

    def request(number: int) -> dict[str, Array]:
        text = " ".join(random.choice(WORDS, number % 70 + 1)).encode()
        form = ("PNG", "JPEG", "WEBP", "BMP")[number % 4]
        return {
            "photo": column(encoded(noise(20 + number, 30, seed=number), form)),
            "text": column(text),
        }

    def answer(inputs: dict[str, Array]) -> list[tuple[str, str, list[Any]]]:
        tensors = transform.before(inputs)
        outputs = transform.after({"y": tensors["image"][:, :3, 0, 0]})
        return [(n, a.dtype.str, a.tolist()) for n, a in (tensors | outputs).items()]

    requests = [request(number) for number in range(32)]
    alone = [answer(inputs) for inputs in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, itertools.chain(*[requests] * 4)))
    assert together == alone * 4


# --- what a declaration may say


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        pytest.param(replace(PHOTO, mean=()), r"inputs\.0\.mean: got \[\]", id="no mean"),
        pytest.param(replace(PHOTO, mean=(0.0, 0.0)), r"inputs\.0\.mean", id="two means"),
        pytest.param(replace(PHOTO, mean=(0.0, 0.0, np.nan)), r"inputs\.0\.mean", id="a NaN mean"),
        pytest.param(replace(PHOTO, std=(1.0,)), r"std: .* want 3 finite", id="too few std"),
        pytest.param(replace(PHOTO, std=(1.0, 0.0, 1.0)), r"inputs\.0\.std", id="a std of 0"),
        pytest.param(replace(PHOTO, size=(0, 4)), r"inputs\.0\.size: got \(0, 4\)", id="no height"),
        pytest.param(replace(PHOTO, size=(4, 5000)), r"inputs\.0\.size", id="a size too large"),
        pytest.param(replace(PHOTO, resize=0), r"inputs\.0\.resize", id="a resize of 0"),
        pytest.param(replace(PHOTO, resize=5000), r"inputs\.0\.resize", id="a resize too large"),
        pytest.param(replace(PHOTO, resize=8, size=(4, 9)), r"resize: got 8, want 9 \(the longer",
                     id="a resize below the size"),
        pytest.param(replace(PHOTO, name=""), r"inputs: .* there and distinct", id="no name"),
        pytest.param(replace(TEXT, max_length=0), r"inputs\.0\.max_length", id="no length"),
        pytest.param(replace(TEXT, max_length=2**21), r"max_length", id="a length too large"),
        pytest.param(replace(TEXT, file=""), r"inputs\.0\.file", id="no tokenizer"),
        pytest.param(replace(TEXT, mask="ids"), r"each tensor of the engine once",
                     id="one tensor for two purposes"),
        pytest.param(replace(LABELS, top=0), r"outputs\.0\.top: got 0", id="a top of 0"),
        pytest.param(replace(LABELS, top=1001), r"outputs\.0\.top", id="a top too large"),
        pytest.param(replace(LABELS, file=""), r"outputs\.0\.file", id="no labels"),
        pytest.param(replace(LABELS, scores="label"), r"outputs: .* distinct",
                     id="labels and scores of one name"),
    ],
)  # fmt: skip
def test_spec_is_refused_by_itself_when_it_has(
    declared: ImageInput | TextInput | LabelOutput, problem: str
) -> None:
    with pytest.raises(ArtifactInvalid, match=rf"^here: transform\..*{problem}"):
        check_spec(spec_of(declared), "here")


def spec_of(*declared: ImageInput | TextInput | LabelOutput) -> TransformSpec:
    return TransformSpec(
        inputs=tuple(one for one in declared if not isinstance(one, LabelOutput)),
        outputs=tuple(one for one in declared if isinstance(one, LabelOutput)),
    )


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        pytest.param(spec_of(PHOTO, replace(PHOTO, name="other")), "each tensor of the engine once",
                     id="two inputs make one tensor"),
        pytest.param(spec_of(PHOTO, replace(PHOTO, tensor="other")), "distinct",
                     id="two inputs have one name"),
        pytest.param(spec_of(LABELS, replace(LABELS, name="other")), "each tensor of the engine",
                     id="one output is labelled twice"),
        pytest.param(spec_of(LABELS, replace(LABELS, tensor="z")), "distinct",
                     id="two outputs have one name"),
    ],
)  # fmt: skip
def test_spec_is_refused_by_itself_when(spec: TransformSpec, problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=problem):
        check_spec(spec, "here")


@pytest.mark.parametrize(
    ("declared", "signature", "problem"),
    [
        pytest.param(replace(PHOTO, tensor="picture"), image_engine(),
                     r"inputs\.0\.tensor: got 'picture', want one of image",
                     id="the tensor is unknown"),
        pytest.param(PHOTO, image_engine("INT64"), r"inputs\.0\.tensor: got 'INT64', want an",
                     id="the engine takes integers"),
        pytest.param(PHOTO, image_engine(shape=(-1, 3, -1)), r"\[-1, 3, -1\]",
                     id="the engine takes three axes"),
        pytest.param(PHOTO, image_engine(shape=(-1, 1, -1, -1)), r"takes \[-1, 3, -1, -1\]",
                     id="the engine takes grey"),
        pytest.param(replace(PHOTO, layout="NHWC"), image_engine(shape=(-1, 3, 8, 8)),
                     r"takes \[-1, -1, -1, 3\]", id="the layout is another"),
        pytest.param(PHOTO, image_engine(shape=(-1, 3, 8, 8)), r"takes \[-1, 3, -1, -1\]",
                     id="the engine's size is fixed and none declared"),
        pytest.param(replace(PHOTO, size=(8, 9)), image_engine(shape=(-1, 3, 9, 8)),
                     r"takes \[-1, 3, 8, 9\]", id="height and width are swapped"),
        pytest.param(PHOTO, image_engine("UINT8"), r"inputs\.0\.mean: .* want 0 as mean",
                     id="levels can't be normalized"),
        pytest.param(replace(PHOTO, std=(1e-6, 1.0, 1.0)), image_engine("FP16"),
                     r"inputs\.0\.std: .* finite in FP16", id="levels don't fit the datatype"),
        pytest.param(PHOTO, replace(image_engine(), batched=False), "axis 0 is the batch",
                     id="the engine has no batch"),
        pytest.param(replace(PHOTO, name="extra"),
                     engine(*image_engine().inputs, TensorSpec("extra", "FP32", (-1,))),
                     r"transform\.inputs: .* distinct", id="a name is the engine's other input's"),
        pytest.param(replace(TEXT, ids="words"), text_engine(), r"inputs\.0\.ids: got 'words'",
                     id="ids are unknown"),
        pytest.param(replace(TEXT, mask="m"), text_engine(), r"inputs\.0\.mask: got 'm'",
                     id="the mask is unknown"),
        pytest.param(FULL_TEXT, text_engine("FP32"), r"inputs\.0\.ids: got 'FP32'",
                     id="the engine takes no integers"),
        pytest.param(TEXT, engine(TensorSpec("ids", "INT64", (-1,))), r"inputs\.0\.ids: got \[-1\]",
                     id="ids have one axis"),
        pytest.param(replace(TEXT, mask="mask"),
                     engine(TensorSpec("ids", "INT64", (-1, -1)),
                            TensorSpec("mask", "INT64", (-1, 8))),
                     r"inputs\.0\.mask: got \[-1, 8\], want an input of \[-1, -1\]",
                     id="ids and mask differ"),
        pytest.param(TEXT, text_engine(length=5), r"max_length: got 6, want at most 5",
                     id="the engine's length is shorter"),
        pytest.param(replace(LABELS, tensor="z"), image_engine(), r"outputs\.0\.tensor: got 'z'",
                     id="the output is unknown"),
        pytest.param(LABELS, engine(outputs=[replace(SCORES, datatype="INT64")]),
                     r"outputs\.0\.tensor: got 'INT64'", id="scores are integers"),
        pytest.param(LABELS, engine(outputs=[replace(SCORES, shape=(-1, 3, 4))]),
                     r"outputs\.0\.tensor: got \[-1, 3, 4\]", id="scores have three axes"),
        pytest.param(replace(LABELS, name="y"), image_engine(), r"transform\.outputs: .* distinct",
                     id="the label's name is the kept output's"),
        pytest.param(LABELS, engine(outputs=[replace(SCORES, shape=(-1, 4))]),
                     r"labels\.txt: has 3 labels, want 4 for output 'y'",
                     id="there are fewer labels than classes"),
        pytest.param(replace(LABELS, top=4), image_engine(), r"labels\.txt: .* at least top 4",
                     id="there are fewer labels than asked for"),
        pytest.param(replace(TEXT, max_length=2), text_engine(),
                     r"tokenizer\.json: adds 2 special tokens",
                     id="no token but special ones has place"),
    ],
)  # fmt: skip
def test_load_refuses_the_spec_when(
    tmp_path: Path,
    declared: ImageInput | TextInput | LabelOutput,
    signature: Signature,
    problem: str,
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\nship\n")
    with pytest.raises(ArtifactInvalid, match=problem):
        load_transform(tmp_path, spec_of(declared), signature)


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        pytest.param(PHOTO, (-1, -1, -1, -1), id="nothing of the engine's is fixed"),
        pytest.param(replace(PHOTO, size=(8, 9)), (-1, 3, -1, -1), id="the channels are"),
        pytest.param(replace(PHOTO, size=(8, 9)), (-1, 3, 8, 9), id="all is"),
        pytest.param(replace(PHOTO, size=(8, 9), layout="NHWC"), (-1, 8, 9, 3), id="all is, last"),
    ],
)
def test_load_takes_the_spec_when(declared: ImageInput, shape: tuple[int, ...]) -> None:
    transform = load_transform(ROOT, spec_of(declared), image_engine(shape=shape))
    made = transform.before({"photo": column(encoded(noise(10, 20)))})["image"]
    assert all(want in (-1, got) for want, got in zip(shape, made.shape, strict=True))


@pytest.mark.parametrize(
    ("declared", "name", "content", "problem"),
    [
        pytest.param(LABELS, "labels.txt", None, "No such file", id="labels are missing"),
        pytest.param(LABELS, "labels.txt", b"a\n\nb", r"line 2: got none", id="a label is empty"),
        pytest.param(LABELS, "labels.txt", b"", r"line 1: got none", id="there are no labels"),
        pytest.param(LABELS, "labels.txt", b"a\n\xff\nb", "not UTF-8", id="labels aren't text"),
        pytest.param(LABELS, "labels.txt", b"a\n" * 9_000_000, "over", id="labels are too many"),
        pytest.param(TEXT, "tokenizer.json", None, "No such file", id="the tokenizer is missing"),
        pytest.param(TEXT, "tokenizer.json", b"{", "not a tokenizer", id="it is half a tokenizer"),
        pytest.param(TEXT, "tokenizer.json", b"{}", "not a tokenizer", id="it is another JSON"),
        pytest.param(TEXT, "tokenizer.json", b"\xff", "not a tokenizer", id="it isn't JSON"),
    ],
)
def test_load_names_the_file_when(
    tmp_path: Path,
    declared: TextInput | LabelOutput,
    name: str,
    content: bytes | None,
    problem: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    signature = replace(text_engine(), outputs=(SCORES,))
    with pytest.raises(ArtifactInvalid, match=rf"{name}: {problem}"):
        load_transform(tmp_path, spec_of(declared), signature)


@pytest.mark.parametrize(
    ("library", "declared", "extra"),
    [
        pytest.param("PIL", PHOTO, "trimserve[image]", id="Pillow"),
        pytest.param("tokenizers", TEXT, "trimserve[text]", id="tokenizers"),
    ],
)
def test_load_says_what_to_install_when_there_is_no(
    tmp_path: Path, library: str, declared: ImageInput | TextInput, extra: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"""
import sys
sys.modules[{library!r}] = None  # importing it raises ImportError
from pathlib import Path
from serve.engines import EngineUnavailable, Signature
from serve.tensor import TensorSpec
from serve.transform import ImageInput, TextInput, TransformSpec, load_transform
signature = Signature((TensorSpec("ids", "INT64", (-1, -1)),
                       TensorSpec("image", "FP32", (-1, 3, -1, -1))), ())
try:
    load_transform(Path({str(tmp_path)!r}), TransformSpec(inputs=({declared!r},)), signature)
except EngineUnavailable as error:
    print(error)
"""],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"pip install '{extra}'" in ended.stdout


# --- in manifests

EVERYTHING = TransformSpec(
    inputs=(replace(PHOTO, size=(8, 9), resize=10, layout="NHWC"), FULL_TEXT),
    outputs=(replace(LABELS, scores="score", top=3, keep=False),),
)


def test_spec_is_the_same_when_it_went_through_json() -> None:
    document = json.loads(json.dumps(asdict(EVERYTHING)))
    assert [one["kind"] for one in document["inputs"]] == ["image", "text"]
    assert pydantic.TypeAdapter(TransformSpec).validate_python(document) == EVERYTHING


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({"inputs": [{"kind": "sound", "name": "x"}]}, id="is unknown"),
        pytest.param({"inputs": [{"name": "x"}]}, id="is missing"),
    ],
)
def test_spec_is_refused_by_its_kind_when_that(document: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match="union_tag"):
        pydantic.TypeAdapter(TransformSpec).validate_python(document)


def test_files_are_all_that_a_spec_names_when_asked_for() -> None:
    assert files_of(EVERYTHING) == ("tokenizer.json", "labels.txt")
    assert files_of(TransformSpec()) == ()
