"""drive::prune_to_cost_ - one exact global pruning step to what the survivors may cost, in place.

The entries of a tensor cost the same each, multiply-adds say. Keys are those of drive::prune_, of scores that
are multiplied by a float32 number of their tensor first: its gradient with two operands,
|theta * (G * scale)|, the product with one or three. Down the ranking, the lower global index first among
equal keys, entries survive as long as the sum of their costs is at most `max_cost`; the first that would
exceed it is pruned, and all after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drive_kernels.library import library, serve

from .op import Outputs, step

library.define(
    "prune_to_cost_("
    "Tensor(a!)[] weights, "  # as drive::prune_ has them, up to `fresh`
    "Tensor[] grads, "
    "Tensor[] mask_grads, "
    "Tensor(b!)[] masks, "
    "bool fresh, "
    "int[] costs, "  # of an entry of each tensor, from 1 to 2^31 - 1
    "float[] scales, "  # of each tensor's scores, from 0 to 1; rounded to float32
    "int max_cost, "  # of all survivors
    "int min_keep"  # survivors that every mask keeps at least, whatever they cost; they count
    ") -> (Tensor kept, Tensor nonfinite, Tensor scores)"  # scores: |S| as they are ranked
)


def _prune_to_cost_fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    costs: Sequence[int],
    scales: Sequence[float],
    max_cost: int,
    min_keep: int,
) -> Outputs:
    kept = weights[0].new_empty(len(weights), dtype=torch.int64)
    return kept, torch.empty_like(kept), kept.new_empty(2, dtype=torch.float64)


def reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    costs: Sequence[int],
    scales: Sequence[float],
    max_cost: int,
    min_keep: int,
) -> Outputs:
    """What drive::prune_to_cost_ means, in plain PyTorch: sorted scores, and a running sum of costs."""

    total = sum(cost * weight.numel() for cost, weight in zip(costs, weights, strict=True))
    if total >= 2**63:  # sums of costs are int64
        raise ValueError(f"drive::prune_to_cost_: all entries must cost less than 2^63 together, got {total}")

    def select(keys: Tensor, sizes: list[int]) -> Tensor:
        cost = torch.cat(
            [keys.new_full((n,), c, dtype=torch.int64) for n, c in zip(sizes, costs, strict=True)]
        )
        safe = torch.zeros_like(keys, dtype=torch.bool)
        for part, safe_part in zip(keys.split(sizes), safe.split(sizes), strict=True):
            first = part.sort(descending=True, stable=True).indices[:min_keep]
            safe_part[first[part[first] >= 0]] = True
        open_ = keys.masked_fill(safe, -1)
        order = open_.sort(descending=True, stable=True).indices
        order = order[open_[order] >= 0]
        fits = cost[order].cumsum(0) <= max_cost - int(cost[safe].sum())
        safe[order[fits]] = True
        return safe

    numbers = [float(torch.tensor(scale, dtype=torch.float32)) for scale in scales]
    return step(weights, grads, mask_grads, masks, fresh, select, numbers)


serve("prune_to_cost_", _prune_to_cost_fake, reference)
