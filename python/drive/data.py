"""Image data sets, whole in memory as uint8 tensors, and seeded batches from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import cache_folder, cached, unpacked
from .inputs import InputError, require


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on all parts: streams of different purposes never coincide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Dataset:
    """Training and test images with their labels, on one device."""

    train_x: Tensor  # [N, C, H, W] uint8
    train_y: Tensor  # [N] int64
    test_x: Tensor  # [M, C, H, W] uint8
    test_y: Tensor  # [M] int64
    classes: int
    augment: bool  # crop and flip training images at random
    skipped: tuple[str, ...] = ()  # images that could not be read, by name

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def side(self) -> int:
        """Height and width of every image, in pixels."""
        return self.train_x.shape[2]

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training set, [C, 1, 1] float32."""
        return _channel_statistics(self.train_x)

    def to(self, device: str) -> Dataset:
        """The same data on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **moved)

    def limited(self, count: int | None) -> Dataset:
        """Only `count` training images (None, or more than there are: all), drawn by a fixed seed."""
        if count is None or count >= len(self.train_y):
            return self
        rng = torch.Generator().manual_seed(seed_of("limit"))
        chosen = torch.randperm(len(self.train_y), generator=rng)[:count]
        return replace(self, train_x=self.train_x[chosen], train_y=self.train_y[chosen])

    def fingerprint(self) -> str:
        """A digest of every image and label."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()


class Batches:
    """Normalised float32 batches: mean 0 and standard deviation 1 per channel over the training set.

    All work is done on the data's device, and an epoch's random numbers go there at once, so that no batch
    waits for the CPU.

    Args:
        padding: pixels around an image before its random crop, if the data are to be augmented.
        flip: mirror every other image, likewise.
    """

    def __init__(self, data: Dataset, size: int, seed: int, padding: int = 4, flip: bool = True):
        self.data, self.size, self.seed = data, size, seed
        self.padding, self.flip = padding, flip
        self._mean, self._std = (part.to(data.train_x.device) for part in data.statistics)

    def __len__(self) -> int:
        """Batches of an epoch; images that would make up a smaller last batch wait for another epoch."""
        return max(1, len(self.data.train_y) // self.size)

    def epoch(self, number: int, stream: str = "train") -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one epoch: order, crops and flips depend on (seed, stream, number) only.

        Yields:
            images [B, C, H, W] float32 and labels [B] int64.
        """
        data, device = self.data, self.data.train_x.device
        rng = torch.Generator().manual_seed(seed_of(self.seed, stream, number))
        count = len(data.train_y)
        order = torch.randperm(count, generator=rng).to(device)
        if data.augment:
            shifts = torch.randint(0, 2 * self.padding + 1, (2, count), generator=rng).to(device)
            mirrored = torch.randint(0, 1 + self.flip, (count,), generator=rng).bool().to(device)
        for begin in range(0, len(self) * self.size, self.size):
            part = slice(begin, begin + self.size)
            images = data.train_x[order[part]]
            if data.augment:
                images = crop_and_flip(images, shifts[:, part], mirrored[part], self.padding)
            yield self._normalised(images), data.train_y[order[part]]

    def endless(self, stream: str, on_batch: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches, epoch after epoch; `on_batch` is told of each."""
        number = 0
        while True:
            for batch in self.epoch(number, stream):
                on_batch()
                yield batch
            number += 1

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in order, none left out; shapes and dtypes as in `epoch`."""
        data = self.data
        for chosen in torch.split(torch.arange(len(data.test_y), device=data.test_y.device), 512):
            yield self._normalised(data.test_x[chosen]), data.test_y[chosen]

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() - self._mean) / self._std


def crop_and_flip(images: Tensor, shifts: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Each image [B, C, H, W] cut out of its padded self (black) at `shifts` [2, B]; some `mirrored` [B]."""
    count, _, height, width = images.shape
    device = images.device
    rows = shifts[0, :, None] + torch.arange(height, device=device)  # [B, H]
    columns = shifts[1, :, None] + torch.arange(width, device=device)  # [B, W]
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    image = torch.arange(count, device=device)[:, None, None]
    cropped = padded[image, :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return cropped.permute(0, 3, 1, 2).contiguous()


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """By exact counts of the 256 values, on the CPU."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.cpu().unbind(1)])
    weights = counts.double() / counts.sum(1, keepdim=True)  # [C, 256]
    mean = weights @ values
    std = (weights @ values.square() - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 1)  # images of a single colour
    return mean.float()[:, None, None], std.float()[:, None, None]


def load(name: str, folder: str | None = None) -> Dataset:
    """A data set by name, on the CPU.

    Image folders are decoded once and kept as tensors in the cache folder.

    Args:
        name: one of NAMES: "digits" are scikit-learn's, 8x8; CIFAR is downloaded if absent.
        folder: of the images: train/CLASS/* and test/CLASS/* (or val), also as a .tar.gz; for CIFAR that,
            or where torchvision's files lie or go (default: the cache folder).

    Raises:
        InputError: a missing package or folder, no network, a folder of another layout.
    """
    if name == "digits":
        if folder is not None:
            raise InputError(f"--data-dir must be left out with --data {name}, got {folder}")
        return _digits()
    if name in ("cifar10", "cifar100"):
        place = Path(folder) if folder else cache_folder()
        if place.is_file() or (place / "train").is_dir():
            return _images(place)
        return _cifar(name, place)
    if folder is None:
        raise InputError(f"--data-dir must be given with --data {name}, got nothing")
    return _images(Path(folder))


NAMES = ("digits", "cifar10", "cifar100", "tinyimagenet", "imagenet32", "imagefolder")


def locate(name: str, folder: str | None) -> str | None:
    """Where a data set lies in a folder of several: in `folder/name`, `folder/name.tar.gz`, or `folder`."""
    if folder is None or name == "digits":
        return None
    inside = (Path(folder) / name, Path(folder) / f"{name}.tar.gz")
    return next((str(path) for path in inside if path.exists()), folder)


def _images(place: Path) -> Dataset:
    """A folder of images, or an archive of one, by way of the cache."""
    from .imagefolder import load_folder

    def decode() -> Dataset:
        with unpacked(place) as folder:
            return load_folder(folder)

    return cached(place, decode)


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
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a bad checksum a RuntimeError
        raise InputError(
            f"--data-dir must hold {name} or be a folder to download it to, got {folder} ({error})"
        ) from error
    (train_x, train_y), (test_x, test_y) = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    )
    return Dataset(train_x, train_y, test_x, test_y, classes=len(train.classes), augment=True)
