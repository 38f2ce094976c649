"""fused_drive_prune: one exact global pruning step."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

import drive_kernels  # noqa: F401  (defines torch.ops.drive)

from .masks import Masks, zero_pruned_
from .result import PruneResult
from .targets import Include, Operands, Target, Tensors, operands

PruneOp = Callable[..., tuple[Tensor, Tensor, Tensor]]


def fused_drive_prune(
    target: Target,
    grads: Tensors | None = None,
    mask_grads: Tensors | None = None,
    *,
    sparsity: float,
    masks: Masks | None = None,
    min_keep: int = 0,
    include: Include | None = None,
    check_finite: bool = True,
) -> PruneResult:
    """Prune to `sparsity` by the DRIVE score, globally and exactly; weights and masks in place.

    The score of an entry is |theta * dL/dm * dL/dtheta| (arXiv 2404.03687, Eq. 6), normalised by its
    sum (Eq. 7). Afterwards exactly `round(sparsity * total)` entries are zero and masked (or as many
    as `masks` had pruned before, if those were more). Among equal scores the lower global index
    (order of the tensors, then row-major index) survives; pruned entries never come back. The masks
    are the same bit for bit on every backend and with any number of threads. If anything raises,
    weights, masks and gradients are as they were.

    Args:
        target: a module, a mapping of names to tensors, or a sequence of tensors; float32,
            bfloat16, float16 (freely mixed) or float64, any shapes and strides, on one device.
            A tensor that appears twice (tied weights) counts once, under its first name.
        grads: dL/dtheta, same structure as `target` (or a mapping by parameter name), shape and
            dtype of the weights. Default: each tensor's `.grad`.
        mask_grads: dL/dm, likewise. Default: theta * dL/dtheta, which is exact when both gradients
            come from the same batch and weights; scores are then ranked by |float32(theta * grad)|.
            If given, scores are ranked by the product of the three in float64.
        sparsity: final fraction of zeros over all prunable entries, 0 <= sparsity < 1.
        masks: masks to update in place, of the same names and shapes; False entries stay pruned.
        min_keep: survivors that every tensor keeps at least (all it has, if those are fewer).
        include: predicate (name, module, tensor) -> bool choosing the tensors; default: weights of
            Linear, Conv and ConvTranspose layers of a module, everything of a mapping or sequence.
        check_finite: raise if a score is not finite. False: no host synchronisation; a non-finite
            score then makes the step a no-op and `result.ok` False.

    Returns:
        PruneResult, with the masks and the counts.

    Raises:
        ValueError: sparsity or min_keep out of range; a missing or misshapen gradient or mask; an
            empty selection; a non-finite score.
        TypeError: an argument or tensor of the wrong type or dtype.
    """
    return prune_step(
        torch.ops.drive.prune_, "fused_drive_prune", target, grads, mask_grads,
        sparsity=sparsity, masks=masks, min_keep=min_keep, include=include, check_finite=check_finite,
    )  # fmt: skip


def prune_step(
    prune_op: PruneOp,
    op: str,
    target: Target,
    grads: Tensors | None,
    mask_grads: Tensors | None,
    *,
    sparsity: float,
    masks: Masks | None,
    min_keep: int,
    include: Include | None,
    check_finite: bool,
) -> PruneResult:
    """Check the arguments, call `prune_op` (any implementation of drive::prune_), wrap its result."""
    check_sparsity(op, sparsity)
    found = operands(target, grads, mask_grads, include, op)
    total = sum(w.numel() for w in found.weights.values())
    return prune_operands(
        prune_op,
        op,
        found,
        round(sparsity * total),
        masks=masks,
        min_keep=min_keep,
        check_finite=check_finite,
    )


def prune_operands(
    prune_op: PruneOp,
    op: str,
    found: Operands,
    prune: int,
    *,
    masks: Masks | None,
    min_keep: int,
    check_finite: bool,
) -> PruneResult:
    """Prune so many entries of checked operands in all. Arguments as those of `fused_drive_prune`."""
    if not isinstance(min_keep, int) or isinstance(min_keep, bool) or min_keep < 0:
        raise ValueError(f"{op}: min_keep must be an integer >= 0, got {min_keep!r}")
    weights = list(found.weights.values())
    total = sum(w.numel() for w in weights)
    guarded = sum(min(min_keep, w.numel()) for w in weights)
    if guarded > total - prune:
        raise ValueError(
            f"{op}: min_keep={min_keep} asks for {guarded} survivors, "
            f"{prune} pruned leave {total - prune} of {total}"
        )

    fresh = masks is None
    if masks is None:
        masks = new_masks(found.weights)
    masks.check_match(op, found.weights)
    ordered = [masks[name] for name in found.weights]
    values = found.scores or weights
    with torch.no_grad():
        outputs = prune_op(values, found.grads, found.mask_grads, ordered, fresh, prune, min_keep)
        if found.scores is not None:  # the op has zeroed these
            for weight, mask in zip(weights, ordered, strict=True):
                zero_pruned_(weight, mask)
    result = PruneResult(Masks(dict(zip(found.weights, ordered, strict=True))), *outputs)
    if check_finite:
        result.check_finite(op).answer()
    return result


def new_masks(weights: dict[str, Tensor]) -> Masks:
    """Masks to be written, in their weights' memory layouts.

    All in one piece of memory: page faults in many small ones take as long as the step itself. Each begins
    on 16 bytes, as the kernels' vectors do.
    """
    device = next(iter(weights.values())).device
    offsets, end = [], 0
    for weight in weights.values():
        offsets.append(end)
        end += (weight.numel() + 15) // 16 * 16
    room = torch.empty(end, dtype=torch.bool, device=device)
    masks = {}
    for (name, weight), offset in zip(weights.items(), offsets, strict=True):
        stride = torch.empty_like(weight, device="meta").stride()  # a slice's mask is dense
        masks[name] = room.as_strided(weight.shape, stride, offset)
    return Masks(masks)


def check_sparsity(op: str, sparsity: object) -> None:
    """Raise unless `sparsity` is a real number in [0, 1)."""
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool):
        raise TypeError(f"{op}: sparsity must be a number in [0, 1), got {sparsity!r}")
    if not 0 <= float(sparsity) < 1:  # NaN neither
        raise ValueError(f"{op}: sparsity must be in [0, 1), got {sparsity}")
