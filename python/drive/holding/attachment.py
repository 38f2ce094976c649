"""Masks attached to a model: the hooks in which its holds do their work.

    backward pass      each gradient, when it is accumulated                        (Hold)
    optimizer's step   weights and moments of those that it holds, afterwards       (_after_step)
    forward pass       what something unseen has written into the weights meanwhile (_before_forward)
    load_state_dict    what was loaded                                              (_after_load)

All state lies on the modules, in `__dict__`: no buffer (which DistributedDataParallel would send around), no
key of a state_dict; deepcopy and pickle take it along. The hooks are plain functions, which find it there.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from typing_extensions import Self

from .hold import Hold, OnRevived, changing, live
from .moments import entrywise
from .zero import zero_pruned_

_log = logging.getLogger(__name__)

_HOLDS = "_drive_holds"  # in a module's __dict__: list of Holds, of its own and, in the model's, of all of it
Owned = tuple[nn.Module, str, str, Tensor]  # a module, the key of its parameter, its name, its mask


class Attachment:
    """What `Masks.attach` returns: a handle to remove it by. Nothing depends on keeping it."""

    def __init__(self, model: nn.Module, owned: Iterable[Owned], on_revived: OnRevived):
        """Hold masks over parameters, of which there is one for every module that has it.

        Args:
            model: whose forward pass is checked; the modules' own are, too.
        """
        holds = []
        for module, key, name, mask in owned:
            hold = Hold(module, key, name, mask, on_revived)
            holds.append(hold)
            for place in {module, model}:
                _hold_on(place, hold)
        self._model = weakref.ref(model)
        self._holds = [weakref.ref(hold) for hold in holds]
        _zero(holds)
        _watch_optimizers()

    def clear(self, optimizer: Optimizer) -> None:
        """Zero the pruned entries of an optimizer's state.

        Raises:
            TypeError: no optimizer, nor something with one in its attribute `optimizer`.
        """
        inner = innermost(optimizer)
        if not _clear(inner, self._alive(), _ids(inner)):
            _log.warning(
                "attach: optimizer %s holds none of these parameters, but perhaps copies of them: what it "
                "writes back into pruned weights is undone before the next forward pass",
                type(optimizer).__name__,
            )

    def remove(self) -> None:
        """Stop; the weights stay as they are, and copies of the model stay as they are held."""
        for hold in self._alive():
            hold.release()
            for module in (hold.module(), self._model()):
                if module is not None:
                    _let_go(module, hold)
        self._holds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> tuple[Any, ...]:
        """For copies and pickles of a model that keeps its handle."""
        return self._model(), self._alive()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        model, holds = state
        self._model, self._holds = weakref.ref(model), [weakref.ref(hold) for hold in holds]

    def _alive(self) -> list[Hold]:
        return [hold for reference in self._holds if (hold := reference()) is not None]


def let_go(model: nn.Module) -> None:
    """Hold nothing in a model any more, whatever was attached to it: its parameters are to be replaced."""
    for module in model.modules():
        for hold in list(module.__dict__.get(_HOLDS, ())):
            hold.release()
            _let_go(module, hold)


def innermost(optimizer: object) -> Optimizer:
    """The optimizer that takes the steps: what accelerate, Lightning and others wrap is in their `optimizer`.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not (isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_post_hooks")):
        wrapped = getattr(inner, "optimizer", None) or getattr(inner, "base_optimizer", None)
        if wrapped is None or wrapped is inner:
            raise TypeError(
                "attach: optimizer must be a torch.optim.Optimizer, or hold one as `optimizer`, got "
                f"{type(optimizer).__name__}"
            )
        inner = wrapped
    return inner


def _hold_on(module: nn.Module, hold: Hold) -> None:
    with changing.lock:
        if _HOLDS not in module.__dict__:
            module.__dict__[_HOLDS] = []
            module.register_forward_pre_hook(_before_forward)
            module.register_load_state_dict_post_hook(_after_load)
        module.__dict__[_HOLDS].append(hold)


def _let_go(module: nn.Module, hold: Hold) -> None:
    with changing.lock:
        holds = module.__dict__.get(_HOLDS, [])
        if hold in holds:
            holds.remove(hold)
        if holds or module.__dict__.pop(_HOLDS, None) is None:
            return
        for hooks, ours in (
            (module._forward_pre_hooks, _before_forward),
            (module._load_state_dict_post_hooks, _after_load),
        ):
            for number in [number for number, hook in list(hooks.items()) if hook is ours]:
                del hooks[number]


def _before_forward(module: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling():  # steps are watched all the same
        return
    holds: list[Hold] = list(module.__dict__.get(_HOLDS, ()))
    for hold in holds:
        if hold.module() is None:  # a part of the model that has been replaced
            _let_go(module, hold)
    touched = [hold for hold in holds if hold.touched()]
    if not touched:
        return
    revived = [hold for hold in touched if hold.revived()]
    if revived:
        _log.warning(
            "attach: pruned weights had come back, in %s%s, and are zero again: something that attach does "
            "not see writes them (an optimizer's own copy of the weights, an average, a checkpoint)",
            revived[0].name,
            f" and {len(revived) - 1} others" if len(revived) > 1 else "",
        )
        _zero(revived)
    for hold in touched:
        hold.settle()


def _after_load(module: nn.Module, incompatible: object) -> None:
    holds: list[Hold] = list(module.__dict__.get(_HOLDS, ()))
    for hold in holds:
        hold.follow()
    _zero(holds)


_watching = False


def _watch_optimizers() -> None:
    global _watching
    with changing.lock:
        if not _watching:
            register_optimizer_step_post_hook(_after_step)
            _watching = True


def _after_step(optimizer: Optimizer, *_: object) -> None:
    holds, params = live(), _ids(optimizer)
    _zero([hold for hold in holds if hold.concerns(params) and hold.follow()])
    _clear(optimizer, holds, params)


def _clear(optimizer: Optimizer, holds: Iterable[Hold], params: set[int]) -> bool:
    """Zero what the optimizer holds of these: weights and moments. Does it hold any?

    Args:
        params: ids of all that it has.
    """
    its = [hold for hold in holds if id(hold.param) in params]
    zero_pruned_(
        (tensor, hold.mask_there)
        for hold in its
        for tensor in (hold.param, *entrywise(optimizer, hold.param))
    )
    for hold in its:
        hold.stepped()
    return bool(its)


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _zero(holds: Iterable[Hold]) -> None:
    """Zero weights, and gradients that are there."""
    holds = list(holds)
    zero_pruned_(
        (tensor, hold.mask_there)
        for hold in holds
        for tensor in (hold.param, hold.param.grad)
        if tensor is not None
    )
    for hold in holds:
        hold.settle()
