"""Every parameter of a model: is it a weight, and if the default leaves it out, why?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from drive.distributed.wrappers import is_a, wrapped
from drive.layers import Layers, Weight, check_layers, fitting, weights_of

from .wrappers import owners

# What keeps zeros where they are: the weight that is used is the raw one, scaled as a whole or by outputs.
# By the class of the parametrisation, or of the hook before there were any: how the raw weight's key ends.
_SCALED = {
    "_WeightNorm": "original1",
    "_SpectralNorm": "original",
    "WeightNorm": "_v",
    "SpectralNorm": "_orig",
}
_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag
EMBEDDING, TIED = "an embedding", "tied to the embedding"
VECTOR = "a bias, a norm or another vector"
ADAPTED = "a factor of an adapter"
STANDARDISED = "standardised before it is used"
PART = "one part of a weight parametrised by"
_STANDARDISING = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


class Candidate(NamedTuple):
    """A parameter as one of its modules has it.

    Attributes:
        name: without wrappers.
        module, key: whose parameter it is, under which key.
        weight: how the layer multiplies by it; None if it is no weight, or nobody knows.
        reason: why the default does not prune it; empty if it does.
    """

    name: str
    module: nn.Module
    key: str
    tensor: Tensor
    weight: Weight | None
    reason: str


def candidates(model: nn.Module, layers: Layers | None = None, *, op: str = "candidates") -> list[Candidate]:
    """All parameters, tied ones once, under their first name.

    Args:
        layers: of `drive.layers.weights_of`.

    Raises:
        TypeError, ValueError: of `owners` and `weights_of`.
    """
    if layers is not None:
        check_layers(op, layers)
    named = owners(model, op=op)
    embedded: dict[int, str] = {}
    for name, (module, key) in named.items():
        if isinstance(module, _EMBEDDINGS):
            embedded.setdefault(id(module._parameters[key]), name)
    factors, raw = _factors(model), _raw(model, layers, op)
    found: dict[int, Candidate] = {}
    last: nn.Module | None = None
    for name, (module, key) in named.items():
        tensor = cast(Tensor, module._parameters[key])
        if module is not last:  # parameters of one come one after the other
            last, kind = module, type(module).__name__
            weights = weights_of(module, layers, op=op)
            standardised = kind in _STANDARDISING and is_a(module, "timm", kind)
        weight, reason = raw.get((module, key)) or (weights.get(key), "")
        if standardised and key == "weight":
            weight, reason = None, STANDARDISED
        if id(tensor) in embedded:
            reason = EMBEDDING if isinstance(module, _EMBEDDINGS) else f"{TIED} {embedded[id(tensor)]}"
        elif not reason and weight is None:
            small = is_lazy(tensor) or tensor.dim() < 2 or "Norm" in kind or key.endswith("bias")
            reason = VECTOR if small else f"layer type {kind} is not known"
        elif module in factors:
            reason = ADAPTED
        if not reason and not tensor.requires_grad:
            reason = "frozen"
        candidate = Candidate(name, module, key, tensor, weight, reason)
        known = found.setdefault(id(tensor), candidate)
        if known.weight is None and weight is not None:  # tied: as the layer has it that multiplies by it
            found[id(tensor)] = Candidate(known.name, module, key, tensor, weight, known.reason or reason)
    return list(found.values())


def matrices(found: list[Candidate]) -> int:
    """Entries of the trainable parameters of two dimensions and more, embeddings and biases aside."""
    return sum(
        c.tensor.numel()
        for c in found
        if c.tensor.dim() > 1
        and c.tensor.requires_grad
        and not c.reason.startswith((EMBEDDING, TIED, VECTOR))
    )


def _factors(model: nn.Module) -> set[nn.Module]:
    """Modules of adapters: what PEFT's layers have beside the layer that they adapt."""
    if "peft" not in sys.modules:
        return set()
    return {
        inside
        for module in model.modules()
        if is_a(module, "peft", "BaseTunerLayer")
        for key, child in module.named_children()
        if key not in wrapped(module)
        for inside in child.modules()
    }


_Raw = dict[tuple[nn.Module, str], tuple[Weight | None, str]]


def _raw(model: nn.Module, layers: Layers | None, op: str) -> _Raw:
    """Parameters from which a layer's weight is computed: the weight they stand for, or why they do not."""
    found: _Raw = {}
    for layer in _flat(model):
        if not layer._forward_pre_hooks and "parametrizations" not in layer._modules:
            continue
        for name, kind, place, keys in _computed(layer):
            raw = {key: tensor for key in keys if (tensor := place._parameters[key]) is not None}
            widest = max(raw.values(), key=Tensor.dim)  # the raw weight has the shape of what is used
            weight = fitting(layer, {name: widest}, layers, op=op).get(name)
            ending = _SCALED.get(kind)
            for key in keys:
                if ending is not None and key.endswith(ending):
                    found[place, key] = weight, ""
                else:
                    what = PART if ending is None else "the scale of a weight parametrised by"
                    found[place, key] = None, f"{what} {kind}"
    return found


def _flat(model: nn.Module) -> list[nn.Module]:
    """All modules, shared ones more than once, in a tenth of the time of `modules()`."""
    found = [model]
    for module in found:  # grows
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def _computed(layer: nn.Module) -> Iterator[tuple[str, str, nn.Module, list[str]]]:
    """Weights that are computed: their name, by what, from which parameters of which module."""
    chains = layer._modules.get("parametrizations")
    for name, chain in chains.items() if isinstance(chains, nn.ModuleDict) else ():
        if isinstance(chain, ParametrizationList):
            kinds = [type(step).__name__ for step in chain]
            yield name, kinds[0] if len(kinds) == 1 else " and ".join(kinds), chain, [*chain._parameters]
    for hook in layer._forward_pre_hooks.values():
        if (kind := type(hook).__name__) in ("WeightNorm", "SpectralNorm"):
            name = hook.name  # type: ignore[attr-defined]
            yield name, kind, layer, [key for key in layer._parameters if key.startswith(f"{name}_")]
