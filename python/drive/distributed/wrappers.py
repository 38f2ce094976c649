"""Modules that wrap another one, and call it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from torch import nn

# Package and class, subclasses included: the children that are what it wraps. Of several, which hold the same
# model, the first is the one that forward calls. By their names, so that none of these packages is imported.
_WRAPPED = {
    ("torch", "OptimizedModule"): ("_orig_mod",),  # torch.compile
    ("torch", "DataParallel"): ("module",),
    ("torch", "DistributedDataParallel"): ("module",),
    ("torch", "AveragedModel"): ("module",),
    ("torch", "ActivationWrapper"): ("_checkpoint_wrapped_module",),
    ("drive", "LearnedMask"): ("module",),
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
    ("drive", "Softened"): ("module",),
}

CHILDREN = frozenset(name for names in _WRAPPED.values() for name in names)


def is_a(module: nn.Module, package: str, name: str) -> bool:
    """Is it an instance of a class that a package, not imported for this, has somewhere?"""
    kind: type = type(module)
    return (package, name) in _kinds(kind)


def wrapped(module: nn.Module) -> tuple[str, ...]:
    """The names of the children that a module wraps; none, if it is no wrapper."""
    kind: type = type(module)
    names = _children(kind)
    return tuple(name for name in names if module._modules.get(name) is not None) if names else names


def chain(model: nn.Module) -> Iterator[nn.Module]:
    """A model, what it wraps, and so on, to the innermost one.

    What has children of its own beside, as PEFT's layers do, computes something else: it ends there.
    """
    yield model
    while (inner := wrapped(model)) and len(inner) == len(model._modules):
        model = model.get_submodule(inner[0])
        yield model


def inner(model: nn.Module, package: str, name: str) -> nn.Module | None:
    """The outermost of a model's wrappers, itself included, that is of this class."""
    return next((module for module in chain(model) if is_a(module, package, name)), None)


@lru_cache  # of a step on a ResNet-50, asking all of its modules anew took 0.5 ms
def _kinds(of: type) -> frozenset[tuple[str, str]]:
    return frozenset((kind.__module__.partition(".")[0], kind.__name__) for kind in of.__mro__)


@lru_cache
def _children(of: type) -> tuple[str, ...]:
    return tuple(name for kind, names in _WRAPPED.items() if kind in _kinds(of) for name in names)
