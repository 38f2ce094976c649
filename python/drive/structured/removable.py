"""The groups that a loop prunes: those of a model whose removal is what it should be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drive._scoring.loss import Loss
from drive.distributed.wrappers import chain
from drive.layers import Layers
from drive.targets.targets import Prunable

from .check import sampled, wrong
from .couplings import couplings
from .groups import Couplings, Group

_log = logging.getLogger(__name__)


def removable(
    model: nn.Module, weights: Prunable, loss: Loss, batch: Any, layers: Layers | None = None, *, op: str
) -> Sequence[Group]:
    """Groups whose rows are all of these weights, and whose units can be set to 0 and removed alike.

    Says, once, what stays whole.

    Args:
        batch: for `loss`.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: there are none.
    """
    found = couplings(model, weights.keys(), lambda: [loss.uncounted(model, batch)], layers, op=op)

    def of_copy(copy: nn.Module, some: Any) -> list[Tensor]:
        with torch.enable_grad():  # a loss without a gradient is an error
            return [loss.uncounted(copy, some).detach()]

    bad = wrong(model, {group: sampled(group) for group in found.groups}, of_copy, batch, layers)
    if bad:
        _log.warning(
            "%s: outputs of these layers are not pruned, for to remove them would change more than to set "
            "them to 0: %s", op, ", ".join(group.name for group in bad),
        )  # fmt: skip
    groups = [group for group in found.groups if group not in bad]
    mixed = dict.fromkeys((group.name for group in bad), "channels that are mixed")
    reasons = Couplings((), {**found.whole, **mixed}).reasons()
    if not groups:
        raise ValueError(f"{op}: there are no channels to prune in this model: {reasons}")
    if reasons:
        _log.info("%s: %d groups of channels; whole stay %s", op, len(groups), reasons)
    return groups


def check_bare(op: str, model: nn.Module) -> None:
    """Raise unless it is a module that nothing wraps: what a smaller model is made of."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a module, got {type(model).__name__}")
    if len(list(chain(model))) > 1:
        raise ValueError(f"{op}: model must not be wrapped or compiled yet, got {type(model).__name__}")
