"""Which parameters of a module are weights, and how it multiplies by them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .known import KNOWN
from .record import Layer, Weight, Weights

Layers = Mapping[type[nn.Module], Layer]  # one's own, for one call

_registered: dict[type[nn.Module], Layer] = {}
_registrations = 0  # with each of them what was looked up before, or just now in another thread, is forgotten


def register_layer(kind: type[nn.Module], weights: Layer) -> None:
    """Say which parameters of a layer type are weights, for all calls from now on (`layers=`: for one call).

    Args:
        kind: the type; subclasses are taken for it unless they are registered themselves.
        weights: `drive.layers.Weight`s by the parameters' keys ("*" stands for anything), or a function of
            the module that gives them; empty: it has none.

    Raises:
        TypeError: not a type of modules, or weights that are not.
    """
    global _registrations
    check_layers("register_layer", {kind: weights})
    _registered[kind] = weights
    _registrations += 1


def check_layers(op: str, layers: object) -> None:
    """Raise TypeError unless this is layer types with their weights."""
    if not isinstance(layers, Mapping):
        raise TypeError(f"{op}: layers must be a mapping of module types, got {type(layers).__name__}")
    for kind, weights in layers.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"{op}: a layer must be a subclass of nn.Module, got {kind!r}")
        _check_weights(op, kind, weights)


def weights_of(module: nn.Module, layers: Layers | None = None, *, op: str = "weights_of") -> Weights:
    """The weights among a module's own parameters, by their keys; empty where its type is not known.

    Args:
        layers: types that go before those that are registered or known.

    Raises:
        TypeError: a function for the type does not give weights.
        ValueError: a weight has axes that its parameter has not.
    """
    kind: type = type(module)
    if not layers and _layer(kind) is None:  # most of a model's modules
        return {}
    parameters = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    return fitting(module, parameters, layers, op=op)


def fitting(
    module: nn.Module, tensors: Mapping[str, Tensor], layers: Layers | None = None, *, op: str = "fitting"
) -> Weights:
    """The same of tensors that the module has under these names, parameters or computed from some."""
    kind: type = type(module)
    layer = next((layers[base] for base in kind.__mro__ if base in layers), None) if layers else None
    if layer is None:
        layer = _layer(kind)
    if layer is None:
        return {}
    if callable(layer):
        layer = layer(module)
        _check_weights(op, kind, layer)
    found: dict[str, Weight] = {}
    for key, tensor in tensors.items():
        weight = layer.get(key) or next((layer[like] for like in layer if fnmatchcase(key, like)), None)
        if weight is None:
            continue
        found[key] = weight
        if is_lazy(tensor):
            continue
        axes, size = [weight.outputs, weight.inputs, weight.stacked, *weight.matrices], tensor.shape
        if any(not 0 <= axis < len(size) for axis in axes) or size[weight.stacked] % weight.parts:
            raise ValueError(
                f"{op}: {kind.__name__}.{key} must have the axes of {weight}, got shape {tuple(size)}"
            )
    return found


def _layer(kind: type) -> Layer | None:
    return _looked_up(kind, _registrations)


@cache
def _looked_up(kind: type, registrations: int) -> Layer | None:
    for base in kind.__mro__:
        if base in _registered:
            return _registered[base]
        if (layer := _known(base)) is not None:
            return layer
    return None


def _known(kind: type) -> Layer | None:
    package, name = kind.__module__.partition(".")[0], kind.__name__
    there = (layer for (its, like), layer in KNOWN.items() if its == package and fnmatchcase(name, like))
    return next(there, None)


def _check_weights(op: str, kind: type, weights: Any) -> None:
    if callable(weights):
        return
    if not isinstance(weights, Mapping) or not all(isinstance(w, Weight) for w in weights.values()):
        raise TypeError(
            f"{op}: weights of {kind.__name__} must be a mapping of keys to Weight, got {weights!r}"
        )
