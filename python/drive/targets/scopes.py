"""Which tensors compete with each other, and how many entries each of these groups loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import floor

import torch

Groups = list[tuple[list[str], int]]  # names of tensors, units (entries, or blocks) to prune among them
Shapes = Mapping[str, torch.Size]  # of the weights
Scope = Callable[[Shapes, int, int], Groups]  # shapes, units to prune, entries in a unit


def global_(shapes: Shapes, prune: int, unit: int = 1) -> Groups:
    """One ranking over all tensors."""
    return [(list(shapes), prune)]


def uniform(shapes: Shapes, prune: int, unit: int = 1) -> Groups:
    """A ranking per tensor, the same sparsity in each."""
    sizes = {name: shape.numel() // unit for name, shape in shapes.items()}
    share = prune / max(1, sum(sizes.values()))
    return _rounded({name: share * size for name, size in sizes.items()}, sizes, prune)


def erk(shapes: Shapes, prune: int, unit: int = 1) -> Groups:
    """A ranking per tensor, densities by Erdos-Renyi-Kernel (Evci et al., arXiv 1911.11134, Sec. 3).

    The density of a tensor is proportional to (sum of its sizes) / (product of its sizes), so that small
    tensors stay denser; tensors that would have more entries than there are stay dense, and the others
    share what is left.
    """
    sizes = {name: shape.numel() // unit for name, shape in shapes.items()}
    raw = {name: float(sum(shape)) for name, shape in shapes.items()}  # density * entries, up to a factor
    dense: set[str] = set()
    while True:
        keep = sum(sizes.values()) - prune - sum(sizes[name] for name in dense)
        rest = sum(raw[name] for name in raw if name not in dense)
        scale = keep / rest if rest else 0.0
        full = {name for name in raw if name not in dense and scale * raw[name] > sizes[name]}
        if not full:
            break
        dense |= full
    pruned = {name: 0.0 if name in dense else sizes[name] - scale * raw[name] for name in raw}
    return _rounded(pruned, sizes, prune)


_SCOPES: dict[str, Scope] = {"global": global_, "uniform": uniform, "erk": erk}


def names() -> list[str]:
    """Names that `groups` accepts."""
    return list(_SCOPES)


def groups(scope: str, shapes: Shapes, prune: int, unit: int = 1) -> Groups:
    """Groups of tensors that lose exactly `prune` units of `unit` entries in all.

    Raises:
        ValueError: an unknown scope.
    """
    if scope not in _SCOPES:
        raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, got {scope!r}")
    return _SCOPES[scope](shapes, prune, unit)


def _rounded(shares: Mapping[str, float], sizes: Mapping[str, int], total: int) -> Groups:
    """Whole numbers that add up to `total`: rounded down, the largest remainders one more (Hamilton)."""
    counts = {name: min(sizes[name], max(0, floor(share))) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    while (missing := total - sum(counts.values())) > 0:
        for name in [n for n in by_remainder if counts[n] < sizes[n]][:missing]:
            counts[name] += 1
    return [([name], count) for name, count in counts.items()]
