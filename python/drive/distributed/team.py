"""Ranks that take a step together: one fails if any fails, and nobody waits for who does something else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .placement import is_dtensor, reshard
from .wrappers import chain

Said = list[tuple[str, object]]  # an argument's name, and its value


class Team:
    """A process group in one operation."""

    def __init__(self, op: str, group: dist.ProcessGroup | None, device: torch.device, rows: bool = False):
        """
        Args:
            op: which operation, for the error messages.
            group: the ranks; None: all.
            device: where the tensors are. What is exchanged is there too, if the group's backend can have it
                (gloo would only copy it to the CPU and back).
            rows: a plain tensor holds this rank's rows of a larger one; else it is the same on all ranks.
        """
        self.rows = rows
        self.op, self.group = op, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
        if backends.get(device.type, "gloo") == "gloo":
            device = torch.device("cpu" if "cpu" in backends else next(iter(backends)))
        self.device = device

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over all ranks, on the CPU. `what` the ranks do, if they wait for each other in vain."""
        return self._all_reduce(tensor, "SUM", what)

    def largest(self, tensor: Tensor, what: str) -> Tensor:
        """The maximum over all ranks, likewise."""
        return self._all_reduce(tensor, "MAX", what)

    def agree(self, said: Said, error: Exception | None, what: str) -> None:
        """Raise, on all ranks, if one of them has an error, or says something else than the others.

        Raises:
            Exception: this rank's error.
            RuntimeError: another rank's one.
            ValueError: ranks differ in what they say.
        """
        # of one size, whatever is said: ranks with different models exchange it without harm
        digest = hashlib.sha256(repr(said if error is None else []).encode()).digest()
        words = torch.frombuffer(bytearray(digest), dtype=torch.int32).long()
        failed = torch.tensor([int(error is not None)])
        top = self.largest(torch.cat([failed, words, -words]), what)
        if int(top[0]):
            errors = self.gather(error and f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            rank = next(rank for rank, text in enumerate(errors) if text is not None)
            raise RuntimeError(f"{self.op}: rank {rank} raised {errors[rank]}")
        if not torch.equal(top[1:9], -top[9:]):
            raise ValueError(f"{self.op}: {_difference(self.gather(said))}")

    def _all_reduce(self, tensor: Tensor, how: str, what: str) -> Tensor:
        tensor = sent(tensor, self.device)
        try:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.group)
        except RuntimeError as error:  # a rank died, or the time-out of the group is over
            raise RuntimeError(
                f"{self.op}: rank {self.rank} of {self.size} waited for the others to {what}: {error}"
            ) from error
        return sent(tensor, torch.device("cpu"))

    def gather(self, mine: Any) -> list[Any]:
        """Anything from all ranks: for the words of an error, so only after something went wrong."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on a device. The host waits only for one that comes to the CPU from elsewhere."""
    if tensor.device.type == device.type:
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format)
    if device.type != "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    here = tensor.contiguous().to(device, non_blocking=True)
    torch.cuda.current_stream(tensor.device).record_event().synchronize()
    return here


def team_of(
    op: str,
    target: nn.Module | Mapping[str, Tensor] | Sequence[Tensor],
    process_group: dist.ProcessGroup | None = None,
) -> Team | None:
    """The ranks that prune this together; None: this process alone.

    Raises:
        ValueError: DTensors of meshes that are neither all ranks nor one group, and no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError(f"{op}: process_group must be None where torch.distributed is not initialised")
        return None
    tensors = _tensors(target)
    device = next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
    meshes = {t.device_mesh for t in tensors if is_dtensor(t)}
    wrapper = replicated(target)
    if process_group is not None:
        return Team(op, process_group, device, rows=wrapper is None and not meshes)
    if wrapper is not None:  # around DTensors: all ranks
        return Team(op, None if meshes else wrapper.process_group, device)
    if not meshes:
        return None
    if any(mesh.size() == dist.get_world_size() for mesh in meshes):
        return Team(op, None, device)
    if len(meshes) == 1 and (mesh := meshes.pop()).ndim == 1:
        return Team(op, mesh.get_group(), device)
    raise ValueError(
        f"{op}: process_group must be given for DTensors on several meshes of some ranks, got None"
    )


def replicated(model: object) -> DistributedDataParallel | None:
    """The wrapper that keeps the ranks' copies of a model equal, beneath others if there are any."""
    wrappers = chain(model) if isinstance(model, nn.Module) else ()
    return next((module for module in wrappers if isinstance(module, DistributedDataParallel)), None)


def _tensors(target: object) -> list[object]:
    if isinstance(target, nn.Module):
        return list(reshard(target).parameters())
    if isinstance(target, Mapping):
        return list(target.values())
    return list(target) if isinstance(target, Sequence) else []


@contextmanager
def together(team: Team | None, what: str) -> Iterator[Said]:
    """All ranks go on after it, or none (`Team.agree`); without a team it does nothing.

    Yields:
        a list, for what must be the same on all ranks.
    """
    said: Said = []
    error: Exception | None = None
    try:
        yield said
    except Exception as raised:  # an interrupt is not waited with
        error = raised
        if team is None:
            raise
    if team is not None:
        team.agree(said, error, what)


def together_from(team: Team | None, batches: Iterator[Any]) -> Iterator[Any]:
    """The same; when they run out on one rank, all raise its error, and none waits in a backward pass."""
    if team is None:
        yield from batches
        return
    while True:
        with together(team, "take a batch"):
            batch = next(batches)
        yield batch


def _difference(said: list[Said]) -> str:
    """Where another rank differs from the first one, in words."""
    rank, other = next((rank, other) for rank, other in enumerate(said) if other != said[0])
    pairs = zip_longest(said[0], other, fillvalue=("argument", "nothing"))
    (name, here), (_, there) = next((a, b) for a, b in pairs if a != b)
    return f"{name} must be the same on all ranks, got {here} on rank 0 and {there} on rank {rank}"
