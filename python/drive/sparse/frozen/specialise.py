"""A traced graph for inputs of one size: numbers that depend on it become plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graph import Graph, Node, Ref


def specialise(graph: Graph, values: Mapping[str, Any]) -> Graph:
    """The same function of such inputs alone; `values`: every value of the graph (reference.meta_values).

    A new graph, whose nodes may be changed; constants are shared.
    """
    numbers = {name: value for name, value in values.items() if isinstance(value, (bool, int, float))}

    def plain(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return numbers.get(argument.name, argument)
        return [plain(part) for part in argument] if isinstance(argument, list) else argument

    nodes = []
    outputs = {name for name in graph.outputs if name in numbers}
    for node in graph:
        if node.name in numbers and node.name not in outputs:
            continue
        options = {
            "target": node.options["target"],
            "args": plain(node.options["args"]),
            "kwargs": {key: plain(value) for key, value in node.options["kwargs"].items()},
        }
        inputs = tuple(name for name in node.inputs if name not in numbers)
        nodes.append(Node(node.name, node.kind, inputs, options))
    changed = {"nodes": nodes, "constants": dict(graph.constants), "masked": dict(graph.masked)}
    return Graph(**{**vars(graph), **changed})
