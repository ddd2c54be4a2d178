"""Folders of images: their classes, their order, and reading them only when needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from optimizer.data.splits import load_splits
from optimizer.errors import SpecInvalid
from optimizer.spec import Columns, DataSpec, ImageSpec, SplitSpec

RGB = ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def write_images(folder: Path, level: int, names: str) -> None:
    """One image of a single colour for each name; they differ in their pixels, from `level`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names.split()):
        pixels = np.full((4, 4, 3), level + index, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, format="PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes in train, of which the others have two."""
    write_images(tmp_path / "train" / "cat", 0, "b.png a.PNG c.jpeg")
    write_images(tmp_path / "train" / "dog", 10, "a.webp")
    write_images(tmp_path / "train" / "ant" / "deep" / "down", 20, "z.bmp")
    write_images(tmp_path / "validation" / "dog", 30, "a.png b.png")
    write_images(tmp_path / "validation" / "ant", 40, "a.png")
    write_images(tmp_path / "test" / "cat", 50, "a.png")
    write_images(tmp_path / "test" / "dog", 60, "a.png b.png c.png")
    (tmp_path / "train" / "cat" / "readme.txt").write_text("no image")
    (tmp_path / "train" / "cat" / ".hidden.png").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def folder_data(folder: Path, **fields: Any) -> DataSpec:
    splits = {name: SplitSpec(path=folder / name) for name in ("train", "validation", "test")}
    return DataSpec(format="image_folder", **({"image": RGB} | splits | fields))


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(SpecInvalid) as caught:
        load()
    return str(caught.value)


def test_folder_gives_labels_by_the_sorted_subfolders_of_train(folder: Path) -> None:
    splits = load_splits(folder_data(folder), ["x"], seed=0)
    assert splits.n_classes == 3
    train, validation, test = splits.train.read(), splits.validation.read(), splits.test.read()
    levels = np.rint(train.inputs["x"][:, 0, 0, 0] * 255).astype(int).tolist()
    assert levels == [20, 1, 0, 2, 10]
    assert [samples.labels is not None for samples in (train, validation, test)] == [True] * 3
    assert np.asarray(train.labels).tolist() == [0, 1, 1, 1, 2]
    assert np.asarray(validation.labels).tolist() == [0, 2, 2]
    assert np.asarray(test.labels).tolist() == [1, 2, 2, 2]


def test_folder_gives_all_images_below_it_when_there_are_no_labels(folder: Path) -> None:
    write_images(folder / "test", 70, "loose.png")
    data = folder_data(folder, columns=Columns(label=None))
    splits = load_splits(data, ["x"], seed=0)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [5, 3, 5]
    assert splits.n_classes == 0
    assert splits.test.labels is None


def test_folder_gives_the_rows_that_are_named(folder: Path) -> None:
    test = SplitSpec(path=folder / "test", rows=(1, 3))
    split = load_splits(folder_data(folder, test=test), ["x"], seed=0).test
    levels = np.rint(split.read().inputs["x"][:, 0, 0, 0] * 255).astype(int).tolist()
    assert levels == [60, 61]


def test_folder_reads_images_when_they_are_asked_for(folder: Path) -> None:
    damaged = folder / "test" / "dog" / "b.png"
    damaged.write_bytes(b"no image")
    test = load_splits(folder_data(folder), ["x"], seed=0).test
    assert test.read([0, 1, 3]).inputs["x"].shape == (3, 3, 4, 4)
    assert refusal(test.read).startswith(f"{damaged}: want an image as JPEG")
    damaged.unlink()
    assert refusal(test.read).startswith(f"{damaged}: No such file")


def test_folder_refuses_images_that_are_in_two_splits_under_other_names(folder: Path) -> None:
    copied = (folder / "train" / "cat" / "b.png").read_bytes()
    (folder / "test" / "dog" / "copy.png").write_bytes(copied)
    message = refusal(lambda: load_splits(folder_data(folder), ["x"], seed=0))
    assert "1 samples of train are in test too" in message
    splits = load_splits(folder_data(folder, overlap="drop"), ["x"], seed=0)
    assert splits.n_dropped["train"] == 1


def test_folder_has_the_same_digest_when_it_is_moved(folder: Path) -> None:
    before = load_splits(folder_data(folder), ["x"], seed=0).digest
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert load_splits(folder_data(moved), ["x"], seed=0).digest == before


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("test/bee/a.png", "got the class 'bee', want those of train: ant, cat, dog"),
        ("test/a.png", "'a.png' has no class, want images in its subfolders only"),
        ("train/a.png", "'a.png' has no class"),
    ],
)
def test_folder_is_refused_when_an_image_lies_elsewhere(
    folder: Path, added: str, message: str
) -> None:
    path = folder / added
    write_images(path.parent, 90, path.name)
    assert message in refusal(lambda: load_splits(folder_data(folder), ["x"], seed=0))


def test_folder_is_refused_when_it_has_no_classes_or_one_or_no_images(folder: Path) -> None:
    empty = folder / "empty"
    empty.mkdir()
    data = folder_data(folder, train=SplitSpec(path=empty))
    message = refusal(lambda: load_splits(data, ["x"], seed=0))
    assert "has no subfolders, want one for each class" in message
    (empty / "cat").mkdir()
    assert "has no rows" in refusal(lambda: load_splits(data, ["x"], seed=0))
    write_images(empty / "cat", 200, "a.png b.png")
    message = refusal(lambda: load_splits(data, ["x"], seed=0))
    assert "got the class 'ant', want those of train: cat" in message
    only = {name: SplitSpec(path=write_only_cats(folder, name)) for name in ("validation", "test")}
    message = refusal(lambda: load_splits(data.model_copy(update=only), ["x"], seed=0))
    assert "every label is 0, want at least 2 classes" in message


def write_only_cats(folder: Path, name: str) -> Path:
    path = folder / f"{name} of cats"
    write_images(path / "cat", 100 if name == "test" else 150, "a.png b.png")
    return path
