"""A folder of images, one sub-folder per class, decoded once into uint8 tensors."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Dataset
from .inputs import InputError, require

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def load_folder(folder: Path) -> Dataset:
    """Images of `folder/train/<class>/*` and `folder/test/<class>/*` (or `val`), as square RGB.

    The side is 32 pixels if the first readable training image's shorter side is at most 48, else
    64: the sizes that the models are made for. Larger images are scaled so that the shorter side
    fits, then cropped at the centre. Images that cannot be read are left out and named.

    Raises:
        InputError: a missing folder, no classes, test classes that training lacks, no readable image.
    """
    train, test = folder / "train", folder / "test"
    if not test.is_dir():
        test = folder / "val"
    for needed in (folder, train, test):
        if not needed.is_dir():
            raise InputError(
                f"--data-dir must be a folder with train/<class>/* and test/ or val/<class>/* images, "
                f"got {folder} (no folder {needed})"
            )
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    unknown = sorted({path.name for path in test.iterdir() if path.is_dir()} - set(classes))
    if len(classes) < 2 or unknown:
        why = f"class {unknown[0]} is in {test.name} only" if unknown else f"{len(classes)} in train"
        raise InputError(f"--data-dir must have the same two or more classes to train and test, got {why}")

    files = [  # of both parts: path, label
        [(path, label) for label, name in enumerate(classes) for path in _images(part / name)]
        for part in (train, test)
    ]
    side = _common_side([path for path, _ in files[0]])
    skipped: list[str] = []
    (train_x, train_y), (test_x, test_y) = (_decode_all(part, side, folder, skipped) for part in files)
    return Dataset(
        train_x, train_y, test_x, test_y, classes=len(classes), augment=True, skipped=tuple(skipped)
    )


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


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


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
