"""Data sets by name: where their files are, and what makes tensors of them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from drive.experiments.runs.inputs import InputError, require

from .cache import cache_folder
from .dataset import Dataset, seed_of
from .idx import idx_folder, load_idx
from .imagefolder import load_folder
from .names import shown


def load(name: str, folder: str | None = None) -> Dataset:
    """A data set by name, on the CPU.

    Image folders are decoded once and kept as tensors in the cache folder; see `load_folder`.

    Args:
        name: one of NAMES: "digits" are scikit-learn's, 8x8; CIFAR is downloaded if absent.
        folder: of the images: train/CLASS/* and test/CLASS/* (or val), also as a .tar.gz; for CIFAR that,
            or where torchvision's files lie or go (default: the cache folder); for MNIST that, or where its
            IDX files lie.

    Raises:
        InputError: a missing package or folder, no network, a folder of another layout, damaged files, files
            that the system does not read.
    """
    try:
        return _load(name, folder)
    except OSError as error:
        raise InputError(f"--data-dir must be readable, got {shown(folder or 'none')} ({error})") from error


def _load(name: str, folder: str | None) -> Dataset:
    if name == "digits":
        if folder is not None:
            raise InputError(f"--data-dir must be left out with --data {name}, got {shown(folder)}")
        return _digits()
    cifar = name in ("cifar10", "cifar100")
    place = Path(folder) if folder else cache_folder() if cifar else None
    if place is None:
        raise InputError(f"--data-dir must be given with --data {name}, got nothing")
    if cifar and not place.is_file() and not (place / "train").is_dir():
        return _cifar(name, place)
    if name == "mnist" and (raw := idx_folder(place)):
        return load_idx(raw)
    return load_folder(place, _SIDES.get(name))


# in pixels, of images that come in folders; ImageNet's come in all sizes
_SIDES = {"mnist": 28, "cifar10": 32, "cifar100": 32, "tinyimagenet": 64, "imagenet32": 32}
NAMES = ("digits", "mnist", "cifar10", "cifar100", "tinyimagenet", "imagenet32", "imagefolder")


def locate(name: str, folder: str | None) -> str | None:
    """Where a data set lies in a folder of several: in `folder/name`, `folder/name.tar.gz`, or `folder`."""
    if folder is None or name == "digits":
        return None
    inside = (Path(folder) / name, Path(folder) / f"{name}.tar.gz")
    return next((str(path) for path in inside if os.path.exists(path)), folder)


def _digits() -> Dataset:
    """1797 handwritten digits, 8x8, values 0..16; 1437 to train and 360 to test, by a fixed seed."""
    found = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of("digits")))
    train, test = order[:1437], order[1437:]
    return Dataset(images[train], labels[train], images[test], labels[test], classes=10, augment=False)


def _cifar(name: str, folder: Path) -> Dataset:
    """torchvision's CIFAR-10 or CIFAR-100."""
    cifar = getattr(require("torchvision.datasets"), name.upper())
    try:
        train, test = (cifar(folder, train=part, download=True) for part in (True, False))
        (train_x, train_y), (test_x, test_y) = (
            (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
            for part in (train, test)
        )
        return Dataset(train_x, train_y, test_x, test_y, classes=len(train.classes), augment=True)
    except Exception as error:  # no network, a bad checksum, whatever unpickling damaged files leads to
        raise InputError(
            f"--data-dir must hold {name} or be a folder to download it to, got {shown(folder)} ({error})"
        ) from error
