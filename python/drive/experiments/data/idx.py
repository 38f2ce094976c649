"""MNIST's own files: IDX, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drive.experiments.runs.inputs import InputError

from .dataset import Dataset
from .names import shown


def idx_folder(folder: Path) -> Path | None:
    """Where the IDX files lie: in the folder, or where torchvision puts them in it."""
    places = folder, folder / "raw", folder / "MNIST" / "raw"
    return next((place for place in places if _file(place, "train-images-idx3-ubyte") is not None), None)


def load_idx(folder: Path) -> Dataset:
    """Images [N, 1, H, W] and labels of the four files.

    Raises:
        InputError: one is missing, damaged or none of IDX; images without labels, or none, or not all of one
            side.
        OSError: a file that the system does not read.
    """
    parts: list[Tensor] = []
    for part in ("train", "t10k"):
        images = _read(folder, f"{part}-images-idx3-ubyte", 3)
        labels = _read(folder, f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise InputError(
                f"--data-dir must hold a label for each image, got {len(labels)} for {len(images)}"
            )
        parts += [images.unsqueeze(1), labels.long()]
    train_x, train_y, test_x, test_y = parts
    sizes = {tuple(images.shape[1:]) for images in (train_x, test_x)}
    height, width = train_x.shape[2:]
    if len(sizes) > 1 or height != width or 0 in train_x.shape + test_x.shape:
        got = " and ".join(str(list(images.shape)) for images in (train_x, test_x))
        raise InputError(f"--data-dir must hold images [N, 1, H, H] to train and test, got {got}")
    classes = int(max(train_y.max(), test_y.max())) + 1
    return Dataset(train_x, train_y, test_x, test_y, classes=classes, augment=False)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str, dimensions: int) -> Tensor:
    """An IDX file of bytes: two zeros, the type (8: bytes), the dimensions' number and sizes, the bytes."""
    path = _file(folder, name)
    if path is None:
        raise InputError(f"--data-dir must hold {name} (or {name}.gz), got {shown(folder)}")
    data = path.read_bytes()
    begin = 4 + 4 * dimensions
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        sizes = np.frombuffer(data[4:begin], dtype=">u4").tolist()
        found = np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(sizes)
        damaged = data[:4] != bytes([0, 0, 8, dimensions])
    # EOFError and gzip's OSError and zlib.error: cut off or damaged; ValueError: too short, or other sizes
    except (OSError, EOFError, zlib.error, ValueError):
        damaged = True
    if damaged:
        raise InputError(f"--data-dir must hold IDX files, got {shown(path)}, which is none or cut off")
    return torch.from_numpy(found.copy())
