"""Folders of images, one subfolder a class, as torchvision's `ImageFolder` reads them.

Names and sizes are read at once, the images themselves when they are needed. What decodes them is
the table's matter.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from optimizer.data.table import EncodedImages, row_range
from optimizer.errors import SpecInvalid
from optimizer.spec import ImageSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Of the formats that the server decodes, in lower case or capitals; others are passed over."""
MAX_FILE_BYTES = 256 * 2**20
"""Of an image: encoded ones of the most pixels that are decoded are below it."""


@dataclass(frozen=True, eq=False)
class ImageFiles(Sequence[bytes]):
    """The bytes of files, each read when it is asked for and not kept. Raises SpecInvalid for one
    that can't be read."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...
    def __getitem__(self, index: int | slice) -> "bytes | ImageFiles":
        if isinstance(index, slice):
            return ImageFiles(self.paths[index])
        path = self.paths[index]
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise SpecInvalid(str(path), [f"{path}: {error.strerror or error}"]) from error
        if len(content) > MAX_FILE_BYTES:
            raise SpecInvalid(
                str(path), [f"{path}: got over {MAX_FILE_BYTES} bytes, want a smaller image"]
            )
        return content


def read_folder(
    root: Path,
    rows: tuple[int, int] | None,
    image: ImageSpec,
    input_name: str,
    *,
    has_labels: bool,
    classes: Sequence[str] | None,
) -> EncodedImages:
    """The images below `root`, in the order of their paths.

    With labels each lies in a subfolder, at any depth, whose place among `classes` is its label;
    without `classes` they are root's own subfolders, sorted by name. Links to folders below those
    aren't followed. Raises SpecInvalid for images without a class, or with one that isn't listed.
    """
    known = tuple(classes if classes is not None else _subfolders(root)) if has_labels else ()
    if has_labels:
        _check_classes(root, known)
    folders = [root / name for name in known] if has_labels else [root]
    found = [(path, label) for label, folder in enumerate(folders) for path in _images(folder)]
    first, stop = row_range(str(root), len(found), rows)
    kept = [path for path, _ in found[first:stop]]
    labels = np.array([label for _, label in found[first:stop]], dtype=np.int64)
    return EncodedImages(
        source=str(root),
        input_name=input_name,
        encoded=ImageFiles(kept),
        labels=labels if has_labels else None,
        n_classes=len(known) or None,
        image=image,
        first_row=first,
        names=[str(path) for path in kept],
        classes=known or None,
    )


def _subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def _check_classes(root: Path, known: Sequence[str]) -> None:
    problems = []
    if not known:
        problems.append(
            f"{root}: has no subfolders, want one for each class (data.columns.label: null for "
            "images without labels)"
        )
    unknown = sorted(set(_subfolders(root)) - set(known))
    if unknown:
        shown = ", ".join(known[:10]) + (" …" if len(known) > 10 else "")
        problems.append(f"{root}: got the class '{unknown[0]}', want those of train: {shown}")
    loose = [path.name for path in sorted(root.iterdir()) if _is_image(path.name)]
    if known and loose:
        problems.append(f"{root}: '{loose[0]}' has no class, want images in its subfolders only")
    if problems:
        raise SpecInvalid(str(root), problems)


def _images(folder: Path) -> list[Path]:
    """In the order of their paths below `folder`, which needn't exist."""
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if _is_image(name)
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
