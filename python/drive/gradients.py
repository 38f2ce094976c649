"""dL/dtheta on one batch, computed eagerly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[Any, Any], Tensor]
Batch = tuple[Any, Any]  # inputs and targets: tensors, or tuples, lists and dicts of tensors


class LossGradients:
    """dL/dtheta of the prunable weights on a batch; `.grad` is not touched.

    Attributes:
        overwrites: a call overwrites the tensors that the last one returned.
    """

    overwrites = False

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        loss_fn: LossFn,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.weights, self.loss_fn, self.autocast = model, weights, loss_fn, autocast

    @property
    def device(self) -> torch.device:
        """Where the prunable weights are."""
        return next(iter(self.weights.values())).device

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One tensor per prunable weight, of its shape and dtype.

        Raises:
            ValueError: a prunable weight has no part in the loss.
        """
        inputs, targets = batch
        with torch.enable_grad():
            with self._autocasting():
                loss = self.loss_fn(self.model(inputs), targets)
            grads = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        found: dict[str, Tensor] = {}
        for name, grad in zip(self.weights, grads, strict=True):
            if grad is None:
                raise ValueError(f"{name} has no gradient: the loss does not depend on it; exclude it")
            found[name] = grad
        return found

    def _autocasting(self) -> torch.autocast:
        """As asked for, else as around the call.

        Without its cache: the weights change from call to call, and an autocast of the caller's would go on
        using the casts of the old ones.
        """
        kind = self.device.type
        enabled = self.autocast is not None or torch.is_autocast_enabled(kind)
        return torch.autocast(kind, dtype=self.autocast, enabled=enabled, cache_enabled=False)
