"""Layer collapse: what lost every weight, and which survivors lead nowhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._scoring.loss import tensors_in
from .masks import Masks
from .targets.restore import seeded
from .targets.wrappers import look_up, uncompiled, unwrap


@dataclass(frozen=True)
class Collapse:
    """What pruning cut off.

    Attributes:
        empty: tensors in which nothing survives.
        disconnected: tensors with survivors, none of which lies on a path from an input to an output.
        effective: tensor -> survivors on such a path (their share is the effective density of Vysogorets and
            Kempe, arXiv 2202.12002).
    """

    empty: list[str]
    disconnected: list[str]
    effective: dict[str, int]


def collapse(model: nn.Module, masks: Masks, inputs: Any) -> Collapse:
    """Which survivors of `masks` lie on a path from the inputs to the outputs.

    Runs forward and backward once, in float64 and eval mode, on a copy of the model with positive random
    weights in place of the survivors: with nothing to cancel, the output depends on a weight if and only if
    there is a path. Weights are divided by their number of inputs, so that nothing overflows in deep
    networks; biases are zero, and normalisations (modules that have "Norm" in their name) pass their input
    on. The model is not changed, nor is the RNG.

    Args:
        masks: of the model's tensors.
        inputs: of one batch, for their shapes: [B, ...] floating-point (replaced by positive noise), or
            integers (taken as they are).

    Raises:
        ValueError: the masks are of another model.
        TypeError: there is no floating-point tensor in what the model returns.
    """
    positive = copy.deepcopy(unwrap(model)).double().eval()
    with seeded(0), torch.enable_grad():
        masks.apply_(positive)  # raises if they are of another model
        _make_positive(positive, masks)
        masks.apply_(positive)
        with uncompiled():  # what was compiled would go without the hooks of the copy
            outputs = positive(_noise(inputs))
        if not (found := tensors_in(outputs)):
            raise TypeError(f"collapse: the model must return tensors, got {type(outputs).__name__}")
        weights = look_up("collapse", positive, masks)
        total = torch.stack([out.sum() for out in found]).sum()
        grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    effective = {
        name: 0 if grad is None else int(((grad != 0) & (weight != 0)).sum())
        for (name, weight), grad in zip(weights.items(), grads, strict=True)
    }
    return Collapse(
        empty=[name for name, count in kept.items() if masks[name].numel() and not count],
        disconnected=[name for name, count in kept.items() if count and not effective[name]],
        effective=effective,
    )


@torch.no_grad()
def _make_positive(model: nn.Module, masks: Masks) -> None:
    for module in model.modules():
        if "Norm" in type(module).__name__:  # one that centres would make negative numbers, for ReLU to cut
            module.register_forward_hook(lambda _, inputs, output: inputs[0])
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.uniform_(0.5, 1).div_(parameter[0].numel())
            else:
                parameter.fill_(1)
    for weight in look_up("collapse", model, masks).values():  # embeddings that are pruned, tied ones say
        weight.uniform_(0.5, 1).div_(max(1, weight[0].numel()) if weight.dim() else 1)


def _noise(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return torch.rand_like(inputs, dtype=torch.float64) + 0.5 if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: _noise(value) for name, value in inputs.items()}
    return type(inputs)(map(_noise, inputs)) if isinstance(inputs, list | tuple) else inputs
