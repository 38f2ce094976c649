"""A network for inference as a list of nodes: traced (trace.py), normalisation folded, epilogues fused
(fuse.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

# Activations that every kernel knows, by their names in torch.nn.functional; "" is none.
ACTIVATIONS = ("", "relu", "relu6", "silu", "hardswish")


@dataclass(frozen=True)
class Ref:
    """A value or a constant by name, among the arguments of a call."""

    name: str


@dataclass
class Node:
    """One step, which makes the value of its name.

    kind, its inputs (names of values before it) and options:
        conv: (x,) or (x, residual); weight, bias (constants' names; bias may be None), stride, padding,
        dilation
            (two ints each; zeros above and to the left), after (those below and to the right, if others),
            groups,
            act: act(conv(x) + residual)
        slice: (x,); start, size: channels of it
        linear: (x,); weight, bias, act
        act: (x,); act
        add: (a, b) of one shape; act: act(a + b)
        scale: (x, s), [N, C, H, W] and [N, C, 1, 1]: x * s
        max_pool: (x,); kernel, stride, padding, dilation (two ints each), ceil_mode
        avg_pool: (x,); kernel, stride, padding, ceil_mode, count_include_pad
        global_mean: (x,), [N, C, H, W] -> [N, C, 1, 1]
        cat: (a, b, ...) along dimension 1
        call: any op of torch, or of the module operator; target ("aten.view.default", "operator.getitem"),
        args,
            kwargs: plain values, in which Ref stands for a value or a constant; inputs are the values among
            them
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Input:
    """A leaf of the arguments.

    sizes: of a tensor's dimensions, a number or a symbol, which is one number wherever it stands.
    dtype: of a tensor ("float32"); None: no tensor, and `value` is what it has to be.
    """

    name: str
    sizes: list[int | str] = field(default_factory=list)
    dtype: str | None = None
    value: Any = None


@dataclass
class Graph:
    """The nodes in an order in which they can run.

    constants: weights (masked, normalisation folded), biases, and whatever else nodes use.
    masked: of constants that are weights with a mask, the parameter's name in the model.
    outputs: names of the values that make up the result; None where that is None.
    ranges: least and most of each symbol.
    guards: what else must hold of the inputs' sizes, as expressions (guards.py).
    arguments, result: how inputs and outputs are nested.
    """

    inputs: list[Input]
    nodes: list[Node]
    outputs: list[str | None]
    constants: dict[str, Tensor]
    masked: dict[str, str]
    ranges: dict[str, tuple[int, int | None]]
    guards: list[str]
    arguments: pytree.TreeSpec
    result: pytree.TreeSpec

    def readers(self) -> dict[str, list[Node]]:
        """The nodes that read each value."""
        found: dict[str, list[Node]] = {input.name: [] for input in self.inputs}
        for node in self.nodes:
            found[node.name] = []
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return found

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)
