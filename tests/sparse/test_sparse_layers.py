"""SparseConv2d and SparseLinear: the dense layer in float64, whatever becomes of its mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from drive.sparse import SparseConv2d, SparseLinear

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # of float64


@pytest.mark.parametrize("kind", (SparseConv2d, SparseLinear))
def test_repacks_when_the_mask_changes(kind: type[nn.Module]):
    conv = kind is SparseConv2d
    layer = (nn.Conv2d(4, 6, 3) if conv else nn.Linear(4, 6)).double()
    mask = torch.rand(layer.weight.shape) < 0.7
    layer.weight.data.masked_fill_(~mask, 0)
    ours = kind.from_dense(layer, mask)
    x = torch.randn(3, 4, *([7, 7] if conv else []), dtype=torch.float64)
    torch.testing.assert_close(ours(x), layer(x), **TOLERANCE)
    mask.logical_and_(torch.rand(mask.shape) < 0.5)
    layer.weight.data.masked_fill_(~mask, 0)
    torch.testing.assert_close(ours(x), layer(x), **TOLERANCE)
    copied = copy.deepcopy(ours)
    copied.packing.mask.zero_()
    torch.testing.assert_close(ours(x), layer(x), **TOLERANCE)
    assert not copied(torch.zeros_like(x)).equal(copied(x)) or not copied.packing.mask.any()


def test_gradient_is_zero_where_pruned():
    layer = nn.Conv2d(4, 6, 3)
    mask = torch.rand(layer.weight.shape) < 0.3
    ours = SparseConv2d.from_dense(layer, mask)
    ours(torch.randn(2, 4, 7, 7)).sum().backward()
    assert layer.weight.grad[mask].all() and not layer.weight.grad[~mask].any()


def test_unbatched_image():
    layer = nn.Conv2d(4, 6, 3)
    ours = SparseConv2d.from_dense(layer, torch.ones_like(layer.weight, dtype=torch.bool))
    x = torch.randn(4, 7, 7)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-5)
