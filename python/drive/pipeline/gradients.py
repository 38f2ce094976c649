"""Does every prunable tensor get a gradient? Without one it is not trained, and its scores tie at 0."""

from __future__ import annotations

from torch import nn

from drive._scoring.feed import mover
from drive._scoring.gradients import loss_gradients
from drive._scoring.loss import Batch, ComputeLoss, Loss, LossFn
from drive.layers import Layers
from drive.targets.choice import Include
from drive.targets.restore import scoring, seeded
from drive.targets.targets import prunable

_OP = "check_gradients"
_NAMED = 5  # tensors in a message


def check_gradients(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn | None = None,
    *,
    compute_loss: ComputeLoss | None = None,
    include: Include | None = None,
    exclude: Include | None = None,
    layers: Layers | None = None,
) -> None:
    """Raise unless every prunable tensor has a gradient other than 0 somewhere, on one batch.

    For a model at its start, where units may be dead that no training wakes. One forward and one backward
    pass, in the mode (train or eval) the model is in. Weights, BatchNorm statistics and other buffers, the
    RNG state, the mode, `.grad` and `requires_grad` are afterwards as before.

    Args:
        model: as in `drive.prune`.
        batch: one, in any of the forms that `drive.prune` takes; it is copied to the weights' device.
        loss_fn, compute_loss: as in `drive.prune`.
        include, exclude, layers: which tensors are prunable, as in `drive.prune`.

    Raises:
        ValueError: tensors get a gradient of 0 in every entry, or have no part in the loss; they are named.
        TypeError, ValueError: bad arguments, a batch that gives no loss.
    """
    weights = prunable(model, include, exclude, layers, op=_OP)
    gradients_of = loss_gradients(model, weights, Loss(loss_fn, compute_loss, _OP))
    with seeded(0), scoring(model, weights):
        gradients = gradients_of(mover(gradients_of.device)(batch))
    dead = [name for name, gradient in gradients.items() if gradient.numel() and not gradient.any()]
    if dead:
        raise ValueError(
            f"{_OP}: {_listed(dead)} {'gets' if len(dead) == 1 else 'get'} no gradient: on this batch all of "
            "it is 0, so that training does not begin to change them and scores by gradients tie. Start from "
            "other weights, or exclude them"
        )


def _listed(names: list[str]) -> str:
    """The first few, and how many more."""
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    *most, last = names[:_NAMED] + more
    return f"{', '.join(most)} and {last}" if most else last
