"""From a batch to its loss: the three forms that batches come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from drive.distributed.placement import local
from drive.targets.multiply_adds import tensors_in as all_tensors_in

from .finite import check_loss

Batch = Any
LossFn = Callable[[Any, Any], Tensor]  # outputs, targets -> loss
ComputeLoss = Callable[[nn.Module, Any], Tensor]  # model, batch -> loss

_FORMS = (
    "a batch must be (inputs, targets), with loss_fn: loss_fn(model(inputs), targets); a mapping, with the "
    "model's own loss: model(**batch); or anything, with compute_loss: compute_loss(model, batch)"
)


class Loss:
    """The loss of a model on a batch, by `loss_fn`, by `compute_loss`, or the model's own.

    Attributes:
        loss_fn: None where the loss is another.
        total: the sum of all losses so far, float64, where they are: not finite from the first one on that is
            not. None: there was none. It is added to in place, which a CUDA graph repeats.
    """

    total: Tensor | None = None

    def __init__(
        self, loss_fn: LossFn | None = None, compute_loss: ComputeLoss | None = None, op: str = "prune"
    ):
        """
        Args:
            loss_fn, compute_loss: of `drive.prune`.
            op: for the error messages.

        Raises:
            TypeError: one of them cannot be called.
            ValueError: both are given.
        """
        for argument, given in (("loss_fn", loss_fn), ("compute_loss", compute_loss)):
            if given is not None and not callable(given):
                raise TypeError(f"{op}: {argument} must be callable, got {type(given).__name__}")
        if loss_fn is not None and compute_loss is not None:
            raise ValueError(f"{op}: loss_fn must be None where compute_loss is given: {_FORMS}")
        self.loss_fn, self._compute, self._op = loss_fn, compute_loss, op

    def __call__(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
        """A scalar, which is added to `total`.

        Args:
            temperature: the outputs are divided by it before the loss.

        Raises:
            TypeError: a batch of another form, outputs that no temperature divides, a loss that is not a
                scalar tensor.
            ValueError: a temperature other than 1 where the outputs go nowhere but into the model's own loss;
                a model that gives no loss; a loss that has no gradient.
        """
        loss = self.uncounted(model, batch, temperature)
        self._count(loss.detach())
        return loss

    def uncounted(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
        """The same, not added to `total`: of a copy of the model, which is not as it is."""
        check_gradients_can_be_had(self._op)
        loss = self.value(model, batch, temperature)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
            hint = ""
            if isinstance(loss, Tensor):
                hint = ": it is complex" if loss.is_complex() else ": take its mean? (reduction='mean')"
            raise TypeError(f"{self._op}: the loss must be a scalar tensor, got {_described(loss)}{hint}")
        if not loss.requires_grad:
            raise ValueError(
                f"{self._op}: the loss must depend on the weights, got one without a gradient: is it "
                "detached, or computed under torch.no_grad?"
            )
        return loss

    def value(self, model: nn.Module, batch: Batch, temperature: float = 1.0) -> Any:
        """What should be the loss, unchecked: for a pass through the model that needs no gradient."""
        if self._compute is not None:
            self._undivided(temperature, "compute_loss")
            return self._compute(model, batch)
        if self.loss_fn is not None:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(f"{self._op}: {_FORMS}; got {_described(batch)}, and loss_fn")
            inputs, targets = batch
            return self.loss_fn(self._divided(model(inputs), temperature), targets)
        if not isinstance(batch, Mapping):
            raise TypeError(f"{self._op}: {_FORMS}; got {_described(batch)}, and neither of the two")
        self._undivided(temperature, "the model's own loss")
        return self._own(model(**batch))

    def check_finite(self, op: str) -> None:
        """Raise ValueError unless all losses so far were finite. Waits for the device.

        Args:
            op: in which it was looked at, for the error message.
        """
        if self.total is not None:
            check_loss(op, float(self.total))

    def _count(self, loss: Tensor) -> None:
        here = local(loss).reshape(())
        if self.total is None:
            self.total = torch.zeros((), dtype=torch.float64, device=here.device)
        self.total.add_(here.to(self.total.device))

    def _undivided(self, temperature: float, what: str) -> None:
        if temperature != 1:
            raise ValueError(
                f"{self._op}: temperature must be 1 with {what}, which does not divide the outputs, got "
                f"{temperature:g}: pass the method with temperature=1, or (inputs, targets) with loss_fn"
            )

    def _divided(self, outputs: Any, by: float) -> Any:
        """A tensor, or all floating-point ones of nested outputs."""
        if by == 1:
            return outputs
        leaves, structure = tree_flatten(outputs)
        divided = [leaf / by if _floating(leaf) else leaf for leaf in leaves]
        if not any(map(_floating, leaves)):
            raise TypeError(
                f"{self._op}: the model must return tensors, or tuples, lists and dicts of them, to be "
                f"divided by the temperature {by:g}, got {_described(outputs)}: pass the method with "
                "temperature=1"
            )
        return tree_unflatten(divided, structure)

    def _own(self, outputs: Any) -> Any:
        """The loss in a model's outputs: `.loss`, ["loss"], a dict of losses, or the outputs themselves."""
        if isinstance(outputs, Tensor):
            return outputs
        loss = getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
        if loss is not None:
            return loss
        if isinstance(outputs, Mapping) and outputs and all(map(_scalar, outputs.values())):
            return sum(outputs.values())
        raise ValueError(
            f"{self._op}: the model must return its loss (.loss, ['loss'], or a dict of losses), got "
            f"{_described(outputs)}: are there labels in the batch?"
        )


def check_gradients_can_be_had(op: str) -> None:
    """Raise ValueError in inference mode, in which nothing keeps what a backward pass needs."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: this needs gradients, which cannot be had inside torch.inference_mode(): call it outside "
            "(torch.no_grad() may stay)"
        )


def tensors_in(outputs: Any) -> list[Tensor]:
    """All floating-point tensors of nested outputs."""
    return [tensor for tensor in all_tensors_in(outputs) if tensor.is_floating_point()]


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _scalar(value: Any) -> bool:
    return _floating(value) and value.numel() == 1


def _described(value: Any) -> str:
    """In a few words."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {kind} of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {kind} of {len(value)} ({', '.join(type(part).__name__ for part in value)})"
    return f"a {kind}"
