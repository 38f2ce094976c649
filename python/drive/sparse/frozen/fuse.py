"""A traced graph in as few nodes as it can be: known ops by kind, normalisation folded, epilogues fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .graph import Graph, Node, Ref
from .recognise import recognise


def fuse(graph: Graph, values: Mapping[str, Any]) -> Graph:
    """The same function; `values`: every value of the graph, for shapes (reference.meta_values)."""
    constants = dict(graph.constants)
    nodes = [found for node in graph for found in recognise(node, values, constants)]
    graph = Graph(**{**vars(graph), "nodes": nodes, "constants": constants})
    for step in (_take_items, _fold_norms, _fold_pads, _fuse_sums, _fuse_activations, _drop_dead):
        step(graph)
    return graph


def _replace(graph: Graph, names: Mapping[str, str], gone: set[str]) -> None:
    """Read others instead of some values, and leave nodes out."""
    if not names and not gone:
        return

    def renamed(name: str) -> str:
        while name in names:
            name = names[name]
        return name

    def rewritten(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return Ref(renamed(argument.name))
        return [rewritten(part) for part in argument] if isinstance(argument, list) else argument

    kept = []
    for node in graph:
        if node.name in gone:
            continue
        options = node.options
        if node.kind == "call":
            keywords = {key: rewritten(value) for key, value in options["kwargs"].items()}
            options = {**options, "args": rewritten(options["args"]), "kwargs": keywords}
        kept.append(Node(node.name, node.kind, tuple(map(renamed, node.inputs)), options))
    graph.nodes = kept
    graph.outputs = [None if name is None else renamed(name) for name in graph.outputs]


def _only_reader(graph: Graph) -> Callable[[str], Node | None]:
    readers = graph.readers()
    outside = set(graph.outputs)
    return lambda name: readers[name][0] if len(readers[name]) == 1 and name not in outside else None


def _take_items(graph: Graph) -> None:
    """Items of tuples: normalisation's first one, and the parts of a split."""
    made = {node.name: node for node in graph}
    norms: dict[str, str] = {}
    for i, node in enumerate(graph.nodes):
        if node.options.get("target") != "operator.getitem":
            continue
        whole, item = made.get(node.inputs[0]), node.options["args"][1]
        if whole is not None and whole.kind == "norm":
            norms[node.name] = whole.name
        elif whole is not None and whole.kind == "split":
            start, size = whole.options["parts"][item]
            graph.nodes[i] = Node(node.name, "slice", whole.inputs, {"start": start, "size": size})
    _replace(graph, norms, set(norms))
    others = {name for node in graph for name in node.inputs}
    for i, node in enumerate(graph.nodes):
        if node.kind == "split" and node.name in others:
            graph.nodes[i] = Node(node.name, "call", node.inputs, node.options["call"])


def _scale_and_shift(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    o, c = norm.options, graph.constants
    scale = (c[o["var"]].double() + o["eps"]).rsqrt()
    if o["weight"] is not None:
        scale = scale * c[o["weight"]].double()
    shift = -c[o["mean"]].double() * scale
    if o["bias"] is not None:
        shift = shift + c[o["bias"]].double()
    return scale, shift


def _fold_norms(graph: Graph) -> None:
    """Into the layer before, if nothing else reads that; else as a convolution of every channel by itself."""
    reader = _only_reader(graph)
    made = {node.name: node for node in graph}
    names: dict[str, str] = {}
    gone: set[str] = set()
    for i, norm in enumerate(graph.nodes):
        if norm.kind != "norm":
            continue
        scale, shift = _scale_and_shift(graph, norm)
        before = made.get(norm.inputs[0])
        foldable = before is not None and before.kind in ("conv", "linear") and before.options["act"] == ""
        if foldable and before is not None and reader(before.name) is norm:
            o = before.options
            weight = graph.constants[o["weight"]]
            shape = (-1, *[1] * (weight.dim() - 1))
            bias = graph.constants[o["bias"]].double() if o["bias"] else 0
            o["weight"] = _constant(
                graph, norm.name + ".weight", weight.double() * scale.view(shape), o["weight"]
            )
            o["bias"] = _constant(graph, norm.name + ".bias", shift + bias * scale)
            names[norm.name] = before.name
            gone.add(norm.name)
        else:
            weight_name = _constant(graph, norm.name + ".weight", scale.view(-1, 1, 1, 1))
            bias_name = _constant(graph, norm.name + ".bias", shift)
            graph.nodes[i] = Node(norm.name, "conv", norm.inputs, {
                "weight": weight_name, "bias": bias_name, "stride": [1, 1], "padding": [0, 0],
                "dilation": [1, 1], "groups": scale.numel(), "act": "",
            })  # fmt: skip
    _replace(graph, names, gone)


def _constant(graph: Graph, name: str, value: Tensor, instead_of: str | None = None) -> str:
    graph.constants[name] = value.float()
    if instead_of in graph.masked:
        graph.masked[name] = graph.masked[instead_of]
    return name


def _fold_pads(graph: Graph) -> None:
    """Zeros around an image become the padding of the only convolution that reads it."""
    reader = _only_reader(graph)
    names: dict[str, str] = {}
    for pad in graph:
        if pad.kind != "pad":
            continue
        conv = reader(pad.name)
        if conv is not None and conv.kind == "conv" and len(conv.inputs) == 1:
            (left, right), (top, bottom) = pad.options["sides"]
            (y, x), o = conv.options["padding"], conv.options
            o["padding"], o["after"] = [y + top, x + left], [y + bottom, x + right]
            names[pad.name] = pad.inputs[0]
    _replace(graph, names, set(names))
    for i, pad in enumerate(graph.nodes):
        if pad.kind == "pad":
            graph.nodes[i] = Node(pad.name, "call", pad.inputs, pad.options["call"])


def _fuse_sums(graph: Graph) -> None:
    """A sum's last convolution takes the other summand as its residual, and the sum's place."""
    reader = _only_reader(graph)
    position = {node.name: i for i, node in enumerate(graph)}
    made = {node.name: node for node in graph}
    gone: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if node.kind != "add":
            continue
        a, b = node.inputs
        for conv, residual in sorted(((a, b), (b, a)), key=lambda pair: -position.get(pair[0], -1)):
            found = made.get(conv)
            if found is None or found.kind != "conv" or a == b or reader(conv) is not node:
                continue
            if len(found.inputs) == 1 and not found.options["act"]:
                graph.nodes[i] = Node(node.name, "conv", (found.inputs[0], residual), found.options)
                gone.add(conv)
                break
    _replace(graph, {}, gone)


def _fuse_activations(graph: Graph) -> None:
    reader = _only_reader(graph)
    names: dict[str, str] = {}
    for node in graph:
        if node.kind in ("conv", "linear", "add") and not node.options["act"]:
            act = reader(node.name)
            if act is not None and act.kind == "act":
                node.options["act"] = act.options["act"]
                names[act.name] = node.name
    _replace(graph, names, set(names))


def _drop_dead(graph: Graph) -> None:
    """Nodes and constants that nothing reads."""
    wanted = {name for name in graph.outputs if name is not None}
    kept = []
    for node in reversed(graph.nodes):
        if node.name in wanted:
            wanted |= {*node.inputs, *constants_of(node)}
            kept.append(node)
    graph.nodes = kept[::-1]
    graph.constants = {name: t for name, t in graph.constants.items() if name in wanted}
    graph.masked = {name: of for name, of in graph.masked.items() if name in wanted}


def constants_of(node: Node) -> list[str]:
    """Names of the constants that a node uses; of a call, of its values too."""
    if node.kind != "call":
        return [node.options[key] for key in ("weight", "bias") if node.options.get(key)]

    def refs(argument: Any) -> list[str]:
        if isinstance(argument, Ref):
            return [argument.name]
        return [name for part in argument for name in refs(part)] if isinstance(argument, list) else []

    return refs([node.options["args"], list(node.options["kwargs"].values())])
