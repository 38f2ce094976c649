"""A pruned Linear and a pruned Conv2d: dense with zeros, masked in each call, and sparse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import MODES, close, pruned, rival
from benchmarks.sizes import BATCH, Size
from drive.sparse import MaskedConv2d, MaskedLinear, PackedLinear, SparseConv2d, SparseLinear

SPARSITY = 0.95


def linear(size: Size) -> tuple[nn.Module, Tensor]:
    inputs, outputs = size.linear
    return nn.Linear(inputs, outputs, bias=False), torch.randn(BATCH, inputs)


def conv2d(size: Size) -> tuple[nn.Module, Tensor]:
    channels, side = size.conv
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return layer, torch.randn(BATCH, channels, side, side)


BUILD = {"Linear": linear, "Conv2d": conv2d}
WAYS: dict[str, dict[str, Callable[[nn.Module, Tensor], nn.Module]]] = {
    "dense": dict.fromkeys(BUILD, lambda layer, mask: layer),
    "masked": {"Linear": MaskedLinear.from_dense, "Conv2d": MaskedConv2d.from_dense},
    "sparse": {"Linear": SparseLinear.from_dense, "Conv2d": SparseConv2d.from_dense},
}
CUDA_SPARSE = {("Linear", "forward"): PackedLinear.from_dense}  # all that there is for an unstructured mask


def check(module: nn.Module, layer: nn.Module, x: Tensor, mask: Tensor) -> None:
    """Of both: the outputs without autograd and with it, the gradients to the input and to survivors."""

    def outcome(of: nn.Module) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), of.weight]
        output = of(leaves[0])
        to_x, to_weight = torch.autograd.grad(output.square().sum(), leaves)
        with torch.no_grad():
            return [of(x), output, to_x, to_weight[mask]]

    for found, expected in zip(outcome(module), outcome(layer), strict=True):
        close(found.detach(), expected.detach())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BUILD)
def test_layer(timed, size: Size, device: str, kind: str, mode: str, way: str):
    torch.manual_seed(0)
    layer, x = BUILD[kind](size)
    weight, mask = pruned(layer.weight.shape, SPARSITY)
    layer.weight.data = weight
    layer, mask, x = layer.to(device), mask.to(device), x.to(device)
    make = WAYS[way][kind]
    if way == "sparse" and device == "cuda":
        if (kind, mode) not in CUDA_SPARSE:
            pytest.skip(f"no sparse {kind} for {mode} on CUDA")
        make = CUDA_SPARSE[kind, mode]
    module = make(layer, mask)
    check(module, layer, x, mask)
    run = rival(module, x, mode)
    shape = " x ".join(map(str, mask.shape))
    group = f"{kind}, {shape}, 95 % pruned, batch {BATCH}, {mode}"
    timed(group, lambda: run, rounds=10, entries=mask.numel())
