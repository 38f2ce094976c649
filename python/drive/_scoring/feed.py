"""Batches on the device, over and over, copied while it computes.

On CUDA a batch is copied on a stream of its own. Nothing has to be read ahead for that: the loop is a step
ahead of the device, so when it takes a batch, the device is still at work on the one before.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from .loss import Batch


class Passes:
    """Passes over batches, each of which begins them anew and none of which may be empty.

    One for all that takes batches in a run: an iterator that the training has used up has none left for the
    scores.
    """

    def __init__(self, batches: Iterable[Batch]):
        self._batches, self._served = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        """One pass; no batch is read ahead.

        Raises:
            ValueError: there are none, or they cannot be started again.
        """
        empty = True
        for batch in self._batches:
            empty = False
            self._served += 1
            yield batch
        if empty:
            served = self._served
            again = f"they ran out after {served} and cannot be started again" if served else "they are empty"
            raise ValueError(f"prune: batches must go on as long as the method needs them: {again}")


def endless(passes: Passes, device: torch.device) -> Iterator[Batch]:
    """The batches, their tensors on the device, pass after pass."""
    return map(mover(device), chain.from_iterable(repeat(passes)))


def mover(device: torch.device) -> Callable[[Any], Any]:
    """A function that moves the tensors of a batch, however nested, to the device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    if device.type != "cuda":
        return lambda batch: _map_tensors(move, batch, device)
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

        moved = _map_tensors(aside, batch, device)
        computing.wait_stream(copies)
        return moved

    return move_aside


def _map_tensors(change: Callable[[Tensor], Tensor], batch: Any, device: torch.device) -> Any:
    """`change` on every tensor, however nested.

    What else can be moved (a graph of PyTorch Geometric, an encoding of transformers, a PackedSequence, whose
    lengths stay on the CPU) does it by its own `to`.
    """

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if callable(getattr(leaf, "to", None)):
            return copy.copy(leaf).to(device)  # a copy: many move themselves
        if isinstance(leaf, Mapping):  # of a type that pytree does not know
            values = {key: _map_tensors(change, value, device) for key, value in leaf.items()}
            if not isinstance(leaf, dict | UserDict):  # a copy of another one may share its entries
                return values
            own = copy.copy(leaf)
            own.update(values)
            return own
        return leaf

    return tree_map(moved, batch, is_leaf=lambda node: isinstance(node, PackedSequence))
