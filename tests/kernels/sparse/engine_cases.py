"""Networks for the engine, made by numbers: every kind of step, on ugly shapes."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from drive.sparse.frozen.engine import Engine
from drive.sparse.frozen.graph import Node
from drive.sparse.frozen.reference import run_node

# Of the largest output, float32: sums of a few hundred products in another order.
TOLERANCE = 1e-5


class Network:
    """Nodes and their constants, and what they give for an input."""

    def __init__(self, input: Tensor, seed: int = 0):
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {"x": input}
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, kind: str, *inputs: str, **options: object) -> str:
        node = Node(name, kind, inputs, options)
        self.nodes.append(node)
        self.values[name] = run_node(node, self.values, self.constants)
        return name

    def conv(
        self,
        name: str,
        *inputs: str,
        outputs: int,
        kernel: tuple[int, int] = (3, 3),
        stride: int = 1,
        padding: tuple[int, int] = (1, 1),
        dilation: int = 1,
        groups: int = 1,
        act: str = "relu",
        density: float = 0.3,
        **more: object,
    ) -> str:
        channels = self.values[inputs[0]].shape[1] // groups
        weight = torch.randn(outputs, channels, *kernel, generator=self.generator)
        weight /= (channels * kernel[0] * kernel[1] * max(density, 0.05)) ** 0.5
        weight *= torch.rand(weight.shape, generator=self.generator) < density
        self.constants[name + ".w"] = weight
        self.constants[name + ".b"] = torch.randn(outputs, generator=self.generator)
        return self.add(
            name, "conv", *inputs, weight=name + ".w", bias=name + ".b", stride=[stride] * 2,
            padding=list(padding), dilation=[dilation] * 2, groups=groups, act=act, **more,
        )  # fmt: skip

    def error(self, outside: set[str], threads: int) -> float:
        """The largest difference of the engine from PyTorch, relative to the largest output; twice over."""
        shapes = {name: value.shape for name, value in self.values.items()}
        engine = Engine([self.nodes], shapes, self.constants, outside, threads)
        worst = 0.0
        for _ in range(2):  # in memory that was used before
            with engine.start() as call:
                call.run(0, self.values)
            for name, got in call.outputs.items():
                expected = self.values[name]
                assert got.shape == expected.shape
                difference = (got - expected).abs().amax() / expected.abs().amax().clamp_min(1e-6)
                worst = max(worst, float(difference)) if torch.isfinite(difference) else float("inf")
        return worst


def network(seed: int) -> tuple[Network, set[str], int]:
    """A network, the values that are asked for, and threads."""
    draw = random.Random(seed)
    while True:
        batch, channels = draw.choice((1, 1, 2, 3, 4, 5, 8, 16, 17, 33)), draw.choice((1, 3, 8, 16, 24))
        height = draw.choice((1, 2, 3, 4, 5, 7, 8, 11, 14, 16, 23, 28, 33))
        width = draw.choice((height, height, 1, 5, 9, 16, 31))
        kernel = draw.choice(((1, 1), (1, 1), (2, 2), (3, 3), (3, 3), (5, 5), (1, 7), (3, 1)))
        padding, dilation = draw.choice(((0, 0), (1, 1), (1, 1), (2, 2), (3, 0))), draw.choice((1, 1, 2))
        spans = [(k - 1) * dilation + 1 for k in kernel]
        if all(s <= n + 2 * p for s, n, p in zip(spans, (height, width), padding, strict=True)):
            break
    groups = draw.choice((1, 1, 1, channels))
    outputs = draw.choice((4, 16, 40)) if groups == 1 else channels * draw.choice((1, 2))
    n = Network(
        torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)), seed
    )
    acts = ("", "relu", "relu6", "silu", "hardswish")
    n.conv(
        "a", "x", outputs=outputs, kernel=kernel, stride=draw.choice((1, 1, 2, 3)), padding=padding,
        dilation=dilation, groups=groups, act=draw.choice(acts), density=draw.choice((0.0, 0.05, 0.3, 1.0)),
    )  # fmt: skip
    n.conv("b", "a", outputs=16)
    n.conv("c", "b", "a", outputs=outputs, kernel=(1, 1), padding=(0, 0), act=draw.choice(("", "relu")))
    n.add(
        "m", "max_pool", "c", kernel=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1],
        ceil_mode=draw.choice((True, False)),
    )  # fmt: skip
    n.conv("e", "m", outputs=8, stride=2)
    n.conv("f", "m", outputs=8, stride=2, kernel=(1, 1), padding=(0, 0))
    n.add("g", "cat", "e", "f", "e")
    n.add("h", "add", "g", "g", act="relu")
    n.add("i", "slice", "h", start=5, size=9)
    n.conv("j", "i", outputs=4)
    n.add("k", "act", "i", act=draw.choice(acts[1:]))
    n.add("l", "global_mean", "h")
    n.add(
        "p",
        "avg_pool",
        "b",
        kernel=[2, 2],
        stride=[1, 1],
        padding=[1, 1],
        ceil_mode=False,
        count_include_pad=True,
    )
    outside = {node.name for node in n.nodes if draw.random() < 0.6} or {"l"}
    return n, outside, draw.choice((1, 2, 3))


def worst_error(count: str) -> float:
    """Of so many networks."""
    return max(n.error(outside, threads) for n, outside, threads in map(network, range(int(count))))
