"""What is pruned together in a tensor: single entries, N of M along the input, or blocks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from drive.layers import Layers, Weight

from .candidates import candidates
from .matrices import boxes
from .wrappers import owners

CHANNELS = "channels"  # outputs of layers, which several tensors have: drive.structured


class Structure(ABC):
    """A pattern of the surviving entries. Units are what it prunes as a whole.

    Attributes:
        size: entries of a unit.
    """

    size: int = 1

    @abstractmethod
    def check(self, op: str, name: str, weight: Tensor, axes: Weight) -> None:
        """Raise ValueError unless the weight can have this pattern.

        Args:
            axes: how the layer multiplies by it.
        """

    def check_plan(  # noqa: B027 (blocks go with everything)
        self,
        op: str,
        weights: Mapping[str, Tensor],
        axes: Mapping[str, Weight],
        scope: str,
        sparsity: float,
        min_keep: int,
    ) -> None:
        """Raise ValueError unless these go together with the pattern."""

    @abstractmethod
    def check_mask(self, op: str, name: str, mask: Tensor, axes: Weight) -> None:
        """Raise ValueError unless pruning can go on from this mask to the pattern."""

    @abstractmethod
    def pooled(self, score: Tensor, axes: Weight) -> Tensor:
        """Scores of the units, [units of the weight], from those of the entries, float64."""

    @abstractmethod
    def safe(self, score: Tensor, alive: Tensor, axes: Weight) -> Tensor:
        """Units that must not be pruned, bool, [units]."""

    def safe_units(self, entries: int) -> int:
        """How many these are in a weight of so many entries."""
        return 0

    def units_to_keep(self, min_keep: int) -> int:
        """Units beside the safe ones that hold the survivors which every matrix keeps at least."""
        return -(-min_keep // self.size)

    @abstractmethod
    def expand(self, units: Tensor, axes: Weight) -> Tensor:
        """Mask of the entries, [the weight's shape], from that of the units."""


@dataclass(frozen=True)
class NofM(Structure):
    """At least `n` survivors in every `m` neighbours along the input; exactly so many at 1 - n / m.

    2:4 is what NVIDIA's sparse tensor cores take (arXiv 2104.08378). On the way to the final sparsity, the
    weakest of those that their groups can spare go first.
    """

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """The one that it ends at."""
        return 1 - self.n / self.m

    def check(self, op: str, name: str, weight: Tensor, axes: Weight) -> None:
        if weight.dim() < 2 or _size(weight, axes, axes.inputs) % self.m:
            raise ValueError(
                f"{op}: {name} must have inputs in groups of {self.m} for structure {self.n}:{self.m}, "
                f"got shape {tuple(weight.shape)}: exclude it"
            )

    def check_plan(
        self,
        op: str,
        weights: Mapping[str, Tensor],
        axes: Mapping[str, Weight],
        scope: str,
        sparsity: float,
        min_keep: int,
    ) -> None:
        if abs(sparsity - self.sparsity) > 1e-9:
            raise ValueError(
                f"{op}: sparsity must be {self.sparsity:g} for structure {self.n}:{self.m}, got {sparsity}"
            )
        if scope == "erk":
            raise ValueError(
                f"{op}: scope must be global or uniform for structure {self.n}:{self.m}, got 'erk'"
            )
        for name, weight in weights.items():
            kept = self.safe_units(weight.numel()) // len(boxes(weight.shape, axes[name]))
            if min_keep > kept > 0:
                raise ValueError(
                    f"{op}: min_keep must be at most {kept}, what a matrix of {name} keeps, got {min_keep}"
                )

    def check_mask(self, op: str, name: str, mask: Tensor, axes: Weight) -> None:
        if bool((mask.movedim(axes.inputs, -1).unflatten(-1, (-1, self.m)).sum(-1) < self.n).any()):
            raise ValueError(
                f"{op}: masks[{name}] must leave {self.n} of every {self.m} inputs for structure "
                f"{self.n}:{self.m}, got fewer"
            )

    def pooled(self, score: Tensor, axes: Weight) -> Tensor:
        return score

    def safe(self, score: Tensor, alive: Tensor, axes: Weight) -> Tensor:
        groups = torch.where(alive, score, -torch.inf).movedim(axes.inputs, -1).unflatten(-1, (-1, self.m))
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        safe = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
        return safe.flatten(-2).movedim(-1, axes.inputs)

    def safe_units(self, entries: int) -> int:
        return entries // self.m * self.n

    def units_to_keep(self, min_keep: int) -> int:
        return 0  # the safe ones are enough

    def expand(self, units: Tensor, axes: Weight) -> Tensor:
        return units


@dataclass(frozen=True)
class Blocks(Structure):
    """Blocks of `rows` outputs x `columns` inputs of one matrix, at every position of a kernel its own.

    The score of a block is the sum of its entries' scores.
    """

    rows: int
    columns: int

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.rows * self.columns

    def check(self, op: str, name: str, weight: Tensor, axes: Weight) -> None:
        sizes = ((axes.outputs, self.rows), (axes.inputs, self.columns))
        if weight.dim() < 2 or any(_size(weight, axes, axis) % size for axis, size in sizes):
            raise ValueError(
                f"{op}: {name} must have a shape of whole blocks for structure {self.rows}x{self.columns}, "
                f"got {tuple(weight.shape)}: exclude it"
            )

    def pooled(self, score: Tensor, axes: Weight) -> Tensor:
        (low, first), (high, second) = sorted(((axes.outputs, self.rows), (axes.inputs, self.columns)))
        blocks: Tensor = score.unflatten(high, (-1, second)).unflatten(low, (-1, first))
        return blocks.sum((low + 1, high + 2))

    def check_mask(self, op: str, name: str, mask: Tensor, axes: Weight) -> None:
        kept = self.pooled(mask.double(), axes)
        if bool(((kept > 0) & (kept < self.size)).any()):
            raise ValueError(
                f"{op}: masks[{name}] must be of whole blocks for structure {self.rows}x{self.columns}"
            )

    def safe(self, score: Tensor, alive: Tensor, axes: Weight) -> Tensor:
        return torch.zeros_like(self.pooled(score, axes), dtype=torch.bool)

    def expand(self, units: Tensor, axes: Weight) -> Tensor:
        return units.repeat_interleave(self.rows, axes.outputs).repeat_interleave(self.columns, axes.inputs)


@cache
def structure(name: str) -> Structure | None:
    """The structure of that name: "unstructured" (None), "2:4" and the like, "4x4" and the like.

    Raises:
        ValueError: none of these.
    """
    if name == "unstructured":
        return None
    if (found := re.fullmatch(r"(\d+):(\d+)", name)) and 0 < int(found[1]) < int(found[2]):
        return NofM(int(found[1]), int(found[2]))
    if (found := re.fullmatch(r"(\d+)x(\d+)", name)) and int(found[1]) * int(found[2]) > 1:
        return Blocks(int(found[1]), int(found[2]))
    raise ValueError(
        f"structure must be 'unstructured', 'channels', 'N:M' (0 < N < M) or 'ROWSxCOLUMNS', got {name!r}"
    )


def axes_of(
    model: nn.Module, weights: Mapping[str, Tensor], layers: Layers | None = None
) -> dict[str, Weight]:
    """How the layers multiply by these weights: as [outputs, inputs, ...] where nobody knows."""
    known = {id(candidate.tensor): candidate.weight for candidate in candidates(model, layers)}
    tensors = {name: module._parameters[key] for name, (module, key) in owners(model).items()}
    return {name: known.get(id(tensors[name])) or Weight() for name in weights}


def _size(weight: Tensor, axes: Weight, axis: int) -> int:
    """Of one of the matrices, along an axis: a unit does not go over its end."""
    return weight.shape[axis] // (axes.parts if axis == axes.stacked else 1)
