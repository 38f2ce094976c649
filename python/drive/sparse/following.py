"""A plan that follows a model: made anew when a parameter, a buffer or a mask has changed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .frozen import Frozen
from .frozen.graph import Graph
from .frozen.trace import trace

_KEY = "_drive_plan"


class Following:
    """Of a model in evaluation mode, with the tensors that the plan is made of."""

    def __init__(self, model: nn.Module, masks: Mapping[int, tuple[str, Tensor]], inputs: tuple[Any, ...]):
        self._graph: Graph = trace(model, masks, inputs)
        named = {**dict(model.named_buffers(remove_duplicate=False))}
        named.update(model.named_parameters(remove_duplicate=False))
        self._tensors = [(name, named[name]) for name in self._graph.constants if name in named]
        self._masks = {name: masks[id(t)][1] for name, t in self._tensors if name in self._graph.masked}
        self._key: object = None
        self._plan: Frozen | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The model's result, without gradients."""
        tensors = [tensor for _, tensor in self._tensors]
        key = [(t.data_ptr(), t._version) for t in (*tensors, *self._masks.values())]
        if self._plan is None or key != self._key:
            self._plan, self._key = Frozen(self._renewed()), key
        return self._plan(*inputs)

    def _renewed(self) -> Graph:
        constants = dict(self._graph.constants)
        for name, tensor in self._tensors:
            mask = self._masks.get(name)
            plain = tensor.detach()
            constants[name] = plain.clone() if mask is None else torch.where(mask, plain, 0)
        return Graph(**{**vars(self._graph), "constants": constants})

    def serves(self, inputs: tuple[Any, ...]) -> bool:
        """Is it for such arguments? float32 on the CPU as its own."""
        leaves, nesting = pytree.tree_flatten((inputs, {}))
        return nesting == self._graph.arguments and all(
            isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and leaf.device.type == "cpu"
            for leaf in leaves
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": None, "_plan": None}  # a copy's tensors are others


def follow(model: nn.Module, plan: Following) -> None:
    """Make a model answer by its plan: in evaluation mode, without gradients, autocast and compilation."""
    model.__dict__[_KEY] = plan
    # not a method: those come back from a pickle by their name, as the class has it
    model.forward = partial(_forward, model)


def _forward(model: nn.Module, *inputs: Any, **keywords: Any) -> Any:
    plan: Following = model.__dict__[_KEY]
    own = model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if own or torch.compiler.is_compiling() or keywords or not plan.serves(inputs):
        return type(model).forward(model, *inputs, **keywords)
    return plan(*inputs)
