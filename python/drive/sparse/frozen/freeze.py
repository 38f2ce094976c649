"""drive.sparse.freeze: a pruned network for inference on a CPU, and drive.sparse.load."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drive.masks import Masks
from drive.targets.restore import kept_rng
from drive.targets.wrappers import unwrap

from . import store
from .plan import Frozen, PartlyFrozen
from .trace import Untraceable, run_once, trace


def freeze(
    model: nn.Module, masks: Masks | Mapping[str, Tensor], example_inputs: Tensor | tuple[Any, ...]
) -> Frozen | PartlyFrozen:
    """A pruned network as one plan for inference on a CPU: `plan(x)` is `model(x)`, faster.

    The model is traced (torch.export), BatchNorm folded into the layers before, and what works on images
    laid out in 16 lanes that are never neighbours, in which a convolution by its non-zeros takes one aligned
    load a non-zero; all layers run as one program, without Python between them. Other ops are called as they
    are. Of what cannot be traced as a whole, the parts that can are frozen. Results are
    as near to float64's as the masked model's own: some 1e-5 of the largest output apart at most, in what was
    measured.

    Args:
        model: in evaluation mode, float32, on the CPU; it is left as it is, and the plan does not follow it.
        masks: of its parameters by name; layers without one stay dense.
        example_inputs: the model's input, or a tuple of its positional arguments. Other batches and sizes
        may follow
            where the model's code does not depend on them.

    Returns:
        The plan; its `report` says what runs how, `save` writes it to a file for `drive.sparse.load`.

    Raises:
        ValueError: the masks are not of this model, or it is in training mode, or not float32 on the CPU.
    """
    model = unwrap(model)
    _check(model)
    found = Masks.of(masks)
    named = {id(p): name for name, p in model.named_parameters()}
    pairs = found._pairs(model, "freeze")
    masks_of = {id(weight): (named[id(weight)], mask) for weight, mask in pairs}
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    try:
        return _planned(model, masks_of, arguments)
    except Untraceable as error:
        return _by_parts(model, found, masks_of, arguments, str(error))


def load(path: str | os.PathLike[str]) -> Frozen:
    """A plan from a file of `Frozen.save`; no code of the model is needed.

    Raises:
        ValueError: the file is no plan, of a later version, or damaged.
        OSError: it cannot be read.
    """
    return Frozen(store.load(path))


def _planned(model: nn.Module, masks: Mapping[int, tuple[str, Tensor]], arguments: tuple[Any, ...]) -> Frozen:
    """With its first plan: sizes that depend on values show there.

    Raises:
        Untraceable: it is no graph of the shapes of its inputs.
    """
    plan = Frozen(trace(model, masks, arguments))
    plan.begin(arguments)
    return plan


def _check(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("freeze: model must be in evaluation mode (model.eval()), got one in training mode")
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            raise ValueError(f"freeze: model must be on the CPU, got {name} on {tensor.device}")
        if tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"freeze: parameters must be float32, got {name} of {dtype}")


def _by_parts(
    model: nn.Module,
    masks: Masks,
    masks_of: Mapping[int, tuple[str, Tensor]],
    arguments: tuple[Any, ...],
    why: str,
) -> PartlyFrozen:
    """The model's own code, on a copy, with the largest parts frozen that are graphs."""
    copied = copy.deepcopy(model)
    masks.apply_(copied)
    seen = _arguments_of_parts(model, arguments)
    parts: dict[str, Frozen] = {}

    def replace(original: nn.Module, within: nn.Module, prefix: str) -> None:
        for name, child in original.named_children():
            path = f"{prefix}{name}"
            if path in seen and any(True for _ in child.parameters()):
                try:
                    part = _planned(child, masks_of, seen[path])
                except Untraceable:
                    pass
                else:
                    parts[path] = part
                    setattr(within, name, _Part(part))
                    continue
            replace(child, getattr(within, name), path + ".")

    replace(model, copied, "")
    return PartlyFrozen(copied, why, parts)


class _Part(nn.Module):
    def __init__(self, plan: Frozen):
        super().__init__()
        self.plan = plan

    def forward(self, *arguments: Any) -> Any:
        return self.plan(*arguments)


def _arguments_of_parts(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """What each module was called with, first; those that were also called with keywords are left out."""
    seen: dict[str, tuple[Any, ...]] = {}
    otherwise: set[str] = set()
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        name = names[module]
        if keywords:
            otherwise.add(name)
        seen.setdefault(name, args)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    try:
        with torch.no_grad(), kept_rng():
            run_once(model, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: args for name, args in seen.items() if name not in otherwise}
