"""What a pruning step works on: which tensors of a model are prunable, and are they fit for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from drive.distributed.placement import check_placed, local
from drive.layers import Layers

from .choice import Include, Target, chosen

Tensors = Mapping[str, Tensor] | Sequence[Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Prunable(dict[str, Tensor]):
    """Prunable tensors by name.

    Attributes:
        parameters: entries of all parameters of the model that they are of; None: they are of none, or not
            everything has a size yet.
    """

    parameters: int | None = None


@dataclass(frozen=True)
class Operands:
    """Prunable tensors by name, and in the same order what they are ranked by.

    |theta * grad|, with mask_grads |theta * mask_grad * grad|, without gradients |theta|, or |score|: the
    scores are overwritten. `parameters` as of `Prunable`.
    """

    weights: dict[str, Tensor]
    grads: list[Tensor]
    mask_grads: list[Tensor]
    scores: list[Tensor] | None = None
    parameters: int | None = None


def prunable(
    target: Target,
    include: Include | None = None,
    exclude: Include | None = None,
    layers: Layers | None = None,
    *,
    op: str = "prunable",
) -> Prunable:
    """Prunable tensors by name, tied ones once, each fit to be pruned (ValueError or TypeError if not).

    Args:
        target: a module (all its parameters are asked for, by their names without wrappers, see
            `drive.targets.wrappers`), a mapping of names to tensors, or a sequence of tensors (named "0",
            "1", ...).
        include, exclude, layers: as in `fused_drive_prune`.
        op: whose argument this is, for the error messages.
    """
    choice = chosen(target, include, exclude, layers, op)
    found = Prunable()
    found.parameters = choice.parameters
    first: dict[int, str] = {}  # by address
    for name, tensor in choice.tensors.items():
        check_data(op, name, tensor, target)
        check_dtype(op, name, tensor)
        here = local(tensor)
        if here.numel() and (other := first.setdefault(here.data_ptr(), name)) != name:
            raise ValueError(
                f"{op}: {name} shares memory with {other} but is a different tensor; "
                "tie weights by assigning the same Parameter"
            )
        found[name] = tensor
    if not found:
        raise ValueError(f"{op}: nothing to prune: the selection of tensors is empty")
    devices = sorted({str(t.device) for t in found.values()})
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors must be on one device, got {', '.join(devices)}")
    return found


def operands(
    target: Target,
    grads: Tensors | None,
    mask_grads: Tensors | None,
    include: Include | None,
    exclude: Include | None,
    layers: Layers | None,
    op: str,
) -> Operands:
    """Prunable tensors with their gradients (`.grad` where `grads` is None), checked."""
    weights = prunable(target, include, exclude, layers, op=op)
    if grads is None:
        found = [_own_gradient(op, name, w) for name, w in weights.items()]
    else:
        found = match(op, "grads", grads, target, weights)
    extra = [] if mask_grads is None else match(op, "mask_grads", mask_grads, target, weights)
    return Operands(weights, found, extra, parameters=weights.parameters)


def check_data(op: str, name: str, tensor: object, target: object) -> None:
    """Raise unless a tensor of `target` is one whose entries can be read and written."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if is_lazy(tensor):
        raise ValueError(f"{op}: {name} is not initialised yet: run the model once first")
    here = local(tensor)
    if type(here).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{op}: {name} must be a plain tensor or a DTensor of one, got {type(here).__name__}: prune "
            "before weights are quantised or otherwise converted"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.is_meta:
        hooked = isinstance(target, nn.Module) and any(hasattr(m, "_hf_hook") for m in target.modules())
        hint = ", accelerate has offloaded it: prune the model before it is dispatched" if hooked else ""
        raise ValueError(f"{op}: {name} has no data: it is on the meta device{hint}")
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{op}: {name} must not overlap itself in memory (it is an expanded tensor)")


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless it is of a dtype that is pruned: not complex, of integers, or of 8 bits."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_made_outside(op: str, model: nn.Module) -> None:
    """Raise ValueError if the model was made in inference mode, unless that is where we are.

    Outside, its tensors can neither be written to nor differentiated.
    """
    if torch.is_inference_mode_enabled():
        return
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"{op}: {name} must be a tensor that can change, got one made inside torch.inference_mode(): "
                "make the model outside of it"
            )


def _own_gradient(op: str, name: str, weight: Tensor) -> Tensor:
    if not weight.is_leaf:
        raise ValueError(f"{op}: {name} is not a leaf tensor and keeps no gradient: pass grads=")
    if weight.grad is None:
        hint = "call loss.backward() first" if weight.requires_grad else "it does not require one"
        raise ValueError(f"{op}: {name} has no gradient: {hint}, or exclude it")
    check_dense(op, name, weight.grad)
    _check_operand(op, f"{name}.grad", weight.grad, weight)
    return weight.grad


def check_dense(op: str, name: str, gradient: Tensor) -> None:
    """Raise unless a weight's gradient is dense."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"{op}: gradient of {name} must be dense, got layout {gradient.layout}: "
            "make the embedding with sparse=False, or exclude it"
        )


def match(
    op: str, argument: str, given: Tensors, target: Target, weights: Mapping[str, Tensor]
) -> list[Tensor]:
    """The tensors of `given` in the order of `weights`, by name or, for a sequence, by position."""
    if isinstance(given, Mapping):
        by_name = given
    elif isinstance(target, Sequence):
        by_name = {str(index): tensor for index, tensor in enumerate(given)}
    else:
        by_name = dict(zip(weights, given, strict=False))
        if len(given) != len(weights):
            raise ValueError(f"{op}: {argument} must hold {len(weights)} tensors, got {len(given)}")
    for name, weight in weights.items():
        if name not in by_name:
            raise ValueError(f"{op}: {argument} has no entry for {name}")
        _check_operand(op, f"{argument}[{name}]", by_name[name], weight)
    return [by_name[name] for name in weights]


def _check_operand(op: str, name: str, tensor: object, weight: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    for what in ("shape", "dtype", "device", "layout"):
        expected, got = getattr(weight, what), getattr(tensor, what)
        if expected != got:
            kind = TypeError if what in ("dtype", "layout") else ValueError
            if what == "shape":
                expected, got = tuple(expected), tuple(got)
            raise kind(f"{op}: {name} must have the weight's {what} {expected}, got {got}")
    check_placed(op, name, tensor, weight)
