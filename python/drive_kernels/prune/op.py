"""drive::prune_ - one exact global pruning step, in place.

An entry's score is S = theta * dL/dm * dL/dtheta (Eq. 6 of arXiv 2404.03687). With G = dL/d(theta*m),
|S| = (theta * G)^2 on surviving entries, so ranking by |theta * G| ranks by |S|, without the underflow
of the square. The key that is ranked, and thereby the masks, is the same bit for bit everywhere:

    one operand      |theta|: magnitude pruning, or `weights` are scores computed elsewhere
    two operands     |float32(theta * G)|, one IEEE rounding; float64 if any tensor is float64
    three operands   |(theta * dL/dm) * dL/dtheta| in float64

Among equal keys the lower global index survives: order of the tensors, then row-major index.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drive_kernels.library import library, serve

library.define(
    "prune_("
    "Tensor(a!)[] weights, "  # theta, any shapes and strides; float32, bfloat16, float16, float64
    "Tensor[] grads, "  # dL/dtheta, shape and dtype of its weight, any strides; empty: |theta| is the score
    "Tensor[] mask_grads, "  # dL/dm, likewise; empty: theta * dL/dtheta
    "Tensor(b!)[] masks, "  # bool, shape of its weight, any strides
    "bool fresh, "  # the masks' contents are not read: nothing is pruned yet
    "int prune, "  # entries that are False afterwards, over all masks (or more, if more were before)
    "int min_keep"  # survivors that every mask keeps at least
    ") -> ("
    "Tensor kept, "  # [T] int64: survivors per tensor
    "Tensor nonfinite, "  # [T] int64: NaN or infinite scores per tensor; any: weights and masks stay
    "Tensor scores)"  # [2] float64: normalised score z of the weakest survivor, sum of |S| (Eq. 7)
)

Outputs = tuple[Tensor, Tensor, Tensor]
KthLargest = Callable[[Tensor, int], Tensor]


def _prune_fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    prune: int,
    min_keep: int,
) -> Outputs:
    kept = weights[0].new_empty(len(weights), dtype=torch.int64)
    return kept, torch.empty_like(kept), kept.new_empty(2, dtype=torch.float64)


def kth_by_topk(keys: Tensor, k: int) -> Tensor:
    return keys.topk(k, sorted=False).values.min()


def kth_by_kthvalue(keys: Tensor, k: int) -> Tensor:
    return keys.kthvalue(keys.numel() - k + 1).values


def reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    prune: int,
    min_keep: int,
    kth_largest: KthLargest = kth_by_topk,
) -> Outputs:
    """What drive::prune_ means, in plain PyTorch; `kth_largest` is the selection that it stands on."""

    def select(keys: Tensor, sizes: list[int]) -> Tensor:
        return _keep_largest(keys, keys.numel() - prune, sizes, min_keep, kth_largest)

    return step(weights, grads, mask_grads, masks, fresh, select)


def step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    select: Callable[[Tensor, list[int]], Tensor],
    scales: Sequence[float] | None = None,
) -> Outputs:
    """A step in plain PyTorch.

    Args:
        select: keys of all entries (-1: pruned before) and the tensors' sizes -> which survive.
        scales: by which scores are multiplied before they are ranked, a number a tensor; gradients, if there
            are two operands.
    """
    wide = bool(mask_grads) or any(w.dtype == torch.float64 for w in weights)
    dtype = torch.float64 if wide else torch.float32
    factors = [1.0] * len(weights) if scales is None else scales

    def joined(tensors: Sequence[Tensor], scaled: bool) -> Tensor:
        parts = [t.detach().to(dtype).flatten() for t in tensors]
        return torch.cat([p * factor for p, factor in zip(parts, factors, strict=True)] if scaled else parts)

    scaled = scales is not None
    if mask_grads:
        keys = joined(weights, False).mul_(joined(mask_grads, False)).mul_(joined(grads, False))
        if scaled:
            keys.mul_(joined([torch.ones_like(w) for w in weights], True))
    elif grads:
        keys = joined(weights, False).mul_(joined(grads, scaled))
    else:
        keys = joined(weights, scaled)
    keys.abs_()
    sizes = [w.numel() for w in weights]
    if not fresh:  # key -1: pruned before, ranks below every score
        keys.masked_fill_(~torch.cat([m.flatten() for m in masks]), -1)
    nonfinite = torch.stack([(~k.isfinite()).sum() for k in keys.split(sizes)])
    if nonfinite.any():
        kept = torch.stack([(k != -1).sum() for k in keys.split(sizes)])
        if fresh:
            for mask in masks:
                mask.fill_(True)
        return kept, nonfinite, keys.new_full((2,), torch.nan, dtype=torch.float64)

    keep = select(keys, sizes)
    for w, m, kept_here in zip(weights, masks, keep.split(sizes), strict=True):
        m.copy_(kept_here.view(m.shape))
        w.detach().masked_fill_(~m, 0)
    kept = torch.stack([k.sum() for k in keep.split(sizes)])
    return kept, nonfinite, _score_summary(keys, keep, squared=bool(grads) and not mask_grads)


def _largest(keys: Tensor, k: int, kth_largest: KthLargest) -> Tensor:
    """True at the k largest keys, lower index first among equals; never at a pruned entry (key -1)."""
    keep = torch.zeros_like(keys, dtype=torch.bool)
    if k > 0:
        threshold = kth_largest(keys, k)
        torch.gt(keys, threshold, out=keep)
        ties = (keys == threshold).nonzero().squeeze(1)
        keep[ties[: k - int(keep.sum())]] = True
    return keep.logical_and_(keys >= 0)


def _keep_largest(keys: Tensor, k: int, sizes: list[int], min_keep: int, kth_largest: KthLargest) -> Tensor:
    if min_keep <= 0:
        return _largest(keys, k, kth_largest)
    guarded = torch.cat(
        [_largest(part, min(min_keep, part.numel()), kth_largest) for part in keys.split(sizes)]
    )
    return guarded | _largest(keys.masked_fill(guarded, -1), k - int(guarded.sum()), kth_largest)


def _score_summary(keys: Tensor, keep: Tensor, squared: bool) -> Tensor:
    """[z of the weakest survivor (inf if nothing survives), sum of |S| over unpruned entries]."""

    def scores(part: Tensor) -> Tensor:
        wide = part.to(torch.float64, copy=True).clamp_(min=0)
        return wide.square_() if squared else wide

    # in pieces: float64 copies of everything would double the memory
    total = torch.stack([scores(part).sum() for part in keys.split(1 << 20)]).sum()
    if not keep.any():
        return torch.stack([total.new_tensor(torch.inf), total])
    weakest = scores(keys.masked_fill(~keep, torch.inf).min())
    return torch.stack([weakest if total == 0 else weakest / total, total])


serve("prune_", _prune_fake, reference)
