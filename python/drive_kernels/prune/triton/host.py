"""The host's part of the table: tensors as items, and how it gets to the device."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .tables import ANYWHERE, DIGIT_BITS, DTYPES, HEADER, LAST, ROW, TOP32, TOP64


class Tuning(NamedTuple):
    """Sizes, each with its reason."""

    chunk: int = 4096  # entries: 16 a thread and operand, which keeps 128 bytes a thread in flight
    plain_warps: int = 8  # 80 registers a thread for float32: three chunks at a time on a multiprocessor
    chunk_warps: int = 16  # of kernels that take any chunk: each entry needs four 64-bit offsets
    few_warps: int = 4  # of kernels that look at a few numbers only
    programs: int = 4096  # of kernels that seldom have work: they fill any GPU, and return soon
    # 5 sigma on both sides of the threshold put 4 % (k = n / 2) of the entries into a bracket of 2^14
    # samples, 1.4 % into one of 2^17: less than the list holds. Up to 2^14 entries, all are in the bracket.
    sigmas: float = 5.0
    small_sample: int = 1 << 14
    large_sample: int = 1 << 17
    large_from: int = (1 << 20) + 1  # entries
    samples_a_program: int = 512  # few, so that many programs share the cache misses
    entries_a_listed_key: int = 64
    least_listed: int = 1 << 16
    listed_by_cost: int = 4  # times as many: the cheap entries of VGG-16 in the bracket are up to 3 % of all
    listed_at_once: int = 512  # of a chunk, by cost: three times what 4 % of it are


TUNING = Tuning()


Dim = tuple[int, ...]  # size, then strides of weight, gradient, mask, mask gradient


class Item(NamedTuple):
    """One tensor with its gradients and its mask."""

    weight: Tensor
    grad: Tensor
    mask: Tensor
    mask_grad: Tensor | None
    walk: list[Dim]
    logical_walk: list[Dim]
    squared: bool  # |S| is the square of the score that is ranked
    cost: int  # of each entry
    scale: float  # of scores: of the gradient, if they are squared, else of the product

    @property
    def numel(self) -> int:
        return self.weight.numel()

    @property
    def chunks(self) -> int:
        return -(-self.numel // TUNING.chunk)

    @property
    def plain_chunks(self) -> int:
        """See `plain_chunk`."""
        floats = (self.weight, self.grad, self.weight if self.mask_grad is None else self.mask_grad)
        aligned = self.mask.data_ptr() % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in floats)
        dense = len(self.walk) == 1 and self.walk[0][1:] == (1, 1, 1, 1)
        return self.numel // TUNING.chunk if aligned and dense else 0


def as_item(
    weight: Tensor,
    grad: Tensor | None,
    mask: Tensor,
    mask_grad: Tensor | None,
    in_order: bool,
    cost: int = 1,
    scale: float = 1.0,
) -> Item:
    squared = grad is not None and mask_grad is None
    if grad is None:  # ones of every shape that take one entry of memory
        grad = weight.new_ones(()).expand_as(weight)
    operands = (weight, grad, mask, weight if mask_grad is None else mask_grad)
    strides = zip(*(t.stride() for t in operands), strict=True)
    dims = [(size, *by) for size, by in zip(weight.shape, strides, strict=True) if size != 1]
    logical = _merged(dims)
    walk = logical if in_order else _merged(sorted(dims, key=lambda dim: -dim[1]))
    return Item(weight, grad, mask, mask_grad, walk, logical, squared, cost, scale)


def _merged(dims: list[Dim]) -> list[Dim]:
    """Joins neighbouring dimensions that every operand steps through evenly, as csrc/prune/walk.h does."""
    merged: list[Dim] = []
    for size, *strides in dims:
        if merged and merged[-1][1:] == tuple(size * stride for stride in strides):
            size *= merged.pop()[0]
        merged.append((size, *strides))
    return merged or [(1, 1, 1, 1, 1)]


def table_of(
    items: list[Item], wide: bool, budget: int, min_keep: int, samples: int, capacity: int
) -> list[int]:
    """Header, rows, states and walks, as laid out above."""
    top = TOP64.value if wide else TOP32.value
    shift, last = key_bits(wide) - DIGIT_BITS.value, LAST.value
    state = [0, 0, 0, shift, ANYWHERE.value, last, -1, 0, 0, top, last]
    states = state + [min_keep, *state[1:]] * (len(items) if min_keep else 0)
    selection = HEADER.value + len(items) * ROW.value
    rows: list[int] = []
    walks: list[int] = []

    def place(walk: list[Dim]) -> tuple[int, int]:
        at = selection + len(states) + len(walks)
        for dim in reversed(walk):
            walks.extend(dim)
        return at, len(walk)

    entries = total = chunks = plain = 0
    for item in items:
        walk = place(item.walk)
        logical_walk = walk if item.walk == item.logical_walk else place(item.logical_walk)
        mask_grad = 0 if item.mask_grad is None else item.mask_grad.data_ptr()
        rows += [item.weight.data_ptr(), item.grad.data_ptr(), mask_grad, item.mask.data_ptr()]
        rows += [DTYPES[item.weight.dtype], item.numel, entries, chunks, item.plain_chunks, plain]
        grad_scale, product_scale = (item.scale, 1.0) if item.squared else (1.0, item.scale)
        rows += [*walk, *logical_walk]
        rows += [item.cost, total, float_bits(grad_scale), float_bits(product_scale)]
        entries += item.numel
        total += item.numel * item.cost
        chunks += item.chunks
        plain += item.plain_chunks
    header = [len(items), total, chunks, plain, budget, min_keep, 0, int(items[0].squared)]
    header += [samples, capacity, 0, selection, selection + len(state)]
    return header + rows + states + walks


def on_device(table: list[int], device: torch.device) -> Tensor:
    """A copy of the table, made without waiting for the device."""
    if device.type == "cpu":  # the interpreter
        return torch.tensor(table)
    if torch.cuda.is_current_stream_capturing():
        return _by_arguments(table, device)
    return torch.tensor(table, pin_memory=True).to(device, non_blocking=True)


def _by_arguments(table: list[int], device: torch.device) -> Tensor:
    """The same for a CUDA graph, which would read the host's copy anew at each replay: numbers that travel as
    arguments of kernels are the graph's own. 96 a launch."""
    on_device = torch.zeros(len(table), dtype=torch.int64, device=device)
    torch._foreach_add_(on_device.unbind(), table)
    return on_device


def float_bits(x: float) -> int:
    """A number >= 0, rounded to float32, as the integer of its bits."""
    bits: int = struct.unpack("i", struct.pack("f", x))[0]
    return bits


def key_bits(wide: bool) -> int:
    return 64 if wide else 32


def samples_of(entries: int) -> int:
    """0: all entries are in the bracket."""
    if entries <= TUNING.small_sample:
        return 0
    return TUNING.small_sample if entries < TUNING.large_from else TUNING.large_sample
