"""The pure-PyTorch pruner: cat, topk, masks. The tests' oracle and the benchmarks' baseline.

Beside it, to check both against the paper, `literal`: its equations by autograd, with nothing that makes them
fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from drive_kernels.prune.cost import reference as reference_to_cost
from drive_kernels.prune.op import KthLargest, kth_by_topk, reference

from ._scoring.loss import LossFn
from .fused import PruneOps, prune_step
from .layers import Layers
from .masks import Masks
from .result import PruneResult
from .targets.choice import Include, Target
from .targets.costs import goal_of, sparsity_of
from .targets.targets import Tensors, prunable


def drive_prune(
    target: Target,
    grads: Tensors | None = None,
    mask_grads: Tensors | None = None,
    *,
    sparsity: float | None = None,
    masks: Masks | None = None,
    min_keep: int = 0,
    include: Include | None = None,
    exclude: Include | None = None,
    layers: Layers | None = None,
    check_finite: bool = True,
    costs: Mapping[str, int] | None = None,
    max_cost: int | None = None,
    alpha: float = 0.0,
    kth_largest: KthLargest = kth_by_topk,
) -> PruneResult:
    """`fused_drive_prune`, term by term in PyTorch: same arguments, same masks, far slower.

    Concatenates every score, selects by `kth_largest` (`drive_kernels.prune.op.kth_by_topk` or
    `kth_by_kthvalue`) and scatters the masks back. Source: arXiv 2404.03687, Eq. 6-7.
    """
    goal = goal_of("drive_prune", sparsity, costs, max_cost, alpha)
    return prune_step(
        PruneOps(partial(reference, kth_largest=kth_largest), reference_to_cost), "drive_prune", target,
        grads, mask_grads, goal=goal, masks=masks, min_keep=min_keep, include=include, exclude=exclude,
        layers=layers, check_finite=check_finite,
    )  # fmt: skip


def literal(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: LossFn,
    *,
    sparsity: float,
    masks: Masks | None = None,
) -> Masks:
    """The masks of one iteration as the paper has it; `model` and `masks` stay as they are.

    They are those of `fused_drive_prune` wherever its rounding to float32 makes no two scores equal. Of equal
    ones, `torch.topk` has any survive.
    """
    share = sparsity_of("literal", sparsity)
    masks = Masks.dense(model) if masks is None else masks
    z = literal_scores(model, inputs, targets, loss_fn, masks)
    ranked = torch.cat([scores.flatten() for scores in z.values()])
    keep = torch.zeros_like(ranked, dtype=torch.bool)
    keep[ranked.topk(ranked.numel() - round(share * ranked.numel())).indices] = True
    parts = keep.split([scores.numel() for scores in z.values()])
    return Masks({name: part.view_as(z[name]) & masks[name] for name, part in zip(z, parts, strict=True)})


def literal_scores(
    model: nn.Module, inputs: Any, targets: Any, loss_fn: LossFn, masks: Masks
) -> dict[str, Tensor]:
    """z of every prunable weight, float64: |theta * dL/dm * dL/dtheta| (Eq. 6) over the sum of all (Eq. 7).

    The loss is that at theta * m, where m is a tensor, of zeros and ones as `masks` say, and autograd
    differentiates by it as it does by theta.
    """
    theta = {name: weight.detach().requires_grad_() for name, weight in prunable(model, op="literal").items()}
    masks.check_match("literal", theta)
    m = {name: masks[name].to(weight.dtype).requires_grad_() for name, weight in theta.items()}
    effective = {name: theta[name] * m[name] for name in theta}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # BatchNorm writes to its own
    loss = loss_fn(functional_call(model, {**effective, **buffers}, (inputs,)), targets)
    gradients = torch.autograd.grad(loss, [*m.values(), *theta.values()])
    factors = zip(theta.values(), gradients[: len(m)], gradients[len(m) :], strict=True)
    scores = [(weight.double() * to_m * to_theta).abs().detach() for weight, to_m, to_theta in factors]
    total = float(sum(score.sum() for score in scores))
    if not 0 < total < torch.inf:
        raise ValueError(f"literal: scores must be finite and not all 0, got a sum of {total}")
    return {name: score / total for name, score in zip(theta, scores, strict=True)}
