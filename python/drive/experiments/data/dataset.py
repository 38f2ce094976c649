"""A data set of images, whole in memory as uint8 tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


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
    skipped: tuple[tuple[str, str], ...] = ()  # files and folders that are left out: name, why

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

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every image and label."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """By exact counts of the 256 values, on the CPU."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.cpu().unbind(1)])
    weights = counts.double() / counts.sum(1, keepdim=True)  # [C, 256]
    mean = weights @ values
    std = (weights @ values.square() - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 1)  # images of a single colour
    return mean.float()[:, None, None], std.float()[:, None, None]
