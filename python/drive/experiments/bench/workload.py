"""What benchmarks run on: a model's shapes, filled, with every step's result checked to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from drive.fused import PruneOp
from drive.masks import Masks
from drive_kernels.prune.op import reference
from drive_kernels.registry import COMPILED, TRITON, implementations, on_gpu

Shapes = list[tuple[int, ...]]


def resnet18_shapes() -> Shapes:
    """Prunable tensors of ResNet-18 (3x3 stem, 10 classes): 11.2 M entries in 21 tensors."""
    shapes: Shapes = [(64, 3, 3, 3)]
    width = 64
    for stage in (64, 128, 256, 512):
        shapes += [(stage, width, 3, 3), (stage, stage, 3, 3), (stage, stage, 3, 3), (stage, stage, 3, 3)]
        if stage != width:
            shapes.append((stage, width, 1, 1))
        width = stage
    return [*shapes, (10, 512)]


def vgg16_shapes(scale: int = 1) -> Shapes:
    """Prunable tensors of VGG-16 (ImageNet, 1000 classes): 138.3 M entries in 16 tensors, times `scale`."""
    convs: Shapes = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256)]
    convs += [(512, 512)] * 5
    return [*((*conv, 3, 3) for conv in convs), (4096, 25088), (4096, 4096), (1000, 4096)] * scale


@dataclass(frozen=True)
class Case:
    """What is timed: one step at `sparsity`, the first one or one that finds masks of half of it."""

    size: str
    dtype: torch.dtype
    sparsity: float
    old_masks: bool
    scores: str = "normal"  # a name of SCORES
    replaces: bool = False  # a first step whose result takes the place of another one's, as in a loop

    @property
    def call(self) -> str:
        """In a word or two."""
        return "old masks" if self.old_masks else "first, again" if self.replaces else "first"

    @property
    def bytes_an_entry(self) -> int:
        """Least traffic of two passes: theta and G read, an old mask; theta read, theta and mask written."""
        return 4 * self.dtype.itemsize + 1 + self.old_masks


CHUNK = 1 << 26  # entries that are made or compared at a time, so that temporaries stay small


def _normal(weight: Tensor, grad: Tensor, generator: torch.Generator) -> None:
    weight.normal_(generator=generator)
    grad.normal_(generator=generator)


def _half_zero(weight: Tensor, grad: Tensor, generator: torch.Generator) -> None:
    _normal(weight, grad, generator)
    for part in grad.split(CHUNK):
        part[torch.rand(part.shape, generator=generator, device=part.device) < 0.5] = 0


def _one_bucket(weight: Tensor, grad: Tensor, generator: torch.Generator) -> None:
    weight.fill_(1)
    grad.uniform_(1, 1.01, generator=generator)  # the keys' highest 14 bits are the same


def _equal(weight: Tensor, grad: Tensor, generator: torch.Generator) -> None:
    weight.fill_(1)
    grad.fill_(1)


SCORES: dict[str, Callable[[Tensor, Tensor, torch.Generator], None]] = {
    "normal": _normal,
    "half zero": _half_zero,
    "one bucket": _one_bucket,
    "equal": _equal,
}


class Inputs:
    """Weights, gradients and masks of one size, dtype and distribution of scores."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str = "cpu", scores: str = "normal"):
        self.shapes, self.device = shapes, device
        self.entries = sum(torch.Size(s).numel() for s in shapes)
        self.start = torch.empty(self.entries, dtype=dtype, device=device)
        self.grad = torch.empty_like(self.start)
        SCORES[scores](self.start, self.grad, torch.Generator(device).manual_seed(0))
        self.weight = self.start.clone()
        self.mask = torch.ones_like(self.start, dtype=torch.bool)
        self.old: Tensor | None = None
        self.weights, self.grads, self.masks = map(self._views, (self.weight, self.grad, self.mask))

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([torch.Size(s).numel() for s in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def begin(self, case: Case) -> None:
        """Make the old masks that a case starts from, if any."""
        self.old = None
        if case.old_masks:
            self.run(torch.ops.drive.prune_, replace(case, sparsity=case.sparsity / 2, old_masks=False))
            self.old = self.mask.clone()

    def fresh(self) -> None:
        """Put back what a step changes."""
        if self.old is None:
            self.weight.copy_(self.start)
        else:
            torch.mul(self.start, self.old, out=self.weight)
            self.mask.copy_(self.old)

    def old_masks(self) -> Masks | None:
        """As fused_drive_prune takes them."""
        return None if self.old is None else Masks({str(i): mask for i, mask in enumerate(self.masks)})

    def arguments(self, case: Case) -> tuple[Any, ...]:
        """As drive::prune_ takes them."""
        prune = round(case.sparsity * self.entries)
        return self.weights, self.grads, [], self.masks, not case.old_masks, prune, 0

    def run(self, op: PruneOp, case: Case) -> None:
        """One step by an implementation of drive::prune_."""
        self.fresh()
        op(*self.arguments(case))


def validate(inputs: Inputs, case: Case, op: PruneOp) -> None:
    """Raise AssertionError unless an implementation's masks and weights are the reference's, to the bit."""
    inputs.run(op, case)
    mask, weight = inputs.mask.clone(), inputs.weight.clone()
    inputs.run(reference, case)
    for ours, theirs in ((mask, inputs.mask), (weight, inputs.weight)):
        if not all(map(torch.equal, ours.split(CHUNK), theirs.split(CHUNK))):
            raise AssertionError(f"{case}: masks differ from the reference's")


def prove(inputs: Inputs, case: Case, op: PruneOp) -> None:
    """`validate` where there is no room for the reference: by the definition, chunk by chunk.

    The count is right, nothing pruned before has come back, a weight is what it was or zero. No
    survivor's key is below that of an entry pruned now, and of equal ones the survivor comes first.
    """
    inputs.run(op, case)
    old = torch.ones_like(inputs.mask) if inputs.old is None else inputs.old
    flat = (inputs.start, inputs.grad, inputs.weight, inputs.mask, old)
    chunks = list(zip(*(tensor.split(CHUNK) for tensor in flat), strict=True))
    kept, alive = (sum(int(part.sum()) for part in mask.split(CHUNK)) for mask in (inputs.mask, old))

    right = kept == min(inputs.entries - round(case.sparsity * inputs.entries), alive)
    weakest, strongest = torch.inf, -1.0  # keys of the weakest survivor, of the strongest entry pruned now
    for start, grad, weight, mask, before in chunks:
        right &= bool((mask <= before).all()) and torch.equal(weight, start.masked_fill(~mask, 0))
        key = _key(start, grad)
        weakest = min(weakest, float(key.masked_fill(~mask, torch.inf).min()))
        strongest = max(strongest, float(key.masked_fill_(mask | ~before, -1).max()))
    right &= strongest <= weakest
    ended = False  # a tie was pruned: no later one may survive
    for start, grad, _, mask, before in chunks:
        survives = mask[(_key(start, grad) == strongest) & before]
        right &= not (ended and bool(survives.any())) and bool((survives[1:] <= survives[:-1]).all())
        ended |= not bool(survives.all())
    if not right:
        raise AssertionError(f"{case}: masks are not what drive::prune_ promises")


def _key(start: Tensor, grad: Tensor) -> Tensor:
    return (start.to(torch.float32) * grad.to(torch.float32)).abs_()


def implementation(name: str, device: str = "cuda", op: str = "prune_") -> PruneOp:
    """drive::prune_ or drive::prune_to_cost_, `compiled` or in `triton`, for tensors on a device.

    Raises:
        ImportError: there is none; the message says why.
    """
    full = f"drive::{op}"
    served = on_gpu(full, torch.cuda.current_device()) if device == "cuda" else implementations[full][device]
    kind = TRITON if name == "triton" else COMPILED[device]
    if wrong := served.get(kind, f"there is no {kind} for {device}"):
        raise ImportError(wrong)
    found = import_module("drive_kernels.prune.triton.launch") if name == "triton" else torch.ops.drive
    return cast(PruneOp, getattr(found, op))
