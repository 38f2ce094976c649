"""Skips of Softened: values, where they go, and what they must not keep."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from soft_networks import INF, Block, inputs, mlp, networks, same
from torch import Tensor, nn
from torch.nn import functional as F

from drive.pipeline import Softened


def normalised(x: Tensor) -> Tensor:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kernel", ((3, 3), (1, 5), (7, 7)))
@pytest.mark.parametrize("size", (6, 7))
def test_a_skip_around_a_convolution(stride: int, kernel: tuple[int, int], size: int):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, stride, [k // 2 for k in kernel])
    softened = Softened(nn.Sequential(conv, nn.BatchNorm2d(4)), until=1.0)
    x = torch.randn(2, 3, size, size)
    added = normalised(1e-4 * x[..., ::stride, ::stride].sum(1, keepdim=True))
    for t in (0.0, 0.25):
        softened.at(t)
        torch.testing.assert_close(softened(x), normalised(conv(x)) + (1 - t) * added.expand(-1, 4, -1, -1))


def test_skips_in_groups():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    softened, x = Softened(nn.Sequential(conv, nn.BatchNorm2d(4))), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(softened(x), normalised(conv(x)) + normalised(1e-4 * x))
    assert softened.added()[0].shape == (4, 1, 1, 1)


def test_skips_around_hidden_linear_layers():
    model = mlp()
    x = inputs(model)
    softened = Softened(model, activations=False)
    hidden = normalised(model[0](x).detach()) + normalised(1e-4 * x.sum(1, keepdim=True)).expand(-1, 8)
    hidden = hidden.relu()
    weight, bias = model[3].weight, model[3].bias  # not by a call, which adds the skip
    second = F.linear(hidden, weight, bias) + normalised(1e-4 * hidden.sum(1, keepdim=True))
    expected = model[5](second.relu())
    torch.testing.assert_close(softened(x), expected)
    assert [skip.name for skip in softened.soft_skips] == ["0", "3"]


def test_where_skips_go():
    def names(*layers: nn.Module) -> list[str]:
        return [skip.name for skip in Softened(nn.Sequential(*layers)).soft_skips]

    def conv(kernel: int = 3, **options: Any) -> nn.Conv2d:
        return nn.Conv2d(3, 4, kernel, **{"padding": kernel // 2, **options})

    norm, linear = nn.BatchNorm2d(4), nn.Linear(4, 4)
    assert names(conv(), nn.BatchNorm2d(4), linear, linear, nn.Linear(4, 4)) == ["0"]  # no MLP
    assert names(conv(1), norm) == names(conv(), nn.ReLU(), norm) == names(nn.Sequential(conv()), norm) == []
    assert names(nn.Linear(3, 4)) == []
    assert names(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4)) == []
    assert names(nn.MultiheadAttention(4, 1), nn.Linear(4, 4)) == []
    assert names(conv(padding=2, dilation=2), nn.BatchNorm2d(4)) == ["0"]
    assert names(conv(padding="same"), nn.SyncBatchNorm(4)) == ["0"]


@pytest.mark.parametrize("options", ({}, {"padding": 1, "dilation": 2}, {"padding": "valid", "stride": 2}))
def test_other_sizes_are_left_out_and_said(options: dict[str, Any], caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4))
    softened, x = Softened(model), torch.randn(2, 3, 9, 9)
    assert "no skip around 0: with this padding" in caplog.text and not softened.added()
    assert same(softened(x), model(x))


def test_layers_that_do_not_follow_each_other():
    """conv2 and bn1 are neighbours in the list alone."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    class Undecidable(Grouped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -INF else x

    x = torch.randn(2, 4, 5, 5)
    assert not Softened(Grouped()).added()
    model = Undecidable()
    plain = copy.deepcopy(model)
    assert same(Softened(model)(x), plain(x))


def test_layers_called_twice_in_one_pass():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = self.conv(x), self.conv(y)
            return self.bn(x), self.bn(y)

    softened, x, y = Softened(Twice()), torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    conv = softened.module.conv
    for found, of in zip(softened(x, y=y), (x, y), strict=True):
        torch.testing.assert_close(found, normalised(conv(of)) + normalised(1e-4 * of.sum(1, keepdim=True)))


@networks
def test_inputs_are_not_kept(network: Callable[[], nn.Sequential]):
    softened, alive = Softened(network()), []
    for layer in softened.module.modules():
        layer.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    x = inputs(softened.module)
    with torch.no_grad():
        y = softened(x)
    hold = {id(x), id(y)}
    module = softened.module
    if isinstance(module[0], Block):
        hold |= {id(module[0].last), id(module[1].last)}
    assert alive and not [ref for ref in alive if ref() is not None and id(ref()) not in hold]


@networks
def test_a_start_at_zero_changes_nothing(network: Callable[[], nn.Sequential]):
    model = network()
    x = inputs(model)
    expected = copy.deepcopy(model)(x)
    softened = Softened(model, activations=False, skip_start="zero")
    assert torch.equal(softened(x), expected)
    softened(x).square().sum().backward()
    assert all(skip.norm.weight.grad.any() for skip in softened.soft_skips)


def test_an_mlp_on_sequences_is_refused():
    softened = Softened(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"the input of 0 must be \[B, 5\].*got shape \(2, 3, 5\)"):
        softened(torch.randn(2, 3, 5))
