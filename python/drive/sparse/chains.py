"""Chains: sparse convolutions of a traced model, with what lies between them, in the blocked layout.

1. What follows a sparse convolution - normalisation, addition, ReLU - becomes part of it.
2. In the order of the graph, each node that can work in blocks and has an input in blocks does so;
   conversions stand where the two layouts meet.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .layers import SparseConv2d

_ADD = (operator.add, operator.iadd, torch.add)
_RELU = (F.relu, torch.relu)
_ANY_LAYOUT = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Identity, nn.Dropout)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph of its layers; whatever error the tracing raises if it cannot be one."""
    return fx.GraphModule(model, _Tracer().trace(model))


def link(graph_module: fx.GraphModule, names: set[str]) -> None:
    """Rewrite a traced model so that its SparseConv2d of these names work in blocks, in chains."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    graph = graph_module.graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    once = {name for name in calls if calls.count(name) == 1}
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in names:
            _absorb_followers(graph, node, modules, once)
    _Layouts(graph, modules).assign()
    graph.lint()
    graph_module.recompile()


def _convolved(conv: SparseConv2d, input: Tensor, batch: int, residual: Tensor | None, relu: bool) -> Tensor:
    return conv.blocked(input, batch, residual, relu)


def _pooled(pool: nn.Module, input: Tensor) -> Tensor:
    """A pooling in blocks: a plane and its lanes are an image in channels_last with 16 channels."""
    blocks, channels = input.shape[:2]
    output: Tensor = pool(input.flatten(0, 1).permute(0, 3, 1, 2))
    output = output.permute(0, 2, 3, 1).contiguous()
    return output.view(blocks, channels, *output.shape[1:])


def _batch_of(input: Tensor) -> int:
    return input.shape[0]


def _to_blocks(input: Tensor) -> Tensor:
    output: Tensor = torch.ops.drive.to_blocks(input)
    return output


def _from_blocks(input: Tensor, batch: int) -> Tensor:
    output: Tensor = torch.ops.drive.from_blocks(input, batch)
    return output


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_relu(node: fx.Node | None, modules: dict[str, nn.Module]) -> bool:
    if node is None:
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and not _hooked(module)
    return (node.op == "call_function" and node.target in _RELU) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _is_add(node: fx.Node | None) -> bool:
    """Of two tensors, as far as the graph tells."""
    return (
        node is not None
        and node.op == "call_function"
        and node.target in _ADD
        and not node.kwargs
        and len(node.all_input_nodes) == 2
    )


def _absorb_followers(graph: fx.Graph, conv: fx.Node, modules: dict[str, nn.Module], once: set[str]) -> None:
    """(Step 1) One node of convolution, normalisation, addition and ReLU, as far as they follow."""
    module = modules[str(conv.target)]
    assert isinstance(module, SparseConv2d)
    absorbed, last, residual, relu = [conv], conv, None, False
    user = _only_user(last)
    if user is not None and user.op == "call_module" and {str(user.target), str(conv.target)} <= once:
        norm = modules[str(user.target)]
        if type(norm) is nn.BatchNorm2d and not _hooked(norm):
            module.absorb(norm)
            absorbed.append(last := user)
    user = _only_user(last)
    if user is not None and _is_add(user):
        residual = next(other for other in user.all_input_nodes if other is not last)
        absorbed.append(last := user)
    user = _only_user(last)
    if user is not None and _is_relu(user, modules):
        relu = True
        absorbed.append(last := user)
    with graph.inserting_before(last):
        layer = graph.get_attr(str(conv.target))
        fused = graph.call_function(_convolved, (layer, conv.args[0], None, residual, relu))
    last.replace_all_uses_with(fused)
    for node in reversed(absorbed):
        graph.erase_node(node)


class _Layouts:
    """(Step 2)"""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]):
        self.graph, self.modules = graph, modules
        self.batch: dict[fx.Node, fx.Node] = {}  # nodes in blocks, and the size of their batch
        self.blocks: dict[fx.Node, fx.Node] = {}  # nodes in planes, and the same in blocks
        self.planes: dict[fx.Node, fx.Node] = {}  # the other way round

    def assign(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is _convolved:
                self._convolution(node)
            elif not any(argument in self.batch for argument in node.all_input_nodes):
                continue
            elif self._works_in_blocks(node):
                for argument in node.all_input_nodes:
                    node.replace_input_with(argument, self._in_blocks(argument))
                self.batch[node] = self.batch[node.all_input_nodes[-1]]
                self._pool(node)
            else:
                for argument in node.all_input_nodes:
                    if argument in self.batch:
                        node.replace_input_with(argument, self._in_planes(argument))

    def _convolution(self, node: fx.Node) -> None:
        layer, input, _, residual, relu = node.args
        assert isinstance(input, fx.Node)
        input = self._in_blocks(input)
        if isinstance(residual, fx.Node):
            residual = self._in_blocks(residual)
        node.args = (layer, input, self.batch[input], residual, relu)
        self.batch[node] = self.batch[input]

    def _works_in_blocks(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], (*_ANY_LAYOUT, *_POOLS))
        return _is_relu(node, self.modules) or _is_add(node)

    def _pool(self, node: fx.Node) -> None:
        if node.op == "call_module" and isinstance(self.modules[str(node.target)], _POOLS):
            with self.graph.inserting_before(node):
                pool = self.graph.get_attr(str(node.target))
                pooled = self.graph.call_function(_pooled, (pool, node.args[0]))
            self._replace(node, pooled)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        self.batch[new] = self.batch.pop(old)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _in_blocks(self, node: fx.Node) -> fx.Node:
        if node in self.batch:
            return node
        if node not in self.blocks:
            with self.graph.inserting_after(node):
                size = self.graph.call_function(_batch_of, (node,))
            with self.graph.inserting_after(size):
                self.blocks[node] = self.graph.call_function(_to_blocks, (node,))
            self.batch[self.blocks[node]] = size
        return self.blocks[node]

    def _in_planes(self, node: fx.Node) -> fx.Node:
        if node not in self.planes:
            self.planes[node] = self._after(node, _from_blocks, node, self.batch[node])
        return self.planes[node]

    def _after(self, node: fx.Node, function: Callable[..., Any], *arguments: fx.Node) -> fx.Node:
        with self.graph.inserting_after(node):
            return self.graph.call_function(function, arguments)
