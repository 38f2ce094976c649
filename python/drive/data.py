"""Image data sets, whole in memory as uint8 tensors, and seeded batches from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import InputError, require

PADDING = 4  # pixels around an image before its random crop


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

    def limited(self, count: int) -> Dataset:
        """Only `count` training images (all, if there are fewer), drawn by a fixed seed."""
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
    """Normalised float32 batches: mean 0 and standard deviation 1 per channel over the training set."""

    def __init__(self, data: Dataset, size: int, seed: int):
        self.data, self.size, self.seed = data, size, seed
        self._mean, self._std = (part.to(data.train_x.device) for part in data.statistics)

    def __len__(self) -> int:
        """Batches of an epoch; images that would make up a smaller last batch wait for another epoch."""
        return max(1, len(self.data.train_y) // self.size)

    def epoch(self, number: int, stream: str = "train") -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one epoch: order, crops and flips depend on (seed, stream, number) only.

        Yields:
            images [B, C, H, W] float32 and labels [B] int64.
        """
        data = self.data
        rng = torch.Generator().manual_seed(seed_of(self.seed, stream, number))
        order = torch.randperm(len(data.train_y), generator=rng).to(data.train_x.device)
        for chosen in torch.split(order, self.size)[: len(self)]:
            images = data.train_x[chosen]
            if data.augment:
                images = crop_and_flip(images, rng)
            yield self._normalised(images), data.train_y[chosen]

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


def crop_and_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image [B, C, H, W] shifted by up to PADDING pixels (black comes in), every other one mirrored."""
    count, _, height, width = images.shape
    device = images.device
    shifts = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=rng).to(device)
    mirrored = torch.randint(0, 2, (count, 1), generator=rng).bool().to(device)
    rows = shifts[0] + torch.arange(height, device=device)  # [B, H]
    columns = shifts[1] + torch.arange(width, device=device)  # [B, W]
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (PADDING,) * 4)
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

    Args:
        name: "digits" (scikit-learn's, 8x8, no download), "cifar10" (downloaded if absent), or
            "imagefolder".
        folder: where CIFAR-10 lies or goes (default: ~/.cache/drive-prune), or the image folder.

    Raises:
        InputError: a missing package or folder, no network, a folder of another layout.
    """
    if name == "imagefolder":
        from .imagefolder import load_folder

        if folder is None:
            raise InputError("--data-dir must be given with --data imagefolder, got nothing")
        return load_folder(Path(folder))
    if name == "cifar10":
        return _cifar10(Path(folder or os.path.expanduser("~/.cache/drive-prune")))
    if folder is not None:
        raise InputError(f"--data-dir must be left out with --data {name}, got {folder}")
    return _digits()


NAMES = ("digits", "cifar10", "imagefolder")


def _digits() -> Dataset:
    """1797 handwritten digits, 8x8, values 0..16; 1437 to train and 360 to test, by a fixed seed."""
    found = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of("digits")))
    train, test = order[:1437], order[1437:]
    return Dataset(images[train], labels[train], images[test], labels[test], classes=10, augment=False)


def _cifar10(folder: Path) -> Dataset:
    cifar = require("torchvision.datasets").CIFAR10
    try:
        train, test = (cifar(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a bad checksum a RuntimeError
        raise InputError(
            f"--data-dir must hold CIFAR-10 or be a folder to download it to, got {folder} ({error})"
        ) from error
    (train_x, train_y), (test_x, test_y) = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    )
    return Dataset(train_x, train_y, test_x, test_y, classes=10, augment=True)
