"""A folder of images, one sub-folder per class, decoded once into uint8 tensors."""

from __future__ import annotations

import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drive.experiments.runs.inputs import InputError, require

from .dataset import Dataset

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def load_folder(place: Path, side: int | None = None) -> Dataset:
    """Images of `train/<class>/*` and `test/<class>/*` (or `val`), as square RGB, of a folder or tar archive.

    Also as Tiny ImageNet is published: images may lie in a folder `images` of their class, and those of
    `val` all in `val/images`, their classes in `val/val_annotations.txt`.

    Images of another size are scaled so that the shorter side fits, then cropped at the centre. Those that
    cannot be read are left out and named.

    Args:
        side: of the images, in pixels. None: 32 if the first readable training image's shorter side is at
            most 48, else 64, the sizes that the models are made for.

    Raises:
        InputError: a missing folder, no classes, test classes that training lacks, no readable image, a file
            that is no archive.
    """
    with _unpacked(place) as folder:
        return _load(folder, side)


def _load(folder: Path, side: int | None) -> Dataset:
    train = folder / "train"
    test = folder / ("test" if _classes(folder / "test") else "val")
    for needed in (folder, train, test):
        if not needed.is_dir():
            raise InputError(
                f"--data-dir must be a folder with train/<class>/* and test/ or val/<class>/* images, "
                f"got {folder} (no folder {needed})"
            )
    classes = _classes(train)
    annotations = test / "val_annotations.txt"
    unknown = [] if annotations.is_file() else sorted(set(_classes(test)) - set(classes))
    if len(classes) < 2 or unknown:
        why = f"class {unknown[0]} is in {test.name} only" if unknown else f"{len(classes)} in train"
        raise InputError(f"--data-dir must have the same two or more classes to train and test, got {why}")

    files = [  # of both parts: path, label
        [(path, label) for label, name in enumerate(classes) for path in _images(part / name)]
        for part in (train, test)
    ]
    if annotations.is_file():
        files[1] = _annotated(annotations, classes)
    side = side or _common_side([path for path, _ in files[0]])
    skipped: list[str] = []
    (train_x, train_y), (test_x, test_y) = (_decode_all(part, side, folder, skipped) for part in files)
    return Dataset(
        train_x, train_y, test_x, test_y, classes=len(classes), augment=True, skipped=tuple(skipped)
    )


@contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    """A folder as it is, or what a tar archive holds, as long as the context lasts."""
    if not source.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="drive-") as folder:
        try:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(
                f"--data-dir must be a folder or a tar archive of one, got {source} ({error})"
            ) from error
        inside = list(Path(folder).iterdir())
        yield inside[0] if len(inside) == 1 and inside[0].is_dir() else Path(folder)


def _decode_all(
    files: list[tuple[Path, int]], side: int, folder: Path, skipped: list[str]
) -> tuple[Tensor, Tensor]:
    """Images [N, 3, side, side] uint8 and labels [N] int64; adds the unreadable files to `skipped`."""
    images, labels = [], []
    with ThreadPoolExecutor() as pool:  # the decoders release the interpreter's lock
        decoded = pool.map(lambda file: _decode(file[0], side), files)
        for (path, label), image in zip(files, decoded, strict=True):
            if image is None:
                skipped.append(str(path.relative_to(folder)))
            else:
                images.append(image)
                labels.append(label)
    if not images:
        raise InputError(f"--data-dir must have readable images to train and test, got {folder} without")
    return torch.stack(images), torch.tensor(labels)


def _classes(folder: Path) -> list[str]:
    """Names of the class folders, of which `images` is none."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "images")


def _images(folder: Path) -> list[Path]:
    """The images of a class, in its folder or in a folder `images` in there."""
    if not folder.is_dir():
        return []
    inside = folder / "images"
    folder = inside if inside.is_dir() else folder
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _annotated(annotations: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Path and label of the images in `images`, from lines of name, class and more, between tabs."""
    found = []
    for line in annotations.read_text().splitlines():
        name, label, *_ = line.split("\t")
        if label not in classes:
            raise InputError(
                f"--data-dir must have the same classes to train and test, got {label} in test only"
            )
        found.append((annotations.parent / "images" / name, classes.index(label)))
    return sorted(found)


def _common_side(files: list[Path]) -> int:
    for path in files:
        image = _open(path)
        if image is not None:
            return 32 if min(image.size) <= 48 else 64
    return 32


def _decode(path: Path, side: int) -> Tensor | None:
    """[3, side, side] uint8, or None if the file is no readable image."""
    image = _open(path)
    if image is None:
        return None
    if image.size != (side, side):
        image = require("PIL.ImageOps").fit(image, (side, side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _open(path: Path) -> Any:
    """An RGB image of Pillow, or None."""
    pillow = require("PIL.Image")
    try:
        with warnings.catch_warnings(), pillow.open(path) as image:
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            return image.convert("RGB")
    # what the decoders raise for broken files of the various formats
    except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError, Warning):
        return None
