"""Calls of PyTorch's ops as the kinds of nodes that the engine knows (graph.Node)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .graph import Node, Ref

_ACTS = {"relu": "relu", "silu": "silu", "hardswish": "hardswish", "relu6": "relu6"}


def recognise(node: Node, values: Mapping[str, Any], constants: Mapping[str, Tensor]) -> list[Node]:
    """What a call is; itself if it is nothing that is known. `values`: their shapes.

    Three kinds are of fuse.py alone, which lets none remain: norm (weight, bias, mean, var, eps), pad
    (sides, call) and split (parts, call).
    """
    target = node.options["target"]
    if not target.startswith("aten."):
        return [node]
    name = target.split(".")[1]
    arguments = _Arguments(node, values, constants)
    make = _MAKERS.get(name)
    found = make(node, arguments) if make and not _of_other_dtypes(node, values) else None
    return [node] if found is None else found


def _of_other_dtypes(node: Node, values: Mapping[str, Any]) -> bool:
    tensors = [values[name] for name in (*node.inputs, node.name) if isinstance(values.get(name), Tensor)]
    return any(t.dtype != torch.float32 for t in tensors)


class _Arguments:
    """A call's, by position or by name, defaults filled in."""

    def __init__(self, node: Node, values: Mapping[str, Any], constants: Mapping[str, Tensor]):
        namespace, name, overload = node.options["target"].split(".")
        schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
        given = node.options["args"]
        self._found: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            default = argument.default_value if argument.has_default_value() else None
            self._found[argument.name] = (
                given[i] if i < len(given) else node.options["kwargs"].get(argument.name, default)
            )
        self._values, self._constants = values, constants

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def constant(self, name: str) -> str | None:
        """The name of an argument that is a constant."""
        found = self._found[name]
        return found.name if isinstance(found, Ref) and found.name in self._constants else None

    def shape(self, name: str) -> torch.Size | None:
        """Of an argument that is a value."""
        found = self._found[name]
        value = self._values.get(found.name) if isinstance(found, Ref) else None
        return value.shape if isinstance(value, Tensor) else None

    def image(self, name: str) -> bool:
        shape = self.shape(name)
        return shape is not None and len(shape) == 4

    def pair(self, name: str, instead: str | None = None) -> list[int] | None:
        """Two numbers, of which one may be given for both; those of another argument if there are none."""
        found = self._found[name]
        if not found and instead is not None:
            return self.pair(instead)
        if not isinstance(found, (list, tuple)):
            found = [found]
        if not all(isinstance(n, int) for n in found):
            return None
        return [int(found[0]), int(found[-1])]


def _conv(node: Node, a: _Arguments) -> list[Node] | None:
    weight, stride, dilation = a.constant("weight"), a.pair("stride"), a.pair("dilation")
    optional = a["bias"] is None or a.constant("bias")
    if weight is None or not optional or not a.image("input") or stride is None or dilation is None:
        return None
    if isinstance(a["padding"], str):
        reach = [d * (k - 1) for d, k in zip(dilation, a._constants[weight].shape[2:], strict=True)]
        padding = [0, 0] if a["padding"] == "valid" else [r // 2 for r in reach]
        if a["padding"] == "same" and any(r % 2 for r in reach):
            return None
    else:
        padding = a.pair("padding") or [0, 0]
    options = {
        "weight": weight, "bias": a.constant("bias"), "stride": stride, "padding": padding,
        "dilation": dilation, "groups": a["groups"], "act": "",
    }  # fmt: skip
    return [Node(node.name, "conv", node.inputs, options)]


def _linear(node: Node, a: _Arguments) -> list[Node] | None:
    weight = a.constant("weight")
    if weight is None or (a["bias"] is not None and a.constant("bias") is None) or a.shape("input") is None:
        return None
    return [Node(node.name, "linear", node.inputs, {"weight": weight, "bias": a.constant("bias"), "act": ""})]


def _norm(node: Node, a: _Arguments) -> list[Node] | None:
    named = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    found = {ours: a.constant(theirs) for ours, theirs in named.items()}
    training = a._found.get("training", False)
    if not a.image("input") or training or found["mean"] is None or found["var"] is None:
        return None
    if any(a[theirs] is not None and found[ours] is None for ours, theirs in named.items()):
        return None
    return [Node(node.name, "norm", node.inputs, {**found, "eps": a["eps"]})]


def _act(node: Node, a: _Arguments) -> list[Node] | None:
    name = node.options["target"].split(".")[1]
    if name == "hardtanh":
        if (a["min_val"], a["max_val"]) != (0, 6):
            return None
        name = "relu6"
    return [Node(node.name, "act", node.inputs, {"act": _ACTS[name]})]


def _add(node: Node, a: _Arguments) -> list[Node] | None:
    shapes = [a.shape("self"), a.shape("other")]
    if None in shapes or shapes[0] != shapes[1] or a["alpha"] != 1:
        return None
    pair = (a["self"].name, a["other"].name)
    return [Node(node.name, "add", pair, {"act": ""})]


def _mul(node: Node, a: _Arguments) -> list[Node] | None:
    for image, by in (("self", "other"), ("other", "self")):
        shape = a.shape(image)
        if a.image(image) and a.image(by) and shape is not None and a.shape(by) == (*shape[:2], 1, 1):
            return [Node(node.name, "scale", (a[image].name, a[by].name))]
    return None


def _max_pool(node: Node, a: _Arguments) -> list[Node] | None:
    options = {
        name: a.pair(f"{name}_size" if name == "kernel" else name, "kernel_size")
        for name in ("kernel", "stride", "padding", "dilation")
    }
    if not a.image("self") or None in options.values():
        return None
    return [Node(node.name, "max_pool", node.inputs, {**options, "ceil_mode": a["ceil_mode"]})]


def _avg_pool(node: Node, a: _Arguments) -> list[Node] | None:
    options = {
        "kernel": a.pair("kernel_size"),
        "stride": a.pair("stride", "kernel_size"),
        "padding": a.pair("padding"),
    }
    if not a.image("self") or None in options.values() or a["divisor_override"] is not None:
        return None
    rest = {"ceil_mode": a["ceil_mode"], "count_include_pad": a["count_include_pad"]}
    return [Node(node.name, "avg_pool", node.inputs, {**options, **rest})]


def _adaptive(node: Node, a: _Arguments) -> list[Node] | None:
    if not a.image("self") or a.pair("output_size") != [1, 1]:
        return None
    return [Node(node.name, "global_mean", node.inputs)]


def _mean(node: Node, a: _Arguments) -> list[Node] | None:
    if not a.image("self") or a["dtype"] is not None or sorted(d % 4 for d in a["dim"] or ()) != [2, 3]:
        return None
    if a["keepdim"]:
        return [Node(node.name, "global_mean", node.inputs)]
    mean = Node(node.name + ".mean", "global_mean", node.inputs)
    flat = {"target": "aten.flatten.using_ints", "args": [Ref(mean.name), 1], "kwargs": {}}
    return [mean, Node(node.name, "call", (mean.name,), flat)]


def _cat(node: Node, a: _Arguments) -> list[Node] | None:
    parts = a["tensors"]
    if a["dim"] not in (1, -3) or not all(isinstance(part, Ref) for part in parts):
        return None
    names = [part.name for part in parts]
    if not all(isinstance(v := a._values.get(name), Tensor) and v.dim() == 4 for name in names):
        return None
    return [Node(node.name, "cat", tuple(names))]


def _pad(node: Node, a: _Arguments) -> list[Node] | None:
    sides = a["pad"]
    zeros = a["value"] in (None, 0) and a._found.get("mode", "constant") == "constant"
    if not a.image("self") or not zeros or len(sides) != 4 or not all(isinstance(n, int) for n in sides):
        return None
    pairs = [(sides[0], sides[1]), (sides[2], sides[3])]
    return [Node(node.name, "pad", node.inputs, {"sides": pairs, "call": node.options})]


def _split(node: Node, a: _Arguments) -> list[Node] | None:
    parts = a._values[node.name]
    if not a.image("self") or a["dim"] not in (1, -3) or not isinstance(parts, (list, tuple)):
        return None
    spans, start = [], 0
    for part in parts:
        spans.append((start, part.shape[1]))
        start += part.shape[1]
    return [Node(node.name, "split", node.inputs, {"parts": spans, "call": node.options})]


def _slice(node: Node, a: _Arguments) -> list[Node] | None:
    if not a.image("self") or a["dim"] not in (1, -3) or a["step"] != 1:
        return None
    size = a._values[node.name].shape[1]
    start, stop, _ = slice(a["start"], a["end"]).indices(a._values[node.inputs[0]].shape[1])
    if stop - start != size:
        return None
    return [Node(node.name, "slice", node.inputs, {"start": start, "size": size})]


_MAKERS = {
    "conv2d": _conv, "linear": _linear, "_native_batch_norm_legit_no_training": _norm, "batch_norm": _norm,
    "relu": _act, "hardtanh": _act, "silu": _act, "hardswish": _act, "relu6": _act, "add": _add, "mul": _mul,
    "max_pool2d": _max_pool, "avg_pool2d": _avg_pool, "adaptive_avg_pool2d": _adaptive, "mean": _mean,
    "cat": _cat, "constant_pad_nd": _pad, "pad": _pad, "split": _split,
    "split_with_sizes": _split, "chunk": _split, "slice": _slice,
}  # fmt: skip
