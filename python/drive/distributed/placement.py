"""Where a rank's part of a tensor lies in the whole of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Is it a DTensor? `import drive` does not import them: where nobody has, there are none."""
    if type(tensor) in _PLAIN:  # the answer in a tenth of the time
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def reshard(model: nn.Module) -> nn.Module:
    """The same, its parameters the shards.

    After a forward pass without a backward one (an evaluation), FSDP2 leaves whole copies in their places, of
    the outermost module's at least. What happens to such a copy is lost.
    """
    for module in fsdp_modules(model):
        module.reshard()
    return model


def distributed_like(part: Tensor, whole: Tensor) -> Tensor:
    """A tensor with this part on this rank, placed as `whole` is."""
    if not is_dtensor(whole):
        return part
    return type(whole).from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, as a DTensor placed like another one. Nothing travels."""
    if is_dtensor(full) or not is_dtensor(like):
        return placed_as(full, like)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor spread over the ranks as another one is: for DTensors, all ranks must ask."""
    if not is_dtensor(tensor) or not is_dtensor(like) or tensor.placements == like.placements:
        return tensor
    return tensor.redistribute(placements=like.placements)


def check_placed(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless a tensor is spread over ranks as another one is, or both are plain."""
    if not is_dtensor(tensor) and not is_dtensor(like):
        return
    expected, got = _placed(like), _placed(tensor)
    if expected != got:
        raise ValueError(f"{op}: {name} must be {expected}, as its weight is, got {got}")


def _placed(tensor: Tensor) -> str:
    if not is_dtensor(tensor):
        return "a plain tensor"
    placements = ", ".join(map(str, tensor.placements))
    return f"a DTensor placed ({placements}) on {tensor.device_mesh}"


@dataclass(frozen=True)
class Run:
    """Neighbouring indices of one dimension; `before`: how many this rank has of smaller ones."""

    start: int
    stop: int
    before: int


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor: in every dimension some runs of its indices, in rising order.

    So the row-major order of the part is that of the whole tensor, whatever the placement.

    Attributes:
        numel: entries of the whole tensor.
        shape: of the whole tensor, or of an index space in which its entries lie in the same order.
        runs: by dimension.
        copies: ranks that hold the same part, this one included.
        owner: is this the one of them that counts it?
    """

    numel: int
    shape: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]
    copies: int = 1
    owner: bool = True

    @property
    def sizes(self) -> list[int]:
        """Shape of the part."""
        return [runs[-1].before + runs[-1].stop - runs[-1].start if runs else 0 for runs in self.runs]

    def positions(self, indices: Tensor) -> Tensor:
        """How many entries of the part come before these row-major indices of the whole tensor.

        Args:
            indices: [E] int64, from 0 to the number of entries.
        """
        found, on_path = torch.zeros_like(indices), torch.ones_like(indices, dtype=torch.bool)
        sizes = self.sizes
        if 0 in sizes:
            return found
        for d, runs in enumerate(self.runs):
            index = indices // math.prod(self.shape[d + 1 :])
            if d:
                index = index % self.shape[d]
            starts, stops, before = _columns(runs)
            at = (torch.searchsorted(starts, index, right=True) - 1).clamp(min=0)
            smaller = before[at] + (torch.minimum(index, stops[at]) - starts[at]).clamp(min=0)
            found += torch.where(on_path, smaller * math.prod(sizes[d + 1 :]), 0)
            on_path &= (starts[at] <= index) & (index < stops[at])
        return found

    def indices(self, positions: Tensor) -> Tensor:
        """Row-major indices in the whole tensor of these entries of the part.

        Args:
            positions: [E] int64, row-major in the part.
        """
        found = torch.zeros_like(positions)
        sizes = self.sizes
        for d, runs in enumerate(self.runs):
            here = positions // math.prod(sizes[d + 1 :]) % sizes[d]
            starts, _, before = _columns(runs)
            at = torch.searchsorted(before, here, right=True) - 1
            found += (starts[at] + here - before[at]) * math.prod(self.shape[d + 1 :])
        return found

    def within(self, box: Sequence[slice]) -> tuple[Part, tuple[slice, ...]]:
        """What this rank holds of a box of the whole tensor, and where in its part that lies.

        Args:
            box: in every dimension a slice from start to stop; none of a tensor of no dimension.
        """
        if not box:
            return self, ()
        runs, place = [], []
        for own, span in zip(self.runs, box, strict=True):
            inside = [run for run in own if run.start < span.stop and run.stop > span.start]
            ends = [(max(run.start, span.start), min(run.stop, span.stop)) for run in inside]
            first = inside[0].before + ends[0][0] - inside[0].start if inside else 0
            runs.append(_runs([(start - span.start, stop - span.start) for start, stop in ends]))
            place.append(slice(first, first + sum(stop - start for start, stop in ends)))
        shape = tuple(span.stop - span.start for span in box)
        return replace(self, numel=math.prod(shape), shape=shape, runs=tuple(runs)), tuple(place)


def whole(tensor: Tensor, copies: int = 1, owner: bool = True) -> Part:
    """The part of a rank that holds all of a tensor, as `copies` ranks do."""
    shape = tuple(tensor.shape) or (1,)
    return Part(tensor.numel(), shape, tuple(_runs([(0, size)]) for size in shape), copies, owner)


def rows(tensor: Tensor, rank: int, ranks: int, total: int) -> Part:
    """The part of a rank that holds some rows of a tensor, between those of the ranks before and after it.

    Args:
        tensor: the rows.
        rank, ranks: this one, of so many.
        total: rows of all ranks; also the index space of each, so that none need know how many another has.
    """
    height, *width = tuple(tensor.shape) or (1,)
    first = rank * total
    runs = _runs([(first, first + height)]), *(_runs([(0, size)]) for size in width)
    return Part(total * math.prod(width), (ranks * total, *width), runs)


def part_of(op: str, name: str, tensor: DTensor) -> Part:
    """This rank's part of a DTensor, called `name` in the messages of `op`.

    Raises:
        ValueError: a placement of another kind than Shard and Replicate.
    """
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    held: list[Any] = [range(size) for size in tensor.shape] or [range(1)]
    copies, owner = 1, True
    for mesh_dim, placement in enumerate(tensor.placements):
        ranks = mesh.size(mesh_dim)
        rank = 0 if coordinate is None else coordinate[mesh_dim]
        if placement.is_replicate():
            copies *= ranks
            owner &= rank == 0
        elif hasattr(placement, "dim"):
            dim = placement.dim % len(tensor.shape)
            held[dim] = _shard(placement, held[dim], ranks, rank)
        else:
            raise ValueError(f"{op}: {name} must have placements Shard and Replicate, got {placement}")
    if coordinate is None:  # not of this rank
        held, copies, owner = [range(0) for _ in held], 1, False
    part = Part(tensor.numel(), tuple(tensor.shape) or (1,), tuple(map(_runs_of, held)), copies, owner)
    if math.prod(part.sizes) != local(tensor).numel():
        raise ValueError(f"{op}: {name} must have {part.sizes} entries here, got {list(local(tensor).shape)}")
    return part


def _shard(placement: Any, held: Any, ranks: int, rank: int) -> Any:
    """A rank's share of these indices: the chunk that torch.chunk gives it, as a range if they are one."""
    if type(placement).__name__ == "Shard":
        chunk = -(-len(held) // ranks)
        return held[rank * chunk : (rank + 1) * chunk]
    # FSDP2 cuts what tensor parallelism has cut already: a chunk of every chunk
    pieces, _ = placement._split_tensor(torch.as_tensor(held), ranks, with_padding=False, contiguous=False)
    return pieces[rank]


def _runs_of(held: range | Tensor) -> tuple[Run, ...]:
    if isinstance(held, range):
        return _runs([(held.start, held.stop)])
    if not len(held):
        return ()
    breaks = (held.diff() != 1).nonzero().flatten().tolist()
    firsts, lasts = [0, *(b + 1 for b in breaks)], [*breaks, len(held) - 1]
    return _runs([(int(held[a]), int(held[b]) + 1) for a, b in zip(firsts, lasts, strict=True)])


def _runs(spans: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    runs, before = [], 0
    for start, stop in spans:
        if stop > start:
            runs.append(Run(start, stop, before))
            before += stop - start
    return tuple(runs)


def _columns(runs: Sequence[Run]) -> tuple[Tensor, Tensor, Tensor]:
    starts, stops, before = torch.tensor([(run.start, run.stop, run.before) for run in runs]).unbind(1)
    return starts.contiguous(), stops, before.contiguous()  # torch.searchsorted wants it so
