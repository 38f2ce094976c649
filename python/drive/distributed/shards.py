"""The tensors of a step that are spread over ranks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from .placement import is_dtensor, part_of, rows, whole
from .team import Said, Team


class Shards:
    """Tensors that are spread over the ranks of a team.

    Attributes:
        parts: what this rank holds of each; of rows of larger tensors, once it has met the others.
    """

    def __init__(self, team: Team, weights: Mapping[str, Tensor]):
        """
        Args:
            weights: DTensors, and plain tensors: copies on all ranks, or with `team.rows` each rank's rows.

        Raises:
            ValueError: a placement that cannot be pruned.
        """
        self.team, self._weights = team, weights
        self.parts = {
            name: part_of(team.op, name, weight)
            if is_dtensor(weight)
            else whole(weight, team.size, owner=team.rank == 0)
            for name, weight in weights.items()
        }

    @property
    def said(self) -> Said:
        """What must be the same on all ranks before they `meet`."""

        def facts(weight: Tensor) -> object:
            if is_dtensor(weight):
                return tuple(weight.shape), weight.dtype, weight.placements, weight.device_mesh.shape
            return tuple(weight.shape[1:] if self.team.rows else weight.shape), weight.dtype

        named = ((name, facts(weight)) for name, weight in self._weights.items())
        return [("names", list(self._weights)), *named]

    def meet(self) -> dict[str, torch.Size]:
        """Shape of each whole tensor. All ranks must ask: they learn of each other's parts."""
        shapes = {name: weight.shape for name, weight in self._weights.items()}
        if self.team.rows:
            heights = torch.tensor([shape[0] if shape else 1 for shape in shapes.values()])
            totals = self.team.sum(heights, "count rows").tolist()
            for (name, weight), total in zip(self._weights.items(), totals, strict=True):
                self.parts[name] = rows(weight, self.team.rank, self.team.size, total)
                shapes[name] = torch.Size([total, *weight.shape[1:]])
        self._count_copies_on_other_meshes()
        return shapes

    def cut(
        self, boxes: Sequence[tuple[int, tuple[slice, ...]]]
    ) -> tuple[Shards, list[tuple[int, tuple[slice, ...]]]]:
        """The same for parts of the tensors: for boxes of some, by position, and where they lie on this rank.

        After the ranks have met.
        """
        pieces, places, parts = copy.copy(self), [], list(self.parts.items())
        pieces.parts = {}
        for number, (t, box) in enumerate(boxes):
            name, part = parts[t]
            pieces.parts[f"{name} ({number})"], place = part.within(box)
            places.append((t, place))
        return pieces, places

    def _count_copies_on_other_meshes(self) -> None:
        """With FSDP2 beside tensor parallelism, each rank of the latter has a copy of what only FSDP2 shards.

        Such copies are DTensors on meshes of their own, of some of the ranks. The first mesh is the owner.
        """
        meshes = {name: w.device_mesh for name, w in self._weights.items() if is_dtensor(w)}
        small = {name: mesh.mesh for name, mesh in meshes.items() if mesh.size() < self.team.size}
        if not small:
            return
        mine = dist.get_rank()
        here = torch.tensor([int(m.min()) if (m == mine).any() else sys.maxsize for m in small.values()])
        first = -self.team.largest(-here, "compare meshes")
        counts = self.team.sum((here == mine).long(), "compare meshes").tolist()
        for name, is_first, count in zip(small, (here == first).tolist(), counts, strict=True):
            part = self.parts[name]
            self.parts[name] = replace(part, copies=part.copies * count, owner=part.owner and is_first)
