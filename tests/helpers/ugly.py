"""Ugly inputs for pruning steps: odd shapes, strides, ties, zeros, denormals, mixed dtypes, old masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

NARROW = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "sliced", "channels_last", "transposed")
VALUES = ("normal", "ties", "zero", "equal", "denormal", "half zero")


@dataclass(frozen=True)
class Step:
    """Arguments of one call of drive::prune_."""

    weights: list[Tensor]
    grads: list[Tensor]
    mask_grads: list[Tensor]
    masks: list[Tensor]
    fresh: bool
    prune: int
    min_keep: int

    op: ClassVar[str] = "prune_"

    def args(self) -> tuple[Any, ...]:
        return (
            self.weights, self.grads, self.mask_grads, self.masks, self.fresh, self.prune, self.min_keep,
        )  # fmt: skip

    def clone(self) -> Step:
        """Copies of what the op changes, with the same strides."""
        return replace(self, weights=[copy(w) for w in self.weights], masks=[copy(m) for m in self.masks])

    def to(self, device: str) -> Step:
        """Copies of all tensors on another device, with the same strides and offsets."""
        lists = ("weights", "grads", "mask_grads", "masks")
        return replace(self, **{name: [moved(t, device) for t in getattr(self, name)] for name in lists})


@dataclass(frozen=True)
class CostStep(Step):
    """Arguments of one call of drive::prune_to_cost_, which `prune` is not."""

    costs: list[int]
    scales: list[float]
    max_cost: int

    op: ClassVar[str] = "prune_to_cost_"

    def args(self) -> tuple[Any, ...]:
        return (*super().args()[:5], self.costs, self.scales, self.max_cost, self.min_keep)


def to_cost(step: Step, costs: Sequence[int], alpha: float, share: float) -> CostStep:
    """To this share of what all entries cost, or what the guards cost, by scores times cost ** -alpha."""
    sizes = [w.numel() for w in step.weights]
    total = sum(n * cost for n, cost in zip(sizes, costs, strict=True))
    guarded = sum(min(n, step.min_keep) * cost for n, cost in zip(sizes, costs, strict=True))
    scales = [cost**-alpha for cost in costs]
    return CostStep(**vars(step), costs=list(costs), scales=scales, max_cost=max(guarded, int(share * total)))


def copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides (clone() would close the gaps of a slice)."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return like.copy_(tensor)


def moved(tensor: Tensor, device: str) -> Tensor:
    """A copy on a device with the same strides and offset: with all that it is a view of."""
    entries = tensor.untyped_storage().nbytes() // tensor.element_size()
    room = tensor.as_strided((entries,), (1,), 0).to(device, copy=True)
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def memory(tensor: Tensor) -> Tensor:
    """All bytes that a tensor is a view of, on the CPU: also between its entries, and the sign of zeros."""
    nbytes = tensor.untyped_storage().nbytes()
    return tensor.as_strided((nbytes // tensor.element_size(),), (1,), 0).view(torch.uint8).cpu()


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "sliced" and tensor.dim():
        room = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype)
        return room[tuple(slice(1, 1 + 2 * size, 2) for size in tensor.shape)].copy_(tensor)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()


def valued(shape: list[int], dtype: torch.dtype, values: str, generator: torch.Generator) -> Tensor:
    tensor = torch.randn(shape, generator=generator)
    if values == "ties":
        tensor = (tensor * 2).round() / 2
    elif values == "zero":
        tensor.zero_()
    elif values == "equal":
        tensor.fill_(-0.5)
    elif values == "denormal":
        tensor *= 1e-22  # products near 1e-44, float16 ones are zero
    elif values == "half zero":
        tensor[torch.rand(shape, generator=generator) < 0.5] = 0
    return tensor.to(dtype)


def step_of(
    shapes: list[list[int]],
    values: str,
    layout: str = "contiguous",
    *,
    dtype: torch.dtype = torch.float32,
    fresh: bool = True,
    fraction: float = 0.5,
    min_keep: int = 0,
    three: bool = False,
) -> Step:
    generator = torch.Generator().manual_seed(5)
    operands = [[laid_out(valued(s, dtype, values, generator), layout) for s in shapes] for _ in range(3)]
    masks = [laid_out(torch.rand(s, generator=generator) < 0.8, layout) for s in shapes]
    prune = round(fraction * sum(m.numel() for m in masks))
    return Step(operands[0], operands[1], operands[2] if three else [], masks, fresh, prune, min_keep)


shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=5),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 60_000).map(lambda n: [n]),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3), st.just(3)).map(list),
)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    wide = draw(st.booleans()) and draw(st.booleans())
    gradients = draw(st.sampled_from((0, 1, 1, 1, 2)))
    fresh = draw(st.booleans())
    values = st.just(draw(st.sampled_from(VALUES))) if draw(st.booleans()) else st.sampled_from(VALUES)
    weights, grads, mask_grads, masks = [], [], [], []
    for shape in draw(st.lists(shapes, min_size=1, max_size=5)):
        dtype = draw(st.sampled_from((*NARROW, torch.float64) if wide else NARROW))
        operands = [valued(shape, dtype, draw(values), generator) for _ in range(3)]
        old = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.05, 0.5, 0.95, 1.0)))
        w, g, mg, m = (laid_out(t, draw(st.sampled_from(LAYOUTS))) for t in (*operands, old))
        if draw(st.integers(0, 9)) == 0:
            g = torch.ones((), dtype=dtype).expand(shape)
        weights.append(w), grads.append(g), mask_grads.append(mg), masks.append(m)
    total = sum(w.numel() for w in weights)
    prune = round(draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 0.98, 0.999))) * total)
    min_keep = draw(st.sampled_from((0, 0, 1, 5, 1000)))
    if sum(min(min_keep, w.numel()) for w in weights) > total - prune:
        min_keep = 0
    grads, mask_grads = grads if gradients > 0 else [], mask_grads if gradients > 1 else []
    return Step(weights, grads, mask_grads, masks, fresh, prune, min_keep)


@st.composite
def cost_steps(draw: st.DrawFn) -> CostStep:
    step = draw(steps())
    most = draw(st.sampled_from((1, 3, 1000, 2**30)))
    costs = [draw(st.integers(1, most)) for _ in step.weights]
    share = draw(st.sampled_from((0.0, 0.001, 0.02, 0.1, 0.5, 0.9, 1.0, 2.0)))
    return to_cost(step, costs, draw(st.sampled_from((0.0, 0.5, 1.0))), share)


def sample_inputs() -> list[Step]:
    """A few fixed steps that between them touch every argument: for opcheck and the variants' test."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtypes, gradients, fresh, min_keep, values in (
        ((torch.float32,), 1, True, 0, "normal"),
        ((torch.float32, torch.bfloat16, torch.float16), 1, False, 3, "ties"),
        ((torch.float64, torch.float32), 1, True, 0, "half zero"),
        ((torch.float16, torch.bfloat16), 2, False, 1, "normal"),
        ((torch.float32, torch.float32), 1, True, 0, "denormal"),
        ((torch.float32, torch.bfloat16, torch.float16), 0, False, 0, "normal"),
    ):
        tensors: list[list[Tensor]] = [[], [], [], []]
        for index, dtype in enumerate(dtypes):
            shape = [(40, 30, 3, 3), (70_001,), (5, 7)][index]
            for operand in range(3):
                tensor = valued(list(shape), dtype, values, generator)
                tensors[operand].append(laid_out(tensor, LAYOUTS[(index + operand) % 4]))
            tensors[3].append(torch.rand(shape, generator=generator) < 0.8)
        total = sum(w.numel() for w in tensors[0])
        found.append(
            Step(
                tensors[0],
                tensors[1] if gradients > 0 else [],
                tensors[2] if gradients > 1 else [],
                tensors[3],
                fresh,
                total // 3,
                min_keep,
            )
        )
    return found
