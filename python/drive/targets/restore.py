"""What a pass through a model must not change, and what a failed run must not leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drive.distributed.threads import Turns


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


_turns = Turns()


@contextmanager
def kept_rng() -> Iterator[None]:
    """The caller's random numbers go on afterwards as if nothing had been drawn inside, on all devices.

    They come out of one generator for all threads of a process, from which dropout draws, too: threads take
    turns here. A thread may come here again inside; it must not wait there for another one that wants to. On
    ranks, of which some may be threads of one process, nobody waits: they wait for each other inside.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    ranks = dist.is_available() and dist.is_initialized()
    with nullcontext() if ranks else _turns.lock, torch.random.fork_rng(devices):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same, and the generators that there are seeded inside.

    Not by torch.manual_seed, which also leaves behind that those of CUDA are to be seeded once they exist.
    """
    with kept_rng():
        for generator in (torch.default_generator, *torch.cuda.default_generators):
            generator.manual_seed(seed)
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
