"""What an entry of a weight costs: multiply-adds for one sample, counted in one traced forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from drive.distributed.placement import reshard
from drive.layers import Layers, Weight, fitting
from drive.layers.record import input_positions, output_positions, tokens

from .costs import LARGEST
from .restore import scoring, seeded
from .wrappers import owners, uncompiled

_log = logging.getLogger(__name__)
MULTIPLY_ADDS = "multiply-adds"  # unit of the costs that are counted here
_BATCH_FIRST = (tokens, output_positions, input_positions)


class _Use(NamedTuple):
    name: str
    module: nn.Module  # that multiplies
    weight: Weight


def multiply_adds(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    run: Callable[[], object],
    samples: int,
    layers: Layers | None = None,
    *,
    op: str,
) -> dict[str, int]:
    """Multiply-adds of one entry of each weight for one sample: the positions or tokens it is applied to.

    Modules that are called several times, and weights that several modules share, count as often. A layer
    whose module is not called itself (the projection in nn.MultiheadAttention) has its parent's tokens.

    Args:
        model: the model.
        weights: those of its prunable tensors that are asked for, by name.
        run: passes a batch through the model, once.
        samples: in that batch.
        layers: of `drive.prune`.

    Returns:
        Integers from 1 to 2^31 - 1; 1, and a warning, for a weight that the pass does not come by.
    """
    uses = _uses(model, weights, layers, op)
    called: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    watched = {module for use in uses for module in (use.module, parents.get(use.module)) if module}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
        if inputs and outputs:  # on "meta" they keep no memory of the pass
            called.setdefault(module, []).append((inputs[0].to("meta"), outputs[0].to("meta")))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
    try:
        with uncompiled():
            run()
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)  # no backward pass does
    found = dict.fromkeys(weights, 0.0)
    for name, module, weight in uses:
        calls = called.get(module) or called.get(parents.get(module, module), [])
        for inputs, outputs in calls:
            found[name] += _applied(module, weight, inputs, outputs, samples)
    if unseen := [name for name, count in found.items() if not count]:
        _log.warning(
            "%s: the batch does not come by %s: an entry there is taken to cost 1", op, ", ".join(unseen)
        )
    return {name: min(max(1, round(count)), LARGEST) for name, count in found.items()}


def multiply_adds_on(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Any,
    layers: Layers | None = None,
    *,
    op: str,
) -> dict[str, int]:
    """The same in eval mode and without gradients; the model and the RNG are afterwards as before.

    Args:
        inputs: one batch: a tuple of positional arguments, a mapping of named ones, or the only one.
    """

    def run() -> object:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    with torch.no_grad(), seeded(0), scoring(model, {}):
        model.eval()
        return multiply_adds(model, weights, run, samples_of(inputs), layers, op=op)


def _applied(module: nn.Module, weight: Weight, inputs: Tensor, outputs: Tensor, samples: int) -> float:
    """How often for a sample: layers see rows of several samples, or several rows of one, in one axis."""
    often = weight.uses(module, inputs, outputs)
    if weight.uses in _BATCH_FIRST and inputs.dim() > 1:
        return often * inputs.shape[0] / samples
    return often


def _uses(model: nn.Module, weights: Mapping[str, Tensor], layers: Layers | None, op: str) -> list[_Use]:
    names = {id(weight): name for name, weight in weights.items()}
    chains = {
        chain: (layer, key)
        for layer in model.modules()
        for key, chain in getattr(layer, "parametrizations", {}).items()
    }
    found: dict[tuple[nn.Module, str], _Use] = {}
    for module, key in owners(model, op=op).values():
        name = names.get(id(module._parameters[key]))
        if name is None:
            continue
        layer, own = chains.get(module, (module, key))
        own = own.removesuffix("_v").removesuffix("_orig")  # of what old hooks make the weight
        weight = fitting(layer, {own: weights[name]}, layers, op=op).get(own) or Weight()
        found[module, key] = _Use(name, layer, weight)
    return list(found.values())


def samples_of(batch: Any) -> int:
    """In a batch: the length of its first tensor that has one, else 1."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()), 1)


def tensors_in(nested: Any) -> list[Tensor]:
    """All tensors, in order."""
    found = []
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):  # of a type that pytree does not know
            found += tensors_in(dict(leaf))
    return found


def work(costs: Mapping[str, int], kept: Mapping[str, int]) -> int:
    """Multiply-adds for one sample of so many entries of each tensor."""
    return sum(costs[name] * count for name, count in kept.items())


def dense_work(costs: Mapping[str, int], weights: Mapping[str, Tensor]) -> int:
    """The same of all entries."""
    return work(costs, {name: prod(weight.shape) for name, weight in weights.items()})
