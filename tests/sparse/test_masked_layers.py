"""MaskedLinear and MaskedConv2d: the dense layer with a mask, fixed or learned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from drive.sparse import MaskedConv2d, MaskedLinear


def layers(kind: str) -> tuple[nn.Module, type[MaskedConv2d] | type[MaskedLinear], Tensor]:
    if kind == "linear":
        return nn.Linear(6, 5), MaskedLinear, torch.randn(4, 6)
    return nn.Conv2d(6, 4, 3, padding=kind, groups=2), MaskedConv2d, torch.randn(3, 6, 7, 8)


@pytest.mark.parametrize("kind", ("linear", "same", "valid"))
def test_module(kind: str):
    dense, masked_kind, x = layers(kind)
    mask = torch.rand(dense.weight.shape) < 0.5
    ours = masked_kind.from_dense(dense, mask)
    assert ours.state_dict().keys() == dense.state_dict().keys()
    assert [n for n, _ in dense.named_buffers()] == [] and ours.weight is dense.weight
    with torch.no_grad():
        reference = copy.deepcopy(dense)
        reference.weight.mul_(mask)
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours(x[0]), reference(x[0]))
    copied = copy.deepcopy(ours)
    copied.mask.zero_()
    torch.testing.assert_close(ours(x), reference(x))

    before = dense.weight.detach().clone()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(dense.weight != before, mask), "the surviving weights move, and no others"


@pytest.mark.parametrize("kind", ("linear", "same"))
def test_learned_mask(kind: str):
    dense, masked_kind, x = layers(kind)
    start = torch.rand(dense.weight.shape)
    ours = masked_kind.from_dense(dense, start, learn_mask=True)
    assert ours.state_dict().keys() == {*dense.state_dict(), "mask"}
    ours(x).square().sum().backward()
    mask = ours.mask.detach().clone().requires_grad_()
    weights = {"weight": dense.weight.detach() * mask, "bias": dense.bias.detach()}
    torch.func.functional_call(dense, weights, (x,)).square().sum().backward()
    torch.testing.assert_close(ours.mask.grad, mask.grad)
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    assert not torch.equal(ours.mask, start)
    assert masked_kind.from_dense(dense, start > 0.5, learn_mask=True).mask.dtype == torch.float32


def test_module_refuses():
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"MaskedConv2d: layer must be .*, got padding_mode 'reflect'"):
        MaskedConv2d.from_dense(nn.Conv2d(3, 4, 1, padding_mode="reflect"), mask)
    with pytest.raises(ValueError, match=r"MaskedLinear: mask must have shape \(4, 3\), got"):
        MaskedLinear.from_dense(nn.Linear(3, 4), mask)
    with pytest.raises(TypeError, match="mask must be torch.bool or torch.float32, got torch.int32"):
        MaskedConv2d.from_dense(nn.Conv2d(3, 4, 1), mask.int())


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("kind", ("linear", "same"))
def test_compiles_into_one_graph(kind: str, backend: str):
    dense, masked_kind, x = layers(kind)
    ours = masked_kind.from_dense(dense, torch.rand(dense.weight.shape), learn_mask=True)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), ours(x))
    compiled(x).sum().backward()
    assert ours.mask.grad.abs().sum() > 0
