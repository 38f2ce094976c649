"""What every kind of node means, in plain PyTorch, and the shapes that come of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .graph import Graph, Node, Ref

# Where functions of sizes come from: of operator and math any, of torch sym_max and the like.
_NUMBERS: dict[str, Any] = {
    "operator": operator,
    "math": math,
    "torch": SimpleNamespace(
        **{name: getattr(torch, name) for name in dir(torch) if name.startswith("sym_")}
    ),
}


def activate(act: str, x: Tensor) -> Tensor:
    """One of graph.ACTIVATIONS."""
    result: Tensor = getattr(F, act)(x) if act else x
    return result


def run_node(node: Node, values: Mapping[str, Any], constants: Mapping[str, Tensor]) -> Any:
    """The value that a node makes."""
    o, inputs = node.options, [values[name] for name in node.inputs]
    match node.kind:
        case "call":
            return function(o["target"])(
                *(_argument(a, values, constants) for a in o["args"]),
                **{key: _argument(a, values, constants) for key, a in o["kwargs"].items()},
            )
        case "conv":
            bias = constants[o["bias"]] if o["bias"] else None
            (top, left), (bottom, right) = o["padding"], o.get("after", o["padding"])
            x, padding = inputs[0], o["padding"]
            if (top, left) != (bottom, right):
                x, padding = F.pad(x, (left, right, top, bottom)), [0, 0]
            output = F.conv2d(
                x, constants[o["weight"]], bias, o["stride"], padding, o["dilation"], o["groups"]
            )
            return activate(o["act"], output + inputs[1] if len(inputs) > 1 else output)
        case "linear":
            bias = constants[o["bias"]] if o["bias"] else None
            return activate(o["act"], F.linear(inputs[0], constants[o["weight"]], bias))
        case "act":
            return activate(o["act"], inputs[0])
        case "add":
            return activate(o["act"], inputs[0] + inputs[1])
        case "scale":
            return inputs[0] * inputs[1]
        case "max_pool":
            return F.max_pool2d(
                inputs[0], o["kernel"], o["stride"], o["padding"], o["dilation"], o["ceil_mode"]
            )
        case "avg_pool":
            return F.avg_pool2d(
                inputs[0], o["kernel"], o["stride"], o["padding"], o["ceil_mode"], o["count_include_pad"]
            )
        case "global_mean":
            return inputs[0].mean((2, 3), keepdim=True)
        case "slice":
            return inputs[0].narrow(1, o["start"], o["size"])
        case "cat":
            return torch.cat(inputs, 1)
    raise ValueError(f"run_node: kind must be one of graph.Node's, got {node.kind!r}")


def function(target: str) -> Callable[..., Any]:
    """An op of torch, or of the module operator, by the name that a call has.

    Raises:
        ValueError: there is none of that name here.
    """
    # what one kernel of attention lays out for a view, another, chosen by the inputs, may not
    namespace, *rest = target.replace("aten.view.default", "aten.reshape.default").split(".")
    try:
        if namespace in _NUMBERS and len(rest) == 1:
            found: Any = getattr(_NUMBERS[namespace], rest[0])
        else:
            name, overload = rest
            found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
            if (
                found._schema.is_mutable or name == "from_file"
            ):  # none of a traced graph; files may say anything
                raise AttributeError(name)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"freeze: ops must be known to this PyTorch, got {target!r}") from error
    result: Callable[..., Any] = found
    return result


def _argument(argument: Any, values: Mapping[str, Any], constants: Mapping[str, Tensor]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.name] if argument.name in values else constants[argument.name]
    if isinstance(argument, list):
        return [_argument(part, values, constants) for part in argument]
    return argument


def run_reference(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """Node by node."""
    values = dict(zip((input.name for input in graph.inputs), inputs, strict=True))
    for node in graph:
        values[node.name] = run_node(node, values, graph.constants)
    return [None if name is None else values[name] for name in graph.outputs]


def meta_values(graph: Graph, inputs: Sequence[Any]) -> dict[str, Any]:
    """Every value for such inputs: tensors without data, numbers as they will be."""
    values = {
        input.name: value.to("meta") if isinstance(value, Tensor) else value
        for input, value in zip(graph.inputs, inputs, strict=True)
    }
    constants = {name: tensor.to("meta") for name, tensor in graph.constants.items()}
    for node in graph:
        options = node.options
        if "device" in options.get("kwargs", ()):
            node = Node(
                node.name,
                node.kind,
                node.inputs,
                {**options, "kwargs": {**options["kwargs"], "device": "meta"}},
            )
        values[node.name] = run_node(node, values, constants)
    return values
