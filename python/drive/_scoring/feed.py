"""Batches on the device, over and over, copied while it computes.

On CUDA a batch is copied on a stream of its own. Nothing has to be read ahead for that: the loop is a step
ahead of the device, so when it takes a batch, the device is still at work on the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from .gradients import Batch


def endless(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, their tensors on the device, started again when short; none is read ahead.

    Raises:
        ValueError: there are none, or they cannot be started again.
    """
    move = mover(device)
    served = 0
    while True:
        before = served
        for inputs, targets in batches:
            served += 1
            yield move((inputs, targets))
        if served == before:
            again = f"they ran out after {served} and cannot be started again" if served else "they are empty"
            raise ValueError(f"prune: batches must go on as long as the method needs them: {again}")


def mover(device: torch.device) -> Callable[[Any], Any]:
    """A function that moves the tensors of a batch, however nested, to the device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    if device.type != "cuda":
        return lambda batch: _map_tensors(move, batch)
    copies = torch.cuda.Stream(device)

    def move_aside(batch: Any) -> Any:
        """On a stream of its own, a copy need not wait for the work that is queued before it."""
        computing = torch.cuda.current_stream(device)

        def aside(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided:  # it has no record_stream
                return move(tensor)
            with torch.cuda.stream(copies):
                moved = move(tensor)
            moved.record_stream(computing)  # its memory is not free before `computing` is done with it
            return moved

        moved = _map_tensors(aside, batch)
        computing.wait_stream(copies)
        return moved

    return move_aside


def _map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    return tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf,
        batch,
        is_leaf=lambda node: isinstance(node, PackedSequence),  # its lengths must stay on the CPU
    )
