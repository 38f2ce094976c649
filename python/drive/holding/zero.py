"""Pruned entries set to zero, of many tensors at once and wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import drive_kernels  # noqa: F401  (defines torch.ops.drive)
from drive.distributed.placement import local


def zero_pruned_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the entries of tensors where their masks are False to +0, in place; NaN and infinities, too.

    Args:
        pairs: a tensor (float32, bfloat16, float16, float64) and its mask (bool, of its shape). Of DTensors,
            this rank's parts. A mask that is elsewhere is copied to the tensor's device.
    """
    found: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, mask in pairs:
        here, its = local(tensor), local(mask)
        tensors, masks = found.setdefault(here.device, ([], []))
        tensors.append(here)
        masks.append(its if its.device == here.device else its.to(here.device))
    with torch.no_grad():
        for tensors, masks in found.values():
            torch.ops.drive.zero_pruned_.default(tensors, masks)
            # which the op does not: sparse layers keep what they have packed of a weight until it has changed
            torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


@torch.no_grad()
def revived(tensor: Tensor, mask: Tensor) -> int:
    """How many entries are not zero although their mask is False. The host waits for the device."""
    here = local(tensor)
    return int(torch.count_nonzero(here.masked_fill(local(mask).to(here.device), 0)))
