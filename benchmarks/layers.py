"""How a pruned layer is timed and compared with the dense one, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Run = Callable[[], object]
Layer = Callable[[Tensor, Tensor], Tensor]


def forward(layer: Layer, x: Tensor, weight: Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            layer(x, weight)

    return run


def backward(layer: Layer, x: Tensor, weight: Tensor) -> Run:
    """Forward, then the gradients to the input and to the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    grad = torch.randn_like(layer(*leaves))
    return lambda: torch.autograd.grad(layer(*leaves), leaves, grad)


MODES = {"forward": forward, "forward + backward": backward}


def pruned(shape: tuple[int, ...], sparsity: float) -> tuple[Tensor, Tensor]:
    mask = torch.rand(shape) >= sparsity
    return torch.randn(shape).masked_fill_(~mask, 0), mask


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1))


def inference(model: nn.Module, x: Tensor) -> Run:
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def rival(module: nn.Module, x: Tensor, mode: str) -> Run:
    """As `forward` and `backward`, of a module that holds its own weight."""
    if mode == "forward":
        return inference(module, x)
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    grad = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(leaves[0]), leaves, grad)
