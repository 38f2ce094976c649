"""One mask, held over one parameter of one module."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drive.distributed.placement import check_placed, is_dtensor, local
from drive.distributed.threads import Turns

from .zero import revived, zero_pruned_

OnRevived = Literal["zero", "error"]

# All that live, by their ids. A hold lives as its module does. (A WeakSet cannot be listed while another
# thread adds to it.)
_live: dict[int, weakref.ref[Hold]] = {}
changing = Turns()  # which hooks and holds there are


def live() -> list[Hold]:
    """All that live: an optimizer's step looks for its parameters among them."""
    return [hold for reference in list(_live.values()) if (hold := reference()) is not None]


class Hold:
    """Keeps the pruned entries of a module's parameter, and of its gradient, at zero.

    The module owns it, so that it ends with the module, and is copied and pickled with it: a copy's hold is
    over the copy's parameter. It owns the parameter in turn, whose id is thereby nobody else's.

    Attributes:
        name: of the parameter in its model, for messages.
        param: what the module has under that name; after `follow`, what it has now.
        mask: [the parameter's shape] bool.
    """

    def __init__(self, module: nn.Module, key: str, name: str, mask: Tensor, on_revived: OnRevived):
        self._module: Callable[[], nn.Module | None] = weakref.ref(module)
        self._key, self.name, self.mask, self._on_revived = key, name, mask, on_revived
        param = module._parameters[key]
        assert param is not None
        self._take(param)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._module(), self._key, self.name, self.mask, self._on_revived, self.param

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        module, self._key, self.name, self.mask, self._on_revived, param = state
        # still empty, so the parameter comes from the state; None if it was replaced in its model
        self._module = (lambda: None) if module is None else weakref.ref(module)
        self._take(param)

    def _take(self, param: nn.Parameter) -> None:
        """Hold this parameter from now on."""
        self.param = param
        self._hook: Any = None
        self._copied: tuple[object, Tensor] | None = None
        self._stepped = False  # has an optimizer that was seen updated it?
        self.settle()
        self.watch_gradient()
        self._thread = threading.get_ident()  # in which its model has run last
        _live[id(self)] = weakref.ref(self, partial(_forget, id(self)))

    @property
    def mask_there(self) -> Tensor:
        """The mask on the parameter's device: copied again only when it has been changed."""
        device = self.param.device
        if self.mask.device == device:
            return self.mask
        state, copied = (device, *_state(self.mask)), self._copied
        if copied is None or copied[0] != state:
            copied = self._copied = state, self.mask.to(device)
        return copied[1]

    def watch_gradient(self) -> None:
        """Zero its gradient as soon as it is accumulated, if it has one (a frozen weight may be thawed)."""
        if self._hook is not None or not self.param.requires_grad:
            return
        with changing.lock:  # threads may run one model at once
            if self._hook is None:
                # by a weak reference: the parameter must not keep alive what keeps it alive
                hook = partial(_clear_gradient, weakref.ref(self))
                self._hook = self.param.register_post_accumulate_grad_hook(hook)

    def module(self) -> nn.Module | None:
        return self._module()

    def release(self) -> None:
        """Hold it no more."""
        if self._hook is not None:
            self._hook.remove()
        _live.pop(id(self), None)

    def concerns(self, params: Collection[int]) -> bool:
        """May a step with parameters of these ids, in this thread, find that another one is to be held?

        A step of another model, in another thread, must not: what is there then may stand in for a while.
        """
        module = self._module()
        now = self.param if module is None else module._parameters.get(self._key)
        return id(now) in params or self._thread == threading.get_ident()

    def follow(self) -> bool:
        """Hold what the module has under that name now; was it something else before?

        Raises:
            RuntimeError: the mask does not fit it, or there is nothing any more.
        """
        module = self._module()
        now = self.param if module is None else module._parameters.get(self._key)
        if now is self.param or (is_dtensor(self.param) and not is_dtensor(now)):
            return False  # (FSDP2 puts whole copies in the place of shards for a while)
        if now is None and module is not None and any(param is self.param for param in module.parameters()):
            return False  # parametrised: below another module
        fitting = self._fitting(now)
        self.release()
        self._take(fitting)
        return True

    def _fitting(self, now: nn.Parameter | None) -> nn.Parameter:
        try:
            if now is None or now.shape != self.mask.shape:
                got = "nothing" if now is None else f"one of shape {tuple(now.shape)}"
                raise ValueError(f"it must have shape {tuple(self.mask.shape)}, got {got}")
            check_placed("attach", self.name, self.mask, now)
            return now
        except ValueError as error:
            raise RuntimeError(
                f"attach: {self.name} has been replaced, and its mask does not fit what is there now "
                f"({error}): remove() what attach returned, and attach masks of the model as it is now"
            ) from error

    def settle(self) -> None:
        """Its pruned entries are zero now: remember in what state it is."""
        self._state = _state(self.param)
        self._due = False

    def touched(self) -> bool:
        """May it have been changed since by something that was not seen?

        Not by its version alone, which copies into `.data` do not move: as long as no optimizer has been seen
        to update it, every backward pass may have been followed by one that was not.
        """
        self._thread = threading.get_ident()
        module = self._module()
        if module is None or module._parameters.get(self._key) is not self.param:
            return False  # another tensor stands in for a while: torch.func.functional_call, FSDP2
        if self._hook is None:
            self.watch_gradient()
        return self._due or self._state != _state(self.param)

    def stepped(self) -> None:
        """An optimizer that was seen has updated it, and its pruned entries are zero again."""
        self._stepped = True
        self.settle()

    def revived(self) -> int:
        """How many pruned entries are not zero.

        Raises:
            RuntimeError: there are some, and that is to be an error.
        """
        count = revived(self.param, self.mask_there)
        if count and self._on_revived == "error":
            raise RuntimeError(
                f"attach: {count} pruned entries of {self.name} are not zero any more: something that it did "
                "not see has written them (an optimizer's own copy of the weights, an average, a checkpoint)"
            )
        return count


def _forget(number: int, _: object) -> None:
    _live.pop(number, None)


def _clear_gradient(reference: weakref.ref[Hold], param: Tensor) -> None:
    hold = reference()
    if hold is None or hold.param is not param:
        return
    hold._due = not hold._stepped
    grad = param.grad
    if grad is None:  # an optimizer in the backward pass has taken it
        return
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"attach: the gradient of {hold.name} must be dense, got layout {grad.layout}: "
            "construct its module with sparse=False"
        )
    zero_pruned_([(grad, hold.mask_there)])


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when it is written to, or its memory replaced; not when `.data` is written to."""
    return 0 if tensor.is_inference() else tensor._version, local(tensor).data_ptr()
