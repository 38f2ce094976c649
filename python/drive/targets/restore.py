"""What a pass through a model must not change, and what a failed run must not leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def scoring(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Buffers, modes and requires_grad come back afterwards; inside, all of `weights` require gradients."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = _buffers(model)
    frozen = [w for w in weights.values() if not w.requires_grad]
    try:
        for w in frozen:
            w.requires_grad_(True)
        yield
    finally:
        for w in frozen:
            w.requires_grad_(False)
        for module, training in modes:
            module.training = training
        _put_back(buffers)


@contextmanager
def undone_on_error(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """If anything raises, Ctrl-C included: `weights`, or with None the whole model, as they were.

    The whole model is its parameters, buffers, modes and the gradients.
    """
    changing = list(model.parameters() if weights is None else weights.values())
    before = [w.detach().clone() for w in changing]
    grads = [None if w.grad is None else w.grad.clone() for w in changing] if weights is None else None
    modes = [(module, module.training) for module in model.modules()]
    buffers = _buffers(model) if weights is None else []
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for w, old in zip(changing, before, strict=True):
                w.copy_(old)
        for w, grad in zip(changing, grads or [], strict=False):
            w.grad = grad
        for module, training in modes:
            module.training = training
        _put_back(buffers)
        raise


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A seeded RNG inside, the caller's state afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
        torch.manual_seed(seed)
        yield


_Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]  # its owner and name there, the tensor, its old values


def _buffers(model: nn.Module) -> _Buffers:
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


@torch.no_grad()
def _put_back(buffers: _Buffers) -> None:
    for module, name, buffer, old in buffers:
        module._buffers[name] = buffer.copy_(old)
