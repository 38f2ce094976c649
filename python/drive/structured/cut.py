"""Removing what is not kept, in a model: smaller tensors, and modules that know their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drive.holding.attachment import let_go
from drive.layers import Layers, Weight, weights_of
from drive.targets.wrappers import named_modules, owners

from .attention import FewerHeads
from .groups import Kept
from .heads import attentions, resize


def cut(model: nn.Module, kept: Kept, layers: Layers | None = None) -> None:
    """Remove in place what does not stay of parameters and buffers.

    Modules have new parameters, which require gradients as the old ones did, and new sizes. Masks that were
    attached are not held any more.

    Args:
        kept: by name and axis; tied tensors under one of their names.
    """
    let_go(model)
    before = list(attentions(model, layers))
    tensors = named_tensors(model)  # kept alive, so that no id is used again
    axes: dict[str, dict[int, Tensor]] = {}
    for (name, axis), stays in kept.items():
        axes.setdefault(name, {})[axis] = stays.nonzero().flatten()
    new = {id(tensors[name]): _selected(tensors[name], some) for name, some in axes.items()}
    for module in model.modules():
        touched, depthwise, weight = False, _depthwise(module), weights_of(module, layers).get("weight")
        own: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for some in own:
            for key, tensor in some.items():
                if id(tensor) in new:
                    some[key], touched = new[id(tensor)], True
        if touched:
            _resize(module, depthwise, weight)
    for name, module, attention in before:
        row = attention.rows[0]
        weight_now: Tensor = getattr(row.module, row.key)
        heads = weight_now.shape[row.axis] // row.indices.shape[1]
        if heads == attention.heads:
            continue
        if isinstance(module, nn.MultiheadAttention):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, FewerHeads(module, heads))
        else:
            resize(attention, heads)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones under each of their names, and buffers; names are without wrappers."""
    found: dict[str, Tensor | None] = {
        name: module._parameters[key] for name, (module, key) in owners(model).items()
    }
    for path, module in named_modules(model):
        for key, buffer in module._buffers.items():
            found[f"{path}.{key}" if path else key] = buffer
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def _selected(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """What stays along some axes, laid out as before."""
    found = tensor.detach()
    for axis, stays in axes.items():
        found = found.index_select(axis, stays.to(tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        found = found.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def _depthwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return isinstance(module, nn.modules.conv._ConvNd) and groups == module.out_channels > 1


def _resize(module: nn.Module, depthwise: bool, axes: Weight | None) -> None:
    """Attributes that say how large its tensors are."""
    sizes: dict[str, int] = {}
    weight = module._parameters.get("weight")
    if axes is not None and weight is not None:
        outputs, inputs = weight.shape[axes.outputs], weight.shape[axes.inputs]
        sizes = dict.fromkeys(("out_channels", "out_features", "nf"), outputs)
        sizes |= dict.fromkeys(("in_channels", "in_features", "nx"), inputs)
        if depthwise:
            sizes |= {"groups": outputs, "in_channels": outputs}
    elif (some := next((t for t in _vectors(module) if t is not None), None)) is not None:
        sizes = {"num_features": len(some), "num_parameters": len(some)}
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _vectors(module: nn.Module) -> list[Tensor | None]:
    return [module._parameters.get("weight"), module._buffers.get("running_mean")]
