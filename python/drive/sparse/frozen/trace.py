"""From a model to its graph, by torch.export: every op that runs for the example, whatever Python is around
it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from drive.targets.restore import kept_rng

from .graph import Graph, Input, Node, Ref
from .guards import holds, readable

# What changes nothing, in a network that does not train. Checks of sizes are kept as guards.
_NOTHING = ("aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default")
_DROPOUT = "aten.dropout.default"
_CHECKS = ("aten._assert_tensor_metadata.default", "aten.sym_constrain_range_for_size.default")


class Untraceable(Exception):
    """The model's graph depends on more than the shapes of its inputs; the message says how."""


def trace(model: nn.Module, masks: Mapping[int, tuple[str, Tensor]], arguments: tuple[Any, ...]) -> Graph:
    """The model's graph for these arguments, and for those of other sizes as far as they can be.

    Args:
        model: in evaluation mode; it is left as it is.
        masks: name and mask of each parameter that has one, by the parameter's id.
        arguments: positional ones.

    Raises:
        Untraceable: torch.export cannot make it one graph.
    """
    exported, guards = _export(model, arguments)
    signature = exported.graph_signature
    states = {**exported.constants, **exported.state_dict}
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    if others := [str(o.target) for o in signature.output_specs if o.kind.name != "USER_OUTPUT"]:
        raise Untraceable(f"it writes to {others[0]}")
    originals = dict(model.named_parameters(remove_duplicate=False))
    constants: dict[str, Tensor] = {}
    masked: dict[str, str] = {}
    names: dict[str, str] = {}  # of the placeholders that are constants
    inputs: list[Input] = []
    leaves = pytree.tree_leaves(arguments)
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in lifted:
            constant = names[node.name] = lifted[node.name]
            tensor = states[constant].detach()
            name, mask = masks.get(id(originals.get(constant)), ("", None))
            if mask is not None:
                masked[constant] = name
                tensor = torch.where(mask, tensor, 0)
            constants[constant] = tensor.clone()
        else:
            inputs.append(_input(node, leaves[len(inputs)]))
    nodes, outputs = _Reader(names).read(exported.graph.nodes)
    return Graph(
        inputs, nodes, outputs, constants, masked, _ranges(exported, inputs), guards,
        exported.call_spec.in_spec, exported.call_spec.out_spec,
    )  # fmt: skip


def _export(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[ExportedProgram, list[str]]:
    """With as many free dimensions as the model allows, all, the first ones, none; and their guards."""
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    # A dimension of 1 would be taken for a constant, so an example of one image is made two.
    single = bool(tensors) and all(t.dim() > 0 and t.shape[0] == 1 for t in tensors)
    doubled = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), arguments) if single else arguments
    flat = all(isinstance(argument, Tensor) for argument in arguments)  # else guards could not be read
    with torch.no_grad(), kept_rng():
        run_once(model, arguments)  # some packages register their results' classes now
    with torch.no_grad(), kept_rng(), _quiet():
        free: list[tuple[tuple[Any, ...], Any]] = [(arguments, None)]
        if flat:
            batch = tuple({0: Dim.AUTO} if t.dim() else None for t in doubled)
            every = tuple(dict.fromkeys(range(t.dim()), Dim.AUTO) for t in doubled)
            free = (
                [(doubled, batch), *free]
                if _pads(model, arguments)
                else [(doubled, every), (doubled, batch), *free]
            )
        for example, dimensions in free:
            try:
                exported = torch.export.export(model, example, dynamic_shapes=dimensions, strict=False)
                if dimensions is None or _for_this(exported, arguments):
                    guards = list(getattr(exported, "_guards_code", []))
                    return exported.run_decompositions({}), guards  # nothing is written in place any more
            except Exception as error:  # of the model's own code, or of any part of the exporter
                why = error
    raise Untraceable(f"{type(why).__name__}: {(str(why).splitlines() or [''])[0]}") from why


def run_once(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """The model as it is, on buffers that are copies: those that it writes to stay as they were."""
    torch.func.functional_call(model, {name: b.clone() for name, b in model.named_buffers()}, arguments)


def _for_this(exported: ExportedProgram, arguments: tuple[Any, ...]) -> bool:
    """Can it be told for which sizes the graph is right, and is it for the example's?"""
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    sizes = {name: tuple(t.shape) for name, t in zip(names, arguments, strict=True)}
    found = getattr(exported, "_guards_code", None)
    return found is not None and all(readable(g, names) and holds(g, sizes) for g in found)


def _pads(model: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Does it pad, by what may depend on its input's size?

    With symbols for sizes, TensorFlow's "same" padding takes the exporter minutes.
    """
    try:
        graph = torch.export.export(model, arguments, strict=False).graph
    except Exception:  # what is wrong with it, the tries that follow find out
        return False
    return any(
        str(node.target).startswith(("aten.pad", "aten.constant_pad"))
        for node in graph.nodes
        if node.op == "call_function"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of sizes that it cannot solve for, and prints graphs that it gives up."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _input(node: fx.Node, leaf: Any) -> Input:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return Input(node.name, value=leaf)
    sizes: list[int | str] = [int(s) if str(s).isdigit() else str(s) for s in value.shape]
    return Input(node.name, sizes, str(value.dtype).removeprefix("torch."))


def _ranges(exported: ExportedProgram, inputs: list[Input]) -> dict[str, tuple[int, int | None]]:
    """Least and most of each symbol."""
    symbols = {size for input in inputs for size in input.sizes if isinstance(size, str)}
    ranges: dict[str, tuple[int, int | None]] = {}
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in symbols:
            # free, a size was assumed not to be 0 or 1; what depends on that is a guard
            least, most = int(bounds.lower), bounds.upper
            ranges[str(symbol)] = (1 if least == 2 else least, int(most) if most.is_Integer else None)
    return ranges


class _Reader:
    """fx's nodes as ours."""

    def __init__(self, constants: Mapping[str, str]):
        self._constants = constants
        self._renamed: dict[str, str] = {}

    def read(self, nodes: Iterable[fx.Node]) -> tuple[list[Node], list[str | None]]:
        found: list[Node] = []
        for node in nodes:
            if node.op == "output":
                return found, [self._output(value) for value in node.args[0]]  # type: ignore[union-attr]
            if node.op == "get_attr" or (node.op == "call_function" and not _known(node.target)):
                raise Untraceable(f"an op that is no function of tensors: {node.target}")
            if node.op != "call_function" or str(node.target) in _CHECKS:
                continue
            target = _name(node.target)
            if target in _NOTHING or (target == _DROPOUT and not node.args[2]):
                assert isinstance(node.args[0], fx.Node)
                self._renamed[node.name] = self._renamed.get(node.args[0].name, node.args[0].name)
                continue
            values: dict[str, None] = {}
            arguments = [self._plain(argument, values) for argument in node.args]
            keywords = {key: self._plain(value, values) for key, value in node.kwargs.items()}
            options = {"target": target, "args": arguments, "kwargs": keywords}
            found.append(Node(node.name, "call", tuple(values), options))
        raise AssertionError("a graph ends with its output")

    def _output(self, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, fx.Node):
            raise Untraceable(f"an output that is no tensor: {value!r}")
        if value.name in self._constants:
            raise Untraceable(f"an output that is a parameter: {self._constants[value.name]}")
        return self._renamed.get(value.name, value.name)

    def _plain(self, argument: Any, values: dict[str, None]) -> Any:
        if isinstance(argument, fx.Node):
            if argument.name in self._constants:
                return Ref(self._constants[argument.name])
            name = self._renamed.get(argument.name, argument.name)
            values[name] = None
            return Ref(name)
        if isinstance(argument, (list, tuple)):
            return [self._plain(part, values) for part in argument]
        return argument


def _known(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) or _home(target) in ("operator", "math", "torch")


def _home(target: Any) -> str:
    return str(getattr(target, "__module__", "")).removeprefix("_")


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"{_home(target)}.{target.__name__}"
