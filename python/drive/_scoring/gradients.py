"""dL/dtheta on one batch, computed eagerly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from drive.distributed.placement import fsdp_modules, placed_as, reshard
from drive.distributed.team import replicated
from drive.targets.targets import check_dense

from .loss import Batch, Loss


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
        loss: Loss,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.weights, self.loss, self.autocast = model, weights, loss, autocast

    @property
    def device(self) -> torch.device:
        """Where the prunable weights are."""
        return next(iter(self.weights.values())).device

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One tensor per prunable weight, of its shape and dtype.

        Raises:
            ValueError: a prunable weight has no part in the loss.
            TypeError: its gradient is sparse.
            TypeError, ValueError: a batch that gives no loss (`Loss`).
        """
        with torch.enable_grad():
            with self._autocasting():
                loss = self.loss(self.model, batch)
            grads = self._differentiated(loss)
        found = checked(self.weights, grads)
        return {name: placed_as(grad, self.weights[name]) for name, grad in found.items()}

    def _differentiated(self, loss: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)

    def _autocasting(self) -> torch.autocast:
        """As asked for, else as around the call.

        Without its cache: the weights change from call to call, and an autocast of the caller's would go on
        using the casts of the old ones.
        """
        kind = self.device.type
        enabled = self.autocast is not None or torch.is_autocast_enabled(kind)
        return torch.autocast(kind, dtype=self.autocast, enabled=enabled, cache_enabled=False)


class ReducedGradients(LossGradients):
    """The same of a model whose ranks average their gradients: in backward passes only, and into `.grad`."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        # now: after the forward pass FSDP2's outermost module has whole copies in their places
        self._parameters = list(reshard(self.model).parameters())
        return super().__call__(batch)

    def _differentiated(self, loss: Tensor) -> Sequence[Tensor | None]:
        parameters = self._parameters
        # gradients may be views into buckets, which the next backward pass overwrites
        wrapper = replicated(self.model)
        views = wrapper is not None and wrapper.gradient_as_bucket_view
        before = [p.grad.clone() if views and p.grad is not None else p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            loss.backward()
            found = [weight.grad for weight in self.weights.values()]
            return [grad.clone() if views and grad is not None else grad for grad in found]
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad


def checked(names: Iterable[str], grads: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Gradients of the loss by their weights' names.

    Raises:
        ValueError: one is None.
        TypeError: one is sparse.
    """
    found: dict[str, Tensor] = {}
    for name, grad in zip(names, grads, strict=True):
        if grad is None:
            raise ValueError(f"{name} has no gradient: the loss does not depend on it; exclude it")
        check_dense("prune", name, grad)
        found[name] = grad
    return found


def loss_gradients(
    model: nn.Module, weights: Mapping[str, Tensor], loss: Loss, autocast: torch.dtype | None = None
) -> LossGradients:
    """`LossGradients` of whatever kind the model needs."""
    reduced = replicated(model) is not None or bool(fsdp_modules(model))
    kind = ReducedGradients if reduced else LossGradients
    return kind(model, weights, loss, autocast)
