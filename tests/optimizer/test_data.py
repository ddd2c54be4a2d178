"""Samples from files and functions, their splits, overlap and digests."""

import dataclasses
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from optimizer.data.images import ImageUnreadable, decode, from_pixels
from optimizer.data.splits import DataSplits, load_splits
from optimizer.errors import SpecInvalid
from optimizer.importable import Importable
from optimizer.spec import Columns, DataSpec, ImageSpec, SplitSpec, read_spec

RGB = ImageSpec(mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0))
GREY = ImageSpec(mean=(0.0,), std=(1.0,))
HUB_FEATURES = {
    "img": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "ship"], "_type": "ClassLabel"},
}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n: int, seed: int) -> list[bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return [png(image) for image in pixels]


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    features: dict[str, Any] | None = None,
    row_group_size: int = 4,
) -> Path:
    """As the Hugging Face hub writes them, several row groups and names of classes included."""
    column = pa.array(
        [{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)],
        type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"img": column, "label": pa.array(labels, type=pa.int64())})
    if features is not None:
        content = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": content})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def parquet_data(train: Path, validation: Path, test: Path, **fields: Any) -> DataSpec:
    settings: dict[str, Any] = {
        "columns": Columns(inputs={"image": "img"}),
        "image": RGB,
        "calibration_samples": 3,
    }
    return DataSpec(
        format="parquet",
        train=SplitSpec(path=train),
        validation=SplitSpec(path=validation),
        test=SplitSpec(path=test),
        **(settings | fields),
    )


@pytest.fixture
def parquet(tmp_path: Path) -> DataSpec:
    return parquet_data(
        write_parquet(tmp_path / "train.parquet", pictures(10, seed=1), [0, 1] * 5, HUB_FEATURES),
        write_parquet(tmp_path / "validation.parquet", pictures(6, seed=2), [0, 1] * 3),
        write_parquet(tmp_path / "test.parquet", pictures(5, seed=3), [1, 0, 1, 0, 2]),
    )


def write_npz(path: Path, n: int, seed: int, **arrays: np.ndarray) -> Path:
    generator = np.random.default_rng(seed)
    defaults = {
        "x": generator.normal(size=(n, 3)).astype(np.float64),
        "label": np.arange(n) % 2,
    }
    np.savez(path, **(defaults | arrays))
    return path


def numpy_data(folder: Path, **fields: Any) -> DataSpec:
    return DataSpec(
        format="numpy",
        **{
            name: SplitSpec(path=folder / f"{name}.npz") for name in ("train", "validation", "test")
        },
        **({"calibration_samples": 2} | fields),
    )


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    for seed, name in enumerate(("train", "validation", "test")):
        write_npz(tmp_path / f"{name}.npz", 8, seed)
    return tmp_path


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(SpecInvalid) as caught:
        load()
    return str(caught.value)


def test_parquet_gives_normalized_channels_first(parquet: DataSpec) -> None:
    splits = load_splits(parquet, ["image"], seed=0)
    samples = splits.validation.read()
    pixels = np.asarray(Image.open(io.BytesIO(pictures(6, seed=2)[4])), dtype=np.float64) / 255
    expected = (pixels - [0.5, 0.25, 0.0]) / [0.5, 0.5, 1.0]
    assert samples.inputs["image"].shape == (6, 3, 4, 4)
    assert samples.inputs["image"].dtype == np.float32
    np.testing.assert_allclose(
        samples.inputs["image"][4], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6
    )
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert samples.labels.dtype == np.int64


def test_parquet_gives_the_number_of_classes_when_the_hub_named_them(parquet: DataSpec) -> None:
    assert load_splits(parquet, ["image"], seed=0).n_classes == 3


@pytest.mark.parametrize(
    ("rows", "row_group_size"),
    [
        pytest.param((3, 9), 4, id="across row groups"),
        pytest.param((4, 8), 4, id="one whole row group"),
        pytest.param((9, 10), 4, id="the last row"),
        pytest.param((2, 3), 100, id="within the only row group"),
    ],
)
def test_parquet_reads_the_rows_that_are_named(
    tmp_path: Path, parquet: DataSpec, rows: tuple[int, int], row_group_size: int
) -> None:
    images, labels = pictures(10, seed=9), list(range(10))
    path = write_parquet(tmp_path / "rows.parquet", images, labels, None, row_group_size)
    data = parquet.model_copy(
        update={"validation": SplitSpec(path=path, rows=rows), "n_classes": 10}
    )
    samples = load_splits(data, ["image"], seed=0).validation.read()
    assert samples.labels is not None
    assert samples.labels.tolist() == labels[slice(*rows)]
    np.testing.assert_array_equal(samples.inputs["image"][0], decode(images[rows[0]], RGB))


def test_parquet_takes_plain_binary_when_the_column_is_no_struct(
    tmp_path: Path, parquet: DataSpec
) -> None:
    table = pa.table({"img": pictures(4, seed=5), "label": [0, 1, 0, 1]})
    pq.write_table(table, tmp_path / "plain.parquet")
    data = parquet.model_copy(update={"test": SplitSpec(path=tmp_path / "plain.parquet")})
    assert len(load_splits(data, ["image"], seed=0).test.read().inputs["image"]) == 4


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param(Columns(), "no column 'image', set data.columns.inputs; it has: img, label"),
        pytest.param(
            Columns(inputs={"image": "img"}, label="fine"),
            "no column 'fine', set data.columns.label",
        ),
        pytest.param(
            Columns(inputs={"image": "label"}, label="img"),
            "column 'label' is int64, want struct<bytes: binary, path: string> or binary",
        ),
        pytest.param(
            Columns(inputs={"image": "img"}, label="img"), "column 'img' is struct", id="no label"
        ),
        pytest.param(
            Columns(inputs={"picture": "img"}),
            "data.columns.inputs: got 'picture', want an input of the model: image",
        ),
    ],
)
def test_parquet_is_refused_when_columns_are_wrong(
    parquet: DataSpec, columns: Columns, message: str
) -> None:
    data = parquet.model_copy(update={"columns": columns})
    assert message in refusal(lambda: load_splits(data, ["image"], seed=0))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        pytest.param([*pictures(2, 7), None], [0, 1, 0], "row 2: no image bytes", id="no bytes"),
        pytest.param(pictures(3, 7), [0, None, 1], "row 1: no label", id="a missing label"),
        pytest.param(
            pictures(3, 7), [0, -1, 1], "data.test: got the label -1 at sample 1", id="below 0"
        ),
        pytest.param(
            pictures(3, 7),
            [0, 1, 3],
            "got the label 3 at sample 2 (1 in all), want 0 to 2",
            id="no such class",
        ),
        pytest.param([], [], "has no rows", id="empty"),
    ],
)
def test_parquet_is_refused_when_it_holds(
    tmp_path: Path, parquet: DataSpec, images: list, labels: list, message: str
) -> None:
    path = write_parquet(tmp_path / "bad.parquet", images, labels)
    data = parquet.model_copy(update={"test": SplitSpec(path=path)})
    assert message in refusal(lambda: load_splits(data, ["image"], seed=0))


def test_data_is_refused_when_rows_exceed_the_file(parquet: DataSpec) -> None:
    test = SplitSpec(path=parquet.test.path, rows=(2, 6))
    data = parquet.model_copy(update={"test": test})
    said = refusal(lambda: load_splits(data, ["image"], seed=0))
    assert said.startswith("data.test.rows: got [2, 6], want at most 5, the rows of ")


def test_data_is_refused_when_the_file_is_no_parquet(tmp_path: Path, parquet: DataSpec) -> None:
    (tmp_path / "no.parquet").write_bytes(b"PAR1 or not")
    data = parquet.model_copy(update={"test": SplitSpec(path=tmp_path / "no.parquet")})
    assert "not a parquet file" in refusal(lambda: load_splits(data, ["image"], seed=0))


def test_data_is_refused_when_train_has_a_single_class(tmp_path: Path, parquet: DataSpec) -> None:
    path = write_parquet(tmp_path / "single.parquet", pictures(4, seed=8), [1] * 4)
    data = parquet.model_copy(update={"train": SplitSpec(path=path)})
    assert "every label is 1, want at least 2 classes" in refusal(
        lambda: load_splits(data, ["image"], seed=0)
    )


def test_split_decodes_only_what_is_read(tmp_path: Path, parquet: DataSpec) -> None:
    images = [*pictures(3, seed=7), b"not an image"]
    path = write_parquet(tmp_path / "damaged.parquet", images, [0, 1, 0, 1])
    rows = SplitSpec(path=path, rows=(1, 4))
    test = load_splits(parquet.model_copy(update={"test": rows}), ["image"], seed=0).test
    assert len(test.read([0, 1]).inputs["image"]) == 2
    message = refusal(test.read)
    assert message.startswith(f"{path}: row 3: want an image as JPEG")


def test_split_reads_in_the_order_of_indices(parquet: DataSpec) -> None:
    validation = load_splits(parquet, ["image"], seed=0).validation
    everything, some = validation.read(), validation.read([4, 0, 4])
    np.testing.assert_array_equal(some.inputs["image"], everything.inputs["image"][[4, 0, 4]])
    assert some.labels is not None
    assert some.labels.tolist() == [0, 0, 0]
    assert some.digest != everything.digest == validation.digest
    with pytest.raises(IndexError):
        validation.read([6])


def test_image_sizes_are_refused_when_they_differ(tmp_path: Path, parquet: DataSpec) -> None:
    small = png(np.zeros((4, 6, 3), dtype=np.uint8))
    path = write_parquet(tmp_path / "sizes.parquet", [*pictures(2, 7), small], [0, 1, 0])
    data = parquet.model_copy(update={"test": SplitSpec(path=path)})
    assert "set data.image.size" in refusal(load_splits(data, ["image"], seed=0).test.read)
    sized = RGB.model_copy(update={"size": (2, 2)})
    test = load_splits(data.model_copy(update={"image": sized}), ["image"], seed=0).test
    assert test.read().inputs["image"].shape == (3, 3, 2, 2)


def test_calibration_is_a_seeded_part_of_train(parquet: DataSpec) -> None:
    splits = load_splits(parquet, ["image"], seed=0)
    again = load_splits(parquet, ["image"], seed=0)
    other = load_splits(parquet, ["image"], seed=1)
    train = {image.tobytes() for image in splits.train.read().inputs["image"]}
    calibration = [image.tobytes() for image in splits.calibration.read().inputs["image"]]
    assert len(set(calibration)) == len(splits.calibration) == 3
    assert set(calibration) <= train
    assert splits.calibration.digest == again.calibration.digest != other.calibration.digest
    assert splits.digest == again.digest != other.digest


def test_calibration_is_all_of_train_when_nothing_is_asked_and_train_is_small(
    parquet: DataSpec,
) -> None:
    data = parquet.model_copy(update={"calibration_samples": None})
    splits = load_splits(data, ["image"], seed=0)
    assert len(splits.calibration) == len(splits.train) == 10


def test_calibration_is_refused_when_train_is_smaller(parquet: DataSpec) -> None:
    data = parquet.model_copy(update={"calibration_samples": 11})
    assert "data.calibration_samples: got 11, want at most train's 10" in refusal(
        lambda: load_splits(data, ["image"], seed=0)
    )


def overlapping(tmp_path: Path, overlap: str) -> DataSpec:
    """Train shares 2 samples with validation and 1 (twice there) with test, validation 1."""
    shared = pictures(4, seed=20)
    train = [*pictures(6, seed=21), shared[0], shared[1], shared[2], shared[2]]
    validation = [*pictures(3, seed=22), shared[0], shared[1], shared[3]]
    test = [*pictures(3, seed=23), shared[2], shared[3]]
    return parquet_data(
        write_parquet(tmp_path / "train.parquet", train, [0, 1] * 5),
        write_parquet(tmp_path / "validation.parquet", validation, [0, 1] * 3),
        write_parquet(tmp_path / "test.parquet", test, [0, 1, 0, 1, 0]),
        overlap=overlap,
    )


def test_overlap_is_refused_with_counts_and_the_way_out(tmp_path: Path) -> None:
    data = overlapping(tmp_path, "refuse")
    lines = refusal(lambda: load_splits(data, ["image"], seed=0)).splitlines()
    assert [line.split(", want")[0] for line in lines] == [
        "data: 2 samples of train are in validation too",
        "data: 2 samples of train are in test too",
        "data: 1 samples of validation are in test too",
    ]
    assert all("data.overlap: drop" in line for line in lines)


def test_overlap_is_dropped_from_the_earlier_split_when_asked_for(tmp_path: Path) -> None:
    splits = load_splits(overlapping(tmp_path, "drop"), ["image"], seed=0)
    assert splits.n_dropped == {"train": 4, "validation": 1, "test": 0}
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [6, 5, 5]
    hashes = [
        {image.tobytes() for image in split.read().inputs["image"]}
        for split in (splits.train, splits.validation, splits.test)
    ]
    assert not hashes[0] & hashes[1]
    assert not hashes[0] & hashes[2]
    assert not hashes[1] & hashes[2]


def test_overlap_is_found_when_rows_of_one_file_overlap(arrays: Path) -> None:
    data = numpy_data(arrays).model_copy(
        update={
            "train": SplitSpec(path=arrays / "train.npz", rows=(0, 5)),
            "validation": SplitSpec(path=arrays / "train.npz", rows=(3, 8)),
        }
    )
    assert "2 samples of train are in validation" in refusal(lambda: load_splits(data, ["x"], 0))


def test_overlap_leaves_nothing_when_splits_are_equal(arrays: Path) -> None:
    same = SplitSpec(path=arrays / "test.npz")
    data = numpy_data(arrays, overlap="drop").model_copy(update={"validation": same})
    assert "data.validation: every sample" in refusal(lambda: load_splits(data, ["x"], 0))


def test_duplicates_within_a_split_are_kept_and_counted(arrays: Path) -> None:
    x = np.ones((8, 3)) * np.array([0, 1, 2, 3, 4, 5, 5, 5])[:, np.newaxis]
    write_npz(arrays / "validation.npz", 8, seed=0, x=x)
    splits = load_splits(numpy_data(arrays), ["x"], seed=0)
    assert splits.n_duplicates == {"train": 0, "validation": 2, "test": 0}
    assert len(splits.validation) == 8


def digest_of(data: DataSpec, name: str) -> str:
    splits: DataSplits = load_splits(data, ["image"], seed=0)
    return str(getattr(splits, name).digest)


def test_digest_changes_when_a_label_or_the_preprocessing_does(
    tmp_path: Path, parquet: DataSpec
) -> None:
    path = write_parquet(tmp_path / "relabelled.parquet", pictures(5, seed=3), [1, 0, 1, 0, 1])
    relabelled = parquet.model_copy(update={"test": SplitSpec(path=path)})
    brighter = parquet.model_copy(update={"image": RGB.model_copy(update={"mean": (0.0,) * 3})})
    digests = {digest_of(data, "test") for data in (parquet, relabelled, brighter)}
    assert len(digests) == 3


def test_digest_is_the_same_when_a_file_is_moved_and_compressed_anew(
    tmp_path: Path, parquet: DataSpec
) -> None:
    path = write_parquet(
        tmp_path / "moved.parquet", pictures(5, seed=3), [1, 0, 1, 0, 2], row_group_size=2
    )
    moved = parquet.model_copy(update={"test": SplitSpec(path=path)})
    assert digest_of(moved, "test") == digest_of(parquet, "test")


def test_npz_gives_floats_as_float32_and_keeps_integers(arrays: Path) -> None:
    tokens = np.arange(16).reshape(8, 2)
    write_npz(arrays / "train.npz", 8, 0, ids=tokens)
    write_npz(arrays / "validation.npz", 8, 1, ids=tokens)
    write_npz(arrays / "test.npz", 8, 2, ids=tokens)
    data = numpy_data(arrays, columns=Columns(inputs={"tokens": "ids"}))
    samples = load_splits(data, ["x", "tokens"], seed=0).test.read([1, 2])
    assert samples.inputs["x"].dtype == np.float32
    assert samples.inputs["tokens"].dtype == np.int64
    assert samples.inputs["tokens"].tolist() == [[2, 3], [4, 5]]


def test_npz_gives_no_labels_when_the_label_column_is_null(arrays: Path) -> None:
    splits = load_splits(numpy_data(arrays, columns=Columns(label=None)), ["x"], seed=0)
    assert splits.n_classes == 0
    assert splits.train.labels is None
    assert splits.train.read().labels is None


def test_npz_becomes_images_when_a_preprocessing_is_given(arrays: Path) -> None:
    for seed, name in enumerate(("train", "validation", "test")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 4, 4), dtype=np.uint8)
        write_npz(arrays / f"{name}.npz", 8, seed, x=pixels)
    splits = load_splits(numpy_data(arrays, image=GREY), ["x"], seed=0)
    samples = splits.test.read()
    assert samples.inputs["x"].shape == (8, 1, 4, 4)
    np.testing.assert_allclose(samples.inputs["x"][3, 0], pixels[3] / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"x": np.array([{}] * 8)}, "an array can't be read, want numbers alone", id="a pickle"
        ),
        pytest.param({"x": np.array(["a"] * 8)}, "want numbers [n, ...]", id="strings"),
        pytest.param({"x": np.full((8, 3), np.nan)}, "NaN or infinite", id="NaN"),
        pytest.param({"x": np.ones((7, 3))}, "unequal lengths: x 7, labels 8", id="a sample short"),
        pytest.param({"label": np.ones(8)}, "labels are float64 [8]", id="labels of floats"),
        pytest.param({"label": np.eye(8, dtype=int)}, "labels are int64 [8, 8]", id="one-hot"),
    ],
)
def test_npz_is_refused_when_it_holds(arrays: Path, changed: dict[str, Any], message: str) -> None:
    write_npz(arrays / "test.npz", 8, 2, **changed)
    assert message in refusal(lambda: load_splits(numpy_data(arrays), ["x"], seed=0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not a readable .npz file", id="nothing"),
        pytest.param(b"PK\x03\x04 cut off", "not a readable .npz file", id="half a zip"),
        pytest.param(b"\x80\x04N.", "not a readable .npz file, want one as", id="a pickle"),
        pytest.param(
            b"\x08\x08\x12\x07pytorch",
            "not a readable .npz file, want one as numpy",
            id="an ONNX model",
        ),
    ],
)
def test_npz_is_refused_when_the_file_is(arrays: Path, content: bytes, message: str) -> None:
    (arrays / "test.npz").write_bytes(content)
    assert message in refusal(lambda: load_splits(numpy_data(arrays), ["x"], seed=0))


def test_npz_is_refused_when_it_is_a_single_array(arrays: Path) -> None:
    with (arrays / "test.npz").open("wb") as file:
        np.save(file, np.ones(3))
    assert "want an .npz of several" in refusal(lambda: load_splits(numpy_data(arrays), ["x"], 0))


def test_npz_is_refused_when_an_array_is_missing(arrays: Path) -> None:
    message = refusal(lambda: load_splits(numpy_data(arrays), ["x", "y"], seed=0))
    assert "no array 'y', set data.columns; it has: x, label" in message


def test_labels_are_refused_when_only_some_splits_have_them(tmp_path: Path) -> None:
    (tmp_path / "mixed.py").write_text(
        "import numpy as np\n"
        "def train(): return np.arange(4.0), np.array([0, 1, 0, 1])\n"
        "def validation(): return np.arange(4.0) + 10, None\n"
        "def test(): return np.arange(4.0) + 20, np.array([0, 1, 0, 1])\n"
    )
    data = importable_data(tmp_path, "mixed")
    assert "data.validation: has no labels" in refusal(lambda: load_splits(data, ["x"], seed=0))


def importable_data(folder: Path, module: str) -> DataSpec:
    return DataSpec(
        format="importable",
        **{
            name: SplitSpec(call=Importable(module, name, folder))
            for name in ("train", "validation", "test")
        },
        calibration_samples=2,
    )


def test_importable_gives_arrays_and_leaves_the_path_alone(tmp_path: Path) -> None:
    (tmp_path / "sibling_of_samples.py").write_text("OFFSET = 10.0\n")
    (tmp_path / "samples.py").write_text(
        "import numpy as np\n"
        "def _make(start): return np.arange(start, start + 4), np.array([0, 1, 2, 1])\n"
        "def train(): return _make(0.0)\n"
        "def validation(): return {'x': _make(20.0)[0]}, [0, 1, 2, 1]\n"
        "def test():\n"
        "    from sibling_of_samples import OFFSET\n"
        "    return _make(OFFSET)\n"
    )
    path_before = list(sys.path)
    splits = load_splits(importable_data(tmp_path, "samples"), ["x"], seed=0)
    assert splits.test.read().inputs["x"].tolist() == [10, 11, 12, 13]
    assert splits.n_classes == 3
    assert sys.path == path_before
    assert "samples" not in sys.modules


def test_importables_do_not_meet_when_two_folders_have_the_same_module(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for folder in folders:
        (folder / "model.py").write_text(f"def build(): return {folder.name!r}\n")
    assert [Importable("model", "build", folder).call() for folder in folders] == [
        folder.name for folder in folders
    ]


def test_importable_finds_installed_modules_when_the_folder_has_none(tmp_path: Path) -> None:
    assert Importable("os.path", "join", tmp_path).load() is os.path.join


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param("raise RuntimeError('no disk')", "RuntimeError: no disk", id="raises"),
        pytest.param("return 'x'", "got str, want a tuple (inputs, labels), or", id="no tuple"),
        pytest.param(
            "return [1, 2, 3]", "item 0 is int, want a pair (input, label)", id="no pairs"
        ),
        pytest.param("return {'y': [1]}, None", "no inputs for x", id="lacks an input"),
    ],
)
def test_importable_is_refused_when_the_function(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(f"def train():\n    {body}\n")
    data = importable_data(tmp_path, "broken")
    found = refusal(lambda: load_splits(data, ["x"], seed=0))
    assert found.startswith("data.train: broken:train: ")
    assert message in found


def test_image_is_scaled_to_cover_and_cropped_at_the_centre() -> None:
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:6] = 255
    spec = GREY.model_copy(update={"size": (4, 4)})
    np.testing.assert_array_equal(from_pixels(pixels, spec), np.ones((1, 4, 4)))
    halved = GREY.model_copy(update={"resize": 2, "size": (2, 2)})
    assert from_pixels(pixels, halved).shape == (1, 2, 2)
    assert from_pixels(pixels, GREY.model_copy(update={"resize": 2})).shape == (1, 2, 4)


def test_image_is_read_as_rgb_or_grey_by_the_number_of_means() -> None:
    grey = png(np.full((2, 2), 51, dtype=np.uint8))
    assert decode(grey, RGB).shape == (3, 2, 2)
    np.testing.assert_allclose(decode(grey, GREY), np.full((1, 2, 2), 0.2), rtol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(60_000, 1_000), (10_000, 10_000), (50_000, 50_000)])
def test_image_is_refused_before_decoding_when_its_header_promises_too_much(
    width: int, height: int
) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    with pytest.raises(ImageUnreadable, match=r"pixels"):
        decode(bomb, RGB)


def test_image_is_refused_when_it_is_cut_off() -> None:
    with pytest.raises(ImageUnreadable, match="damaged"):
        decode(pictures(1, seed=0)[0][:60], RGB)


@pytest.mark.data
@pytest.mark.skipif(
    not {"TRIMSERVE_DATA", "TRIMSERVE_WEIGHTS"} <= os.environ.keys(),
    reason="TRIMSERVE_DATA and TRIMSERVE_WEIGHTS don't name the CIFAR-10 files",
)
def test_cifar10_has_disjoint_splits() -> None:
    spec = read_spec(Path(__file__).parents[2] / "examples" / "cifar10" / "spec.yaml")
    splits = load_splits(spec.data, ["image"], spec.seed)
    named = (splits.train, splits.validation, splits.test, splits.calibration)
    assert [len(split) for split in named] == [45_000, 5_000, 5_000, 512]
    assert not any(splits.n_dropped.values())
    assert not any(splits.n_duplicates.values())
    assert spec.slo.accuracy is not None
    assert len(splits.validation) >= spec.slo.accuracy.min_samples()
    assert dataclasses.fields(splits.validation.read([0]))
