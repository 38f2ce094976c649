"""Do arguments fit together? As csrc/prune/arguments.h checks them: kernels see addresses only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tables import DTYPES


def check(
    op: str,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    prune: int,
    min_keep: int,
) -> None:
    """Raise unless the arguments of drive::prune_, or of an op like it, fit together."""
    if not weights:
        raise ValueError(f"{op}: weights must not be empty")
    device = weights[0].device
    lengths = [len(tensors) for tensors in (weights, grads, mask_grads, masks)]
    one = len(weights)
    if lengths not in ([one, one, one, one], [one, one, 0, one], [one, 0, 0, one]):
        raise ValueError(
            f"{op}: weights, grads, mask_grads and masks must be of one length (or mask_grads empty, or both "
            f"gradients), got {str(lengths)[1:-1]}"
        )
    if prune < 0 or min_keep < 0:
        raise ValueError(f"{op}: prune and min_keep must be >= 0, got {prune}, {min_keep}")
    for i, weight in enumerate(weights):
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"{op}: weights[{i}] must be float32, bfloat16, float16 or float64, got {weight.dtype}"
            )
        if weight.device != device:
            raise ValueError(f"{op}: weights[{i}] must be on {device}, as weights[0] is, got {weight.device}")
    for name, tensors in (("grads", grads), ("mask_grads", mask_grads), ("masks", masks)):
        for i, tensor in enumerate(tensors):
            weight = weights[i]
            dtype = torch.bool if name == "masks" else weight.dtype
            if tensor.shape != weight.shape:
                shapes = f"{list(weight.shape)}, got {list(tensor.shape)}"
                raise ValueError(f"{op}: {name}[{i}] must have shape {shapes}")
            if tensor.dtype != dtype:
                raise TypeError(f"{op}: {name}[{i}] must be {dtype}, got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(f"{op}: {name}[{i}] must be on {device}, got {tensor.device}")
            if tensor.layout != torch.strided:
                raise TypeError(f"{op}: {name}[{i}] must be a dense tensor, got layout {tensor.layout}")


def check_costs(
    op: str, weights: Sequence[Tensor], costs: Sequence[int], scales: Sequence[float], max_cost: int
) -> None:
    """Raise unless what drive::prune_to_cost_ takes beside that is in range."""
    if not len(costs) == len(scales) == len(weights):
        raise ValueError(
            f"{op}: costs and scales must have a number for each of {len(weights)} weights, got {len(costs)} "
            f"and {len(scales)}"
        )
    if max_cost < 0:
        raise ValueError(f"{op}: max_cost must be >= 0, got {max_cost}")
    for i, (cost, scale) in enumerate(zip(costs, scales, strict=True)):
        if not 1 <= cost < 1 << 31:
            raise ValueError(f"{op}: costs[{i}] must be from 1 to 2^31 - 1, got {cost}")
        if not 0 <= scale <= 1:
            raise ValueError(f"{op}: scales[{i}] must be from 0 to 1, got {scale}")
    total = sum(cost * weight.numel() for cost, weight in zip(costs, weights, strict=True))
    if total >= 1 << 63:  # sums of costs are int64
        raise ValueError(f"{op}: all entries must cost less than 2^63 together, got {total}")
