"""Hessian times gradient, by differentiating twice: nothing larger than the graph of one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from drive._scoring.gradients import Batch

from .base import Problem


def hessian_times_gradient(
    problem: Problem, batches: Sequence[Batch], temperature: float = 1.0
) -> dict[str, Tensor]:
    """H g on the prunable weights: g is dL/dtheta summed over the batches, H the Hessian of that sum.

    H g = d<g, dL/dtheta>/dtheta with g held fixed, added up batch by batch, so that a large batch can come in
    pieces. Entries pruned before take no part in the product.

    Args:
        temperature: the model's outputs are divided by it before the loss.

    Raises:
        ValueError: a prunable weight has no part in the loss.
    """
    weights = list(problem.weights.values())

    def gradients(batch: Batch, create_graph: bool) -> tuple[Tensor, ...]:
        inputs, targets = batch
        loss = problem.loss_fn(_divided(problem.model(inputs), temperature), targets)
        grads = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
        for name, grad in zip(problem.weights, grads, strict=True):
            if grad is None:
                raise ValueError(f"{name} has no gradient: the loss does not depend on it; exclude it")
        return grads

    def masked(grads: Sequence[Tensor]) -> list[Tensor]:
        masks: Mapping[str, Tensor] = problem.masks or {}
        named = zip(problem.weights, grads, strict=True)
        return [grad * masks[name] if name in masks else grad for name, grad in named]

    # fused attention has no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        total: list[Tensor] = [torch.zeros_like(w) for w in weights]
        for batch in batches:
            total = [sum_ + grad for sum_, grad in zip(total, gradients(batch, False), strict=True)]
        fixed, product = masked(total), [torch.zeros_like(w) for w in weights]
        for batch in batches:
            grads = masked(gradients(batch, True))
            inner = torch.stack([(g * f).sum() for g, f in zip(grads, fixed, strict=True)]).sum()
            parts = torch.autograd.grad(inner, weights, allow_unused=True, materialize_grads=True)
            product = [sum_ + part for sum_, part in zip(product, parts, strict=True)]
    return dict(zip(problem.weights, product, strict=True))


def _divided(outputs: Any, by: float) -> Any:
    """A tensor, or all floating-point ones of nested outputs."""
    if by == 1:
        return outputs
    return tree_map(lambda x: x / by if isinstance(x, Tensor) and x.is_floating_point() else x, outputs)
