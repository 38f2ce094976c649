"""How a layer multiplies by a weight: which of its axes are outputs, inputs, and matrices of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

Uses = Callable[[nn.Module, Tensor, Tensor], int]  # layer, its first input, its first output -> a number


def tokens(module: nn.Module, inputs: Tensor, outputs: Tensor) -> int:
    """Of layers that work on the last axis, [B, ..., inputs]: the rows of one sample."""
    return prod(inputs.shape[1:-1])


def output_positions(module: nn.Module, inputs: Tensor, outputs: Tensor) -> int:
    """Of convolutions, [B, channels, ...]: the positions of the output."""
    return prod(outputs.shape[2:])


def input_positions(module: nn.Module, inputs: Tensor, outputs: Tensor) -> int:
    """Of transposed convolutions: the positions of the input."""
    return prod(inputs.shape[2:])


def steps(module: nn.Module, inputs: Tensor, outputs: Tensor) -> int:
    """Of recurrent layers: the length of a sequence, [B, length, inputs] or [length, B, inputs]."""
    return inputs.shape[1 if getattr(module, "batch_first", False) else 0]


@dataclass(frozen=True)
class Weight:
    """A parameter that is a matrix, or several. Axes are the parameter's; those not named are a kernel's.

    Attributes:
        outputs, inputs: the axes that run over the outputs and the inputs of a matrix.
        matrices: axes of which every index is a matrix of its own: experts.
        stacked: the axis along which `parts` matrices lie one after the other: gates of an LSTM, q, k and v,
            groups of a convolution.
        parts: their number.
        uses: how often an entry is multiplied for one sample.
    """

    outputs: int = 0
    inputs: int = 1
    matrices: tuple[int, ...] = ()
    stacked: int = 0
    parts: int = 1
    uses: Uses = tokens


Weights = Mapping[str, Weight]  # by the keys of a module's parameters; "*" stands for anything in them
Layer = Weights | Callable[[nn.Module], Weights]
