"""Plans in files: safetensors, the graph as JSON in its metadata, weights with a mask as their non-zeros."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from drive.bits import opened
from drive.files import write_atomic

from .graph import Graph, Input, Node, Ref
from .reference import function

_FORMAT, _VERSION = "drive.sparse plan", 1
_VALUES, _BITS = ".nonzero", ".bits"  # of a weight with a mask: its values that are not 0, and where they are

# Arguments of ops that JSON has no word for, by their names in torch.
_NAMED = (torch.dtype, torch.memory_format, torch.layout)


def save(graph: Graph, path: Path) -> None:
    """Raises ValueError if something of the graph cannot be written down."""
    try:
        nesting = [pytree.treespec_dumps(spec) for spec in (graph.arguments, graph.result)]
    except NotImplementedError as error:
        raise ValueError(
            "save: arguments and result must be tensors in lists, tuples and dicts, got a class of its own"
        ) from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in graph.constants.items():
        if name in graph.masked:
            there = tensor.flatten() != 0
            tensors[name + _VALUES] = tensor.flatten()[there]
            tensors[name + _BITS] = torch.from_numpy(np.packbits(there.numpy()))
        else:
            tensors[name] = tensor.contiguous()
    description = {
        "inputs": [vars(input) for input in graph.inputs],
        "nodes": [[n.name, n.kind, n.inputs, _plain(n.options)] for n in graph],
        "outputs": graph.outputs,
        "masked": {name: [of, list(graph.constants[name].shape)] for name, of in graph.masked.items()},
        "ranges": graph.ranges,
        "guards": graph.guards,
        "arguments": nesting[0],
        "result": nesting[1],
    }
    metadata = {"format": _FORMAT, "version": str(_VERSION), "graph": json.dumps(description)}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def load(path: str | os.PathLike[str]) -> Graph:
    """The graph of a plan's file.

    Raises:
        ValueError: the file is no plan, of a later version, or damaged.
        OSError: it cannot be read.
    """
    with opened("load", path, "plan", "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"its format must be {_FORMAT!r}, got {metadata.get('format')!r:.80}")
        if metadata.get("version") != str(_VERSION):
            got = metadata.get("version")
            raise ValueError(f"its version must be {_VERSION}, got {got!r:.80}; freeze the model again")
        try:
            return _graph(json.loads(metadata["graph"]), file)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"its graph must be whole: {type(error).__name__} {error!s:.80}") from error


def _graph(found: dict[str, Any], file: Any) -> Graph:
    names, constants = set(file.keys()), {}
    for name, (_, shape) in found["masked"].items():
        constants[name] = _unpacked(file.get_tensor(name + _VALUES), file.get_tensor(name + _BITS), shape)
        names -= {name + _VALUES, name + _BITS}
    constants |= {name: file.get_tensor(name) for name in sorted(names)}
    nodes = [Node(name, kind, tuple(values), _parsed(rest)) for name, kind, values, rest in found["nodes"]]
    _check(found, nodes, constants)
    return Graph(
        inputs=[Input(**input) for input in found["inputs"]],
        nodes=nodes,
        outputs=found["outputs"],
        constants=constants,
        masked={name: of for name, (of, _) in found["masked"].items()},
        ranges={symbol: (least, most) for symbol, (least, most) in found["ranges"].items()},
        guards=found["guards"],
        arguments=pytree.treespec_loads(found["arguments"]),
        result=pytree.treespec_loads(found["result"]),
    )


def _check(found: dict[str, Any], nodes: list[Node], constants: dict[str, Tensor]) -> None:
    """Every name that is read is there, before it is."""
    known = {input["name"] for input in found["inputs"]} | constants.keys()
    for node in nodes:
        if node.kind != "call":
            raise ValueError(f"a node must be a call, got {node.kind!r}")
        function(node.options["target"])
        if missing := set(node.inputs) - known:
            raise KeyError(min(missing))
        known.add(node.name)
    if missing := {name for name in found["outputs"] if name is not None} - known:
        raise KeyError(min(missing))


def _unpacked(values: Tensor, bits: Tensor, shape: list[int]) -> Tensor:
    count = int(np.prod(shape))
    there = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool))
    if int(there.sum()) != values.numel():
        raise ValueError(f"a weight must have {int(there.sum())} non-zeros, got {values.numel()}")
    return torch.zeros(count, dtype=values.dtype).masked_scatter_(there, values).view(shape)


def _plain(value: Any) -> Any:
    match value:
        case Ref(name=name):
            return {"ref": name}
        case list() | tuple():
            return [_plain(part) for part in value]
        case dict():
            return {"dict": {key: _plain(part) for key, part in value.items()}}
        case torch.device():
            return {"device": str(value)}
        case float() if value in (float("inf"), float("-inf")) or value != value:
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
    if isinstance(value, _NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    raise ValueError(f"save: arguments of ops must be plain values, got {type(value).__name__}")


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [_parsed(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "ref":
            return Ref(content)
        case "dict":
            return {key: _parsed(part) for key, part in content.items()}
        case "device":
            return torch.device(content)
        case "float":
            return float(content)
        case "torch" if isinstance(found := getattr(torch, content), _NAMED):
            return found
    raise ValueError(f"an argument must be a plain value, got {kind!r}")
