"""Sparse networks of the race: untrained, with masks of three kinds, made once and kept in files."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import drive
from drive.experiments.bench.networks import build, noise, settle_, uniform_masks

UNIFORM, COUNT, WORK = "uniform", "DRIVE by count", "DRIVE by multiply-adds"
KINDS = (UNIFORM, COUNT, WORK)
ITERATIONS, IMAGES, BATCHES = (
    5,
    4,
    5,
)  # of DRIVE, on noise: survivors need not be good, but not uniform


def sparse_network(name: str, kind: str, sparsity: float, folder: Path) -> tuple[nn.Module, drive.Masks]:
    """A settled network in eval mode, and its masks.

    Args:
        kind: one of KINDS.
        sparsity: of the weights; for WORK, of the multiply-adds.
        folder: where masks are kept.
    """
    model, shape = build(name)
    path = folder / f"{name}, {kind}, {sparsity:g}.safetensors"
    if path.exists():
        masks = drive.Masks.load(path)
    else:
        masks = uniform_masks(model, sparsity) if kind == UNIFORM else _by_drive(model, shape, kind, sparsity)
        folder.mkdir(parents=True, exist_ok=True)
        masks.save(path)
    return settle_(model, masks, shape), masks


def _by_drive(model: nn.Module, shape: tuple[int, ...], kind: str, sparsity: float) -> drive.Masks:
    images = noise(BATCHES * IMAGES, shape).split(IMAGES)
    labels = torch.randint(10, (BATCHES, IMAGES), generator=torch.Generator().manual_seed(0))
    goal = {"macs": 1 - sparsity} if kind == WORK else {"sparsity": sparsity}
    return drive.prune(
        copy.deepcopy(model), list(zip(images, labels, strict=True)), F.cross_entropy, **goal,
        iterations=ITERATIONS, min_keep=1, progress=False,
    )  # fmt: skip
