"""Outputs of layers: which axis of a weight runs over them, and the bias that is added to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from drive.layers import Layers

from .structures import axes_of
from .wrappers import owners

_BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias"}


class Rows(NamedTuple):
    """
    Attributes:
        axis: of the weight, over its outputs.
        bias: [outputs]; None: there is none.
    """

    axis: int
    bias: Tensor | None


def rows_of(model: nn.Module, weights: Mapping[str, Tensor], layers: Layers | None = None) -> dict[str, Rows]:
    """The outputs of these weights of a model, by their names."""
    axes, places = axes_of(model, weights, layers), owners(model)
    found = {}
    for name in weights:
        module, key = places[name]
        bias = module._parameters.get(_BIASES.get(key, ""))
        fits = bias is not None and len(bias) == weights[name].shape[axes[name].outputs]
        found[name] = Rows(axes[name].outputs, bias if fits else None)
    return found
