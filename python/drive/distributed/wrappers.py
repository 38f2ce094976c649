"""Modules that wrap another one, and call it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Package and class, subclasses included: the children that are what it wraps. Of several, which hold the same
# model, the first is the one that forward calls. By their names, so that none of these packages is imported.
_WRAPPED = {
    ("torch", "OptimizedModule"): ("_orig_mod",),  # torch.compile
    ("torch", "DataParallel"): ("module",),
    ("torch", "DistributedDataParallel"): ("module",),
    ("torch", "AveragedModel"): ("module",),
    ("torch", "ActivationWrapper"): ("_checkpoint_wrapped_module",),
    ("timm", "ModelEmaV2"): ("module",),
    ("timm", "ModelEmaV3"): ("module",),
    ("lightning", "_FabricModule"): ("_forward_module", "_original_module"),
    ("lightning_fabric", "_FabricModule"): ("_forward_module", "_original_module"),
    ("peft", "PeftModel"): ("base_model",),
    ("peft", "PeftMixedModel"): ("base_model",),
    ("peft", "BaseTuner"): ("model",),
    ("peft", "BaseTunerLayer"): ("base_layer",),
    ("peft", "ModulesToSaveWrapper"): ("original_module",),
    ("peft", "TrainableTokensWrapper"): ("token_adapter",),
}

CHILDREN = frozenset(name for names in _WRAPPED.values() for name in names)


def is_a(module: nn.Module, package: str, name: str) -> bool:
    """Is it an instance of a class that a package, not imported for this, has somewhere?"""
    return (package, name) in _kinds(module)


def wrapped(module: nn.Module) -> tuple[str, ...]:
    """The names of the children that a module wraps; none, if it is no wrapper."""
    children = (name for kind in _kinds(module) for name in _WRAPPED.get(kind, ()))
    return tuple(name for name in children if module._modules.get(name) is not None)


def chain(model: nn.Module) -> Iterator[nn.Module]:
    """A model, what it wraps, and so on, to the innermost one.

    What has children of its own beside, as PEFT's layers do, computes something else: it ends there.
    """
    yield model
    while (inner := wrapped(model)) and len(inner) == len(model._modules):
        model = model.get_submodule(inner[0])
        yield model


def _kinds(module: nn.Module) -> list[tuple[str, str]]:
    return [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__]
