"""A network for inference as a list of nodes: traced, normalisation folded, epilogues fused (trace.py, fuse.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Activations that every kernel knows, with their torch.nn.functional names; "" is none.
ACTIVATIONS = ("", "relu", "relu6", "silu", "hardswish")


@dataclass
class Node:
    """One step, which makes the value of its name.

    kind, its inputs (names of values before it) and options:
        conv: (x,) or (x, residual); weight, bias (constants' names; bias may be None), stride, padding, dilation
            (two ints each; padding is zeros on both sides), groups, act: act(conv(x) + residual)
        linear: (x,); weight, bias, act
        act: (x,); act
        add: (a, b) of one shape; act: act(a + b)
        scale: (x, s), [N, C, H, W] and [N, C, 1, 1]: x * s
        max_pool: (x,); kernel, stride, padding, dilation (two ints each), ceil_mode
        avg_pool: (x,); kernel, stride, padding, ceil_mode, count_include_pad
        global_mean: (x,), [N, C, H, W] -> [N, C, 1, 1]
        cat: (a, b, ...) along dimension 1
        call: any op of torch; target ("aten.flatten.using_ints"), args, kwargs: plain values, in which Ref
            stands for a value or a constant; its inputs are the values among them
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ref:
    """A value or a constant by name, among the arguments of a call."""

    name: str


@dataclass
class Graph:
    """The nodes in an order in which they can run.

    inputs: names of the values that a call gives, in the order of the flattened arguments.
    outputs: names of the values that make up the result, flattened; `spec` is how (torch.utils._pytree).
    constants: weights (masked, normalisation folded), biases, and whatever else calls use.
    masked: of constants that are weights with a mask, the parameter's name in the model.
    """

    inputs: list[str]
    nodes: list[Node]
    outputs: list[str]
    constants: dict[str, Tensor]
    masked: dict[str, str]
    spec: Any = None

    def users(self) -> dict[str, list[Node]]:
        """The nodes that read each value."""
        found: dict[str, list[Node]] = {name: [] for name in self.inputs}
        for node in self.nodes:
            found[node.name] = []
            for name in node.inputs:
                found[name].append(node)
        return found

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)
