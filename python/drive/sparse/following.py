"""A plan that follows a model: made anew when a parameter, a buffer or a mask has changed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .frozen import Frozen
from .frozen.graph import Graph
from .frozen.plan import OtherInput
from .frozen.trace import trace

_KEY = "_drive_plan"


class Following:
    """Of a model in evaluation mode, with the tensors that the plan is made of."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[int, tuple[str, Tensor]],
        inputs: tuple[Any, ...],
        measured: bool,
    ):
        self._graph, self._measured = trace(model, masks, inputs), measured
        named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
        named.update(model.named_parameters(remove_duplicate=False))
        self._tensors = [(name, named[name]) for name in self._graph.constants if name in named]
        self._masks = {name: masks[id(t)][1] for name, t in self._tensors if name in self._graph.masked}
        self._key: object = None
        self._plan: Frozen | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The model's result, without gradients.

        Raises:
            OtherInput: it is not for such arguments.
        """
        return self._now()(*inputs)

    def begin(self, inputs: tuple[Any, ...]) -> None:
        """As `Frozen.begin`."""
        self._now().begin(inputs)

    def _now(self) -> Frozen:
        tensors = [tensor for _, tensor in self._tensors]
        key = [(t.data_ptr(), t._version) for t in (*tensors, *self._masks.values())]
        if self._plan is None or key != self._key:
            self._plan, self._key = Frozen(self._renewed(), self._measured), key
        return self._plan

    def _renewed(self) -> Graph:
        constants = dict(self._graph.constants)
        for name, tensor in self._tensors:
            mask = self._masks.get(name)
            plain = tensor.detach()
            constants[name] = plain.clone() if mask is None else torch.where(mask, plain, 0)
        return Graph(**{**vars(self._graph), "constants": constants})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": None, "_plan": None}  # a copy's tensors are others


def follow(model: nn.Module, plan: Following) -> None:
    """Make a model answer by its plan, for what that is for.

    Evaluation without gradients, autocast and compilation, of inputs like the example's.
    """
    model.__dict__[_KEY] = plan
    # not a method: those come back from a pickle by their name, as the class has it
    model.forward = partial(_forward, model)


def _forward(model: nn.Module, *inputs: Any, **keywords: Any) -> Any:
    plan: Following = model.__dict__[_KEY]
    own = model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if not (own or keywords or torch.compiler.is_compiling()):
        try:
            return plan(*inputs)
        except OtherInput:
            pass
    return type(model).forward(model, *inputs, **keywords)
