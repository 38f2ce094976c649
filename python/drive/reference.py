"""The pure-PyTorch pruner: cat, topk, masks. The tests' oracle and the benchmarks' baseline."""

from __future__ import annotations

from functools import partial

from drive_kernels.prune import KthLargest, kth_by_topk, reference

from .fused import prune_step
from .masks import Masks
from .result import PruneResult
from .targets import Include, Target, Tensors


def drive_prune(
    target: Target,
    grads: Tensors | None = None,
    mask_grads: Tensors | None = None,
    *,
    sparsity: float,
    masks: Masks | None = None,
    min_keep: int = 0,
    include: Include | None = None,
    check_finite: bool = True,
    kth_largest: KthLargest = kth_by_topk,
) -> PruneResult:
    """`fused_drive_prune`, term by term in PyTorch: same arguments, same masks, far slower.

    Concatenates every score, selects by `kth_largest` (`drive_kernels.prune.kth_by_topk` or
    `kth_by_kthvalue`) and scatters the masks back. Source: arXiv 2404.03687, Eq. 6-7.
    """
    return prune_step(
        partial(reference, kth_largest=kth_largest), "drive_prune", target, grads, mask_grads,
        sparsity=sparsity, masks=masks, min_keep=min_keep, include=include, check_finite=check_finite,
    )  # fmt: skip
