"""Connections around layers that fade away while a network trains (ToST, arXiv 2206.12755)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

_log = logging.getLogger(__name__)

_INPUT = "_drive_soft_input"  # a layer's input, on its output until that is freed: nothing else keeps it
_WEIGHT = 1e-4  # ToST's
_NORMS = nn.BatchNorm2d, nn.SyncBatchNorm


class Place(NamedTuple):
    """A layer that gets a skip around it, and behind what the skip ends: its normalisation, or itself."""

    name: str
    layer: nn.Conv2d | nn.Linear
    end: nn.Module


class Skip(nn.Module):
    """(1 - t) BN(W x), which it adds to what a layer and its normalisation make of x; at t = 1 nothing.

    Its weight is no nn.Conv2d's or nn.Linear's: no method takes it for one of the model's.

    Attributes:
        weight: [outputs, inputs of a group, 1, 1] or [outputs, inputs].
        t: 0-dimensional buffer, in no state_dict: whoever made this says where it is, by `at`.
        soft: is t below 1? Known without asking the device.
    """

    t: Tensor

    def __init__(self, place: Place, zero: bool):
        """Hooks are for `connect` to set.

        Args:
            zero: the normalisation begins with the weight 0 instead of 1: so does the skip.
        """
        super().__init__()
        layer = place.layer
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        outputs, inputs, *kernel = layer.weight.shape
        self.name = place.name
        self.stride: tuple[int, ...] = layer.stride if isinstance(layer, nn.Conv2d) else ()
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self.weight = nn.Parameter(torch.full((outputs, inputs, *(1 for _ in kernel)), _WEIGHT, **like))
        kind: type[nn.modules.batchnorm._BatchNorm] = nn.BatchNorm2d if kernel else nn.BatchNorm1d
        if isinstance(place.end, nn.SyncBatchNorm):
            kind = nn.SyncBatchNorm
        self.norm = kind(outputs, **like)
        if zero:
            nn.init.zeros_(self.norm.weight)
        self.soft = True
        self.register_buffer("t", torch.zeros((), device=layer.weight.device), persistent=False)

    def at(self, t: float) -> None:
        self.t.fill_(t)
        self.soft = t < 1

    def connect(self, place: Place) -> None:
        """Set the hooks, which are this module's methods: copies and pickles of both stay connected."""
        if place.end is place.layer:
            place.layer.register_forward_hook(self.around)
        else:
            place.layer.register_forward_hook(self.begin)
            place.end.register_forward_hook(self.end)

    def around(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return output + self(args[0]) if self.soft else None

    def begin(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.soft:
            setattr(output, _INPUT, args[0])

    def end(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        kept: Tensor | None = getattr(args[0], _INPUT, None)
        return output + self(kept) if self.soft and kept is not None else None

    def forward(self, input: Tensor) -> Tensor:
        """What is added.

        Args:
            input: the layer's: [B, C, H, W], or [B, inputs].

        Raises:
            ValueError: the input of a linear layer has not two dimensions.
        """
        if self.weight.dim() == 4:
            product = F.conv2d(input, self.weight, stride=self.stride, groups=self.groups)
        elif input.dim() == 2:
            product = F.linear(input, self.weight)
        else:
            raise ValueError(
                f"Softened: the input of {self.name} must be [B, {self.weight.shape[1]}] for a skip around "
                f"it, got shape {tuple(input.shape)}; pass skips=False"
            )
        added: Tensor = (1 - self.t) * self.norm(product)
        return added


def disconnect(model: nn.Module) -> None:
    """Remove the hooks of all Skips from a model."""
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Skip):
                del module._forward_hooks[number]


def connected(model: nn.Module) -> bool:
    """Has it hooks of Skips?"""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), Skip) for hook in hooks)


def places(model: nn.Module, graph: fx.Graph | None, *, op: str) -> list[Place]:
    """Where skips go.

    Around every nn.Conv2d with a kernel above 1 x 1 and the BatchNorm2d (or SyncBatchNorm) that its parent
    lists next, unless the graph shows that the one is not called on the other's output, or a skip's output
    would be of another size: with a stride s the 1 x 1 gives ceil(size / s), and so does the layer, for all
    sizes, if its padding is half of dilation * (kernel - 1). In an MLP, whose parameters all are those of
    nn.Linear and nn.BatchNorm1d, around every nn.Linear but the last, and the BatchNorm1d listed next.

    Args:
        graph: of `traced`, if there is one.

    Raises:
        ValueError: a layer has no size yet.
    """
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and is_lazy(module.weight):
            raise ValueError(f"{op}: {name} must have a size for a skip around it: run a batch first")
    found = list(_of_convolutions(names, graph))
    of_another_size = [place.name for place in found if not _keeps_sizes(place.layer)]
    if of_another_size:
        _log.warning(
            "%s: no skip around %s: with this padding a 1 x 1 convolution gives another size",
            op, ", ".join(of_another_size),
        )  # fmt: skip
    return [place for place in found if _keeps_sizes(place.layer)] + list(_of_an_mlp(names))


def _of_convolutions(names: dict[nn.Module, str], graph: fx.Graph | None) -> Iterator[Place]:
    pairs = dict.fromkeys(pair for parent in names for pair in _neighbours(parent))
    for layer, norm in pairs:
        if isinstance(layer, nn.Conv2d) and isinstance(norm, _NORMS) and max(layer.kernel_size) > 1:
            name = names[layer]
            if norm.num_features == layer.out_channels and not _apart(name, names[norm], graph):
                yield Place(name, layer, norm)


def _of_an_mlp(names: dict[nn.Module, str]) -> Iterator[Place]:
    owners = [module for module in names if module._parameters]
    if not all(isinstance(module, (nn.Linear, nn.BatchNorm1d)) for module in owners):
        return
    after = dict(pair for parent in names for pair in _neighbours(parent))
    for layer in [module for module in owners if isinstance(module, nn.Linear)][:-1]:
        norm = after.get(layer)
        yield Place(names[layer], layer, norm if isinstance(norm, nn.BatchNorm1d) else layer)


def _neighbours(parent: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    return pairwise(child for child in parent._modules.values() if child is not None)


def _keeps_sizes(layer: nn.Conv2d | nn.Linear) -> bool:
    if not isinstance(layer, nn.Conv2d) or layer.padding == "same":
        return True
    padding = (0, 0) if isinstance(layer.padding, str) else layer.padding
    axes = zip(padding, layer.dilation, layer.kernel_size, strict=True)
    return all(2 * pad == dilation * (size - 1) for pad, dilation, size in axes)


def _apart(layer: str, norm: str, graph: fx.Graph | None) -> bool:
    """Does the graph call both, but never the one on what the other gives?"""
    calls = [node for node in (graph.nodes if graph else ()) if node.op == "call_module"]
    of_layer = {node for node in calls if node.target == layer}
    of_norm = [node for node in calls if node.target == norm]
    return bool(of_layer and of_norm) and not any(of_layer & set(node.all_input_nodes) for node in of_norm)
