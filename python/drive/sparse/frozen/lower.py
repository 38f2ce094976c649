"""From a graph and the shapes of its inputs to something that runs: the engine, and the other nodes between.

A node is the engine's if it works on images in lanes: convolutions, and what lies between them. The rest are called
as they are, Linear layers by their non-zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drive.sparse.layers import SparseLinear

from .engine import Engine
from .graph import Graph, Node
from .reference import meta_values, run_node

Shape = tuple[int, ...]
Values = dict[str, Any]

# A Linear layer, or a convolution of single pixels, by its non-zeros: from so few on it is faster.
_SPARSE_LINEAR = 0.3

_IN_LANES = ("conv", "act", "add", "scale", "max_pool", "avg_pool", "global_mean", "cat")


class Runner:
    """Flattened inputs like those to flattened outputs; of tensors, shapes and dtypes count."""

    def __init__(self, graph: Graph, inputs: Sequence[Any], threads: int):
        self._graph = graph
        found = meta_values(graph, inputs)
        known = {name: value.shape for name, value in found.items() if isinstance(value, Tensor)}
        engine_nodes = in_lanes(graph, known)
        levels, between = _levels(graph, engine_nodes)
        self._between = [[_step(node, graph, known) for node in nodes] for nodes in between]
        self._engine: Engine | None = None
        if levels:
            made_by_others = {name for nodes in between for node in nodes for name in node.inputs}
            outside = made_by_others | {name for name in graph.outputs if name is not None}
            self._engine = Engine(levels, known, graph.constants, outside, threads)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        values: Values = dict(zip((i.name for i in self._graph.inputs), inputs, strict=True))
        if self._engine is None:
            for steps in self._between:
                _run(steps, values)
        else:
            with self._engine.start() as call:
                for level, steps in enumerate(self._between):
                    if level > 0:
                        call.run(level - 1, values)
                        values.update(call.outputs)
                    _run(steps, values)
        return [None if name is None else values[name] for name in self._graph.outputs]


def _run(steps: Sequence[tuple[str, Callable[[Values], Any]]], values: Values) -> None:
    for name, step in steps:
        values[name] = step(values)


def in_lanes(graph: Graph, shapes: Mapping[str, Any]) -> set[str]:
    """Names of the nodes that are the engine's."""
    found: set[str] = set()
    for node in graph:
        if node.kind not in _IN_LANES or not _is_image(shapes.get(node.inputs[0])):
            continue
        starts = node.kind == "conv"
        if (starts or any(name in found for name in node.inputs)) and _fits(node, graph, shapes):
            found.add(node.name)
    return found


def _is_image(shape: Any) -> bool:
    return isinstance(shape, torch.Size) and len(shape) == 4 and shape.numel() > 0


def _fits(node: Node, graph: Graph, shapes: Mapping[str, Any]) -> bool:
    planes = [shapes[name] for name in (*node.inputs[:1], node.name)]
    if not all(_is_image(shape) and shape.numel() < 2**31 for shape in planes):
        return False
    if node.kind != "global_mean" and any(shape[2:].numel() == 1 for shape in planes):
        return False  # single pixels fill no lanes
    if node.kind == "avg_pool":
        o = node.options
        return not o["ceil_mode"] and (o["count_include_pad"] or not any(o["padding"]))
    if node.kind == "cat":
        return all(_is_image(shapes[name]) for name in node.inputs)
    return True


def _levels(graph: Graph, engine: set[str]) -> tuple[list[list[Node]], list[list[Node]]]:
    """The engine's nodes by level, and the others: those before all levels, after the first, after the second ..."""
    level: dict[str, int] = {input.name: 0 for input in graph.inputs}
    kinds = {node.name: node.kind for node in graph}
    levels: dict[int, list[Node]] = {}
    between: dict[int, list[Node]] = {}
    for node in graph:
        if node.name in engine:
            # what others made, and means, which are no images, are there from the next level on
            inside = [n in engine and kinds[n] != "global_mean" for n in node.inputs]
            at = max(level[n] + (0 if i else 1) for n, i in zip(node.inputs, inside, strict=True))
            levels.setdefault(at, []).append(node)
        else:
            at = max((level[n] for n in node.inputs), default=0)
            between.setdefault(at, []).append(node)
        level[node.name] = at
    count = max(levels, default=0)
    return [levels[i] for i in range(1, count + 1)], [between.get(i, []) for i in range(count + 1)]


def _step(node: Node, graph: Graph, shapes: Mapping[str, Any]) -> tuple[str, Callable[[Values], Any]]:
    """A node that is called, as a function of the values."""
    if node.kind in ("linear", "conv"):
        weight = graph.constants[node.options["weight"]]
        single = node.kind == "linear" or (
            tuple(weight.shape[2:]) == (1, 1) == tuple(shapes[node.inputs[0]][2:])
            and node.options["groups"] == 1
            and not any(node.options["padding"])
        )
        if single and int(weight.count_nonzero()) < _SPARSE_LINEAR * weight.numel():
            return node.name, _sparse_linear(node, graph)
    return node.name, lambda values: run_node(node, values, graph.constants)


def _sparse_linear(node: Node, graph: Graph) -> Callable[[Values], Any]:
    weight, bias = graph.constants[node.options["weight"]], node.options["bias"]
    dense = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False)
    dense.weight = nn.Parameter(weight.flatten(1), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(graph.constants[bias], requires_grad=False)
    layer = SparseLinear.from_dense(dense, weight.flatten(1) != 0)
    rest = Node(node.name, "act", (node.name,), {"act": node.options["act"]})

    def run(values: Values) -> Tensor:
        input = values[node.inputs[0]]
        output = layer(input.flatten(1) if node.kind == "conv" else input)
        if node.kind == "conv":
            output = output[..., None, None]
            if len(node.inputs) > 1:
                output = output + values[node.inputs[1]]
        result: Tensor = run_node(rest, {node.name: output}, {})
        return result

    return run


def lower(graph: Graph, inputs: Sequence[Any]) -> Runner:
    """What runs a graph for inputs like these, with as many threads as torch has now."""
    return Runner(graph, inputs, torch.get_num_threads())
