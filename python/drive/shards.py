"""The tensors of a step that are spread over ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from .placement import Part, is_dtensor, part_of, rows, whole
from .team import Said, Team


def described(team: Team | None, weights: Mapping[str, Tensor]) -> Said:
    """What must be the same of these tensors on all ranks."""
    if team is None:
        return []

    def facts(weight: Tensor) -> object:
        if is_dtensor(weight):
            return tuple(weight.shape), weight.dtype, weight.placements
        return tuple(weight.shape[1:] if team.rows else weight.shape), weight.dtype

    return [("names", list(weights)), *((name, facts(weight)) for name, weight in weights.items())]


class Shards:
    """Tensors that are spread over the ranks of a team.

    Attributes:
        parts: what this rank holds of each.
        sizes: entries of each, on all ranks.
    """

    def __init__(self, team: Team, weights: Mapping[str, Tensor]):
        """
        Raises:
            ValueError: a placement that cannot be pruned.
        """
        self.team = team
        self.parts: dict[str, Part] = {}
        heights = torch.tensor([w.shape[0] if w.dim() else 1 for w in weights.values()])
        most, total = heights, heights
        if team.rows:
            most, total = team.largest(heights, "count rows"), team.sum(heights, "count rows")
        for index, (name, weight) in enumerate(weights.items()):
            if is_dtensor(weight):
                self.parts[name] = part_of(team.op, name, weight)
            elif team.rows:
                self.parts[name] = rows(weight, team.rank, team.size, int(most[index]), int(total[index]))
            else:
                self.parts[name] = whole(weight, team.size, owner=team.rank == 0)
        self._count_copies_on_other_meshes(weights)
        self.sizes = {name: part.numel for name, part in self.parts.items()}

    def _count_copies_on_other_meshes(self, weights: Mapping[str, Tensor]) -> None:
        """With FSDP2 beside tensor parallelism, each rank of the latter has a copy of what only FSDP2 shards.

        Such copies are DTensors on meshes of their own, of some of the ranks. The first mesh is the owner.
        """
        small = [n for n, w in weights.items() if is_dtensor(w) and w.device_mesh.size() < self.team.size]
        if not small:
            return
        mine = dist.get_rank()
        members = [weights[name].device_mesh.mesh for name in small]  # type: ignore[attr-defined]
        here = torch.tensor([int(m.min()) if (m == mine).any() else sys.maxsize for m in members])
        first = -self.team.largest(-here, "compare meshes")
        meshes = self.team.sum((here == mine).long(), "compare meshes").tolist()
        for name, is_first, count in zip(small, (here == first).tolist(), meshes, strict=True):
            part = self.parts[name]
            self.parts[name] = replace(part, copies=part.copies * count, owner=part.owner and is_first)
