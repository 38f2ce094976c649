"""From a graph and the shapes of its inputs to something that runs: the engine, and the other nodes between.

A node is the engine's if it works on images in lanes: convolutions, and what lies between them. The rest are
called as they are, Linear layers by their non-zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drive.sparse.layers import SparseLinear
from drive.sparse.measure import interleaved

from .engine import Engine
from .fuse import constants_of, fuse
from .graph import Graph, Node
from .reference import meta_values, run_node
from .specialise import specialise

Shape = torch.Size
Values = dict[str, Any]

# A Linear layer, or a convolution of single pixels, goes by its non-zeros up to this density: at 30 %,
# 2048-1000 and 4096-4096 took dense 1.0 to 3.3 times as long, with 1 to 64 rows (AMD EPYC, 2 threads);
# 512-10 0.4 to 0.8, of some us.
_SPARSE_LINEAR = 0.3

# The engine is tried against PyTorch's layers, for so many seconds each, from such a density on. It was
# ahead of them at 65 % in ResNet-18 and ResNet-50, batches of 1 to 32.
_TRIED, _TRIAL = 0.5, 0.2

ENGINE, CONTIGUOUS, CHANNELS_LAST = WAYS = ("engine", "contiguous", "channels_last")

_IN_LANES = ("conv", "act", "add", "scale", "max_pool", "avg_pool", "global_mean", "cat", "slice")


class Runner:
    """Flattened inputs like those to flattened outputs; of tensors, shapes and dtypes count.

    Args:
        graph: as traced.
        inputs: leaves of the arguments.
        threads: that will run it.
        way: one of WAYS: nodes are the engine's where they can be, or all are PyTorch's, images contiguous
        or not.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any], threads: int, way: str = ENGINE):
        values = meta_values(graph, inputs)
        graph = fuse(specialise(graph, values), values)
        shapes = {n: v.shape for n, v in meta_values(graph, inputs).items() if isinstance(v, Tensor)}
        self.nodes = [Node(node.name, node.kind, node.inputs, dict(node.options)) for node in graph]
        self.way = way
        self.in_lanes = in_lanes(graph, shapes) if way == ENGINE else set()
        if way == CHANNELS_LAST:
            for name, tensor in graph.constants.items():
                if tensor.dim() == 4:
                    graph.constants[name] = tensor.to(memory_format=torch.channels_last)
        self._inputs, self._outputs = [input.name for input in graph.inputs], graph.outputs
        self.density = _density(graph, shapes)
        levels, between = _levels(graph, self.in_lanes)
        self.levels = len(levels)
        self._between = [[(node.name, _step(node, graph, shapes)) for node in nodes] for nodes in between]
        self._engine: Engine | None = None
        if levels:
            outside = {name for nodes in between for node in nodes for name in node.inputs}
            outside |= {name for name in graph.outputs if name is not None}
            self._engine = Engine(levels, shapes, graph.constants, outside, threads)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        if self.way == CHANNELS_LAST:
            inputs = [_channels_last(value) for value in inputs]
        values: Values = dict(zip(self._inputs, inputs, strict=True))
        if self._engine is None:
            for steps in self._between:
                _run(steps, values)
        else:
            with self._engine.start() as call:
                _run(self._between[0], values)
                for level, steps in enumerate(self._between[1:]):
                    call.run(level, values)
                    values.update(call.outputs)
                    _run(steps, values)
        return [None if name is None else values[name] for name in self._outputs]


def _run(steps: Sequence[tuple[str, Callable[[Values], Any]]], values: Values) -> None:
    for name, step in steps:
        values[name] = step(values)


def in_lanes(graph: Graph, shapes: Mapping[str, Shape]) -> set[str]:
    """Names of the nodes that are the engine's: those that work on as many images as the first one."""
    found: set[str] = set()
    batch: int | None = None
    for node in graph:
        if node.kind not in _IN_LANES or not _is_image(shapes.get(node.inputs[0])):
            continue
        starts = node.kind == "conv"
        if (starts or any(name in found for name in node.inputs)) and _fits(node, graph, shapes):
            images = {shapes[name][0] for name in (*node.inputs, node.name)}
            if images == {shapes[node.name][0] if batch is None else batch}:
                batch = shapes[node.name][0]
                found.add(node.name)
    return found


def _is_image(shape: Shape | None) -> bool:
    return shape is not None and len(shape) == 4 and shape.numel() > 0


def _fits(node: Node, graph: Graph, shapes: Mapping[str, Shape]) -> bool:
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
    """The engine's nodes by level, and the others: those before all levels, after the first, after the
    second ..."""
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


def _step(node: Node, graph: Graph, shapes: Mapping[str, Shape]) -> Callable[[Values], Any]:
    """A node that is called, as a function of the values."""
    if node.kind in ("linear", "conv"):
        weight = graph.constants[node.options["weight"]]
        single = node.kind == "linear" or (
            (1, 1) == tuple(weight.shape[2:]) == tuple(shapes[node.inputs[0]][2:])
            and node.options["groups"] == 1
            and not any(node.options["padding"])
        )
        if single and int(weight.count_nonzero()) < _SPARSE_LINEAR * weight.numel():
            return _sparse_linear(node, graph)
    constants = {name: graph.constants[name] for name in constants_of(node) if name in graph.constants}
    return lambda values: run_node(node, values, constants)


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


def _channels_last(value: Any) -> Any:
    image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if image else value


def _compiled() -> bool:
    """Is the engine there? Where nothing was compiled, PyTorch's own layers serve."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("drive::engine_run", "CPU"))


def _density(graph: Graph, shapes: Mapping[str, Shape]) -> float:
    """Share of the convolutions' multiply-adds that is left."""
    left = all_of_them = 0
    for node in graph:
        if node.kind == "conv":
            weight, pixels = graph.constants[node.options["weight"]], shapes[node.name][2:].numel()
            left += int(weight.count_nonzero()) * pixels
            all_of_them += weight.numel() * pixels
    return left / max(all_of_them, 1)


def lower(graph: Graph, inputs: Sequence[Any], measured: bool) -> Runner:
    """What runs a graph for inputs like these, with as many threads as torch has now.

    The engine is tried against PyTorch's own layers, on these inputs, where it may be slower: where values
    leave it and come back, or half of the multiply-adds are left. Not `measured`: PyTorch's
    have it from more than half on.
    """
    threads = torch.get_num_threads()
    if not _compiled():
        return Runner(graph, inputs, threads, CONTIGUOUS)
    runner = Runner(graph, inputs, threads)
    if runner.levels <= 1 and runner.density <= _TRIED:
        return runner
    if not measured:
        return runner if runner.density <= _TRIED else Runner(graph, inputs, threads, CONTIGUOUS)
    ways = {ENGINE: runner, **{way: Runner(graph, inputs, threads, way) for way in WAYS if way != ENGINE}}
    seconds = interleaved({way: partial(found, inputs) for way, found in ways.items()}, seconds=_TRIAL)
    return ways[min(seconds, key=seconds.__getitem__)]
