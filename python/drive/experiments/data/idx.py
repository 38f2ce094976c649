"""MNIST's own files: IDX, gzipped or not."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drive.experiments.runs.inputs import InputError

from .dataset import Dataset


def idx_folder(folder: Path) -> Path | None:
    """Where the IDX files lie: in the folder, or where torchvision puts them in it."""
    places = folder, folder / "raw", folder / "MNIST" / "raw"
    return next((place for place in places if _file(place, "train-images-idx3-ubyte") is not None), None)


def load_idx(folder: Path) -> Dataset:
    """Images [N, 1, H, W] and labels of the four files.

    Raises:
        InputError: one is missing or none of IDX.
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
    classes = int(max(train_y.max(), test_y.max())) + 1
    return Dataset(train_x, train_y, test_x, test_y, classes=classes, augment=False)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str, dimensions: int) -> Tensor:
    """An IDX file of bytes: two zeros, the type (8: bytes), the dimensions' number and sizes, the bytes."""
    path = _file(folder, name)
    if path is None:
        raise InputError(f"--data-dir must hold {name} (or {name}.gz), got {folder}")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    sizes = np.frombuffer(data[4 : 4 + 4 * dimensions], dtype=">i4")
    begin = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) - begin != int(np.prod(sizes, dtype=np.int64)):
        raise InputError(f"--data-dir must hold IDX files, got {path}, which is none or cut off")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(sizes).copy())
