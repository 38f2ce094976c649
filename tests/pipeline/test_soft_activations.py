"""Activations that Softened softens: values, gradients, which they are, and which are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from soft_networks import INF, NAN, convolutional, looks, same
from torch import Tensor, nn
from torch.nn import functional as F

from drive.pipeline import Softened
from drive.pipeline.activations import SoftReLU


def activation(beta: float = 2.0, inplace: bool = False) -> Softened:
    return Softened(nn.Sequential(nn.ReLU(inplace=inplace)), beta=beta, until=1.0)


def test_values_of_a_soft_relu():
    soft, x = activation(), torch.linspace(-3, 3, 61, dtype=torch.float64)
    for t in (0, 0.25, 0.75):
        soft.at(t)
        torch.testing.assert_close(soft(x), (1 - t) * x * torch.sigmoid(2 * x) + t * x.relu())


@pytest.mark.parametrize("t", (0, 0.25, 1))
def test_gradients_of_a_soft_relu(t: float):
    soft = activation()
    soft.at(t)
    x = torch.tensor([-2.5, -0.3, 0.2, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft, x) and torch.autograd.gradgradcheck(soft, x)


@pytest.mark.parametrize("beta", (1.0, 2.0, 5.0))
def test_largest_distance_to_relu(beta: float):
    x = torch.linspace(-4, 4, 800_001, dtype=torch.float64)
    distance = (activation(beta)(x) - x.relu()).abs().max()
    assert distance.item() == pytest.approx(0.2784645 / beta, rel=1e-6)


@pytest.mark.parametrize("inplace", (False, True))
def test_at_the_end_it_is_relu(inplace: bool):
    soft = activation(inplace=inplace)
    x = torch.tensor([-INF, -1.0, -0.0, 0.0, 1e-45, 2.0, INF, NAN, -NAN], requires_grad=True)
    soft.at(1)
    y, expected = soft(x), F.relu(x)
    assert same(y, expected)
    assert same(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)))


def test_inputs_are_not_written_into():
    for t in (0, 0.5, 1):
        soft, x = activation(inplace=True), torch.tensor([-1.0, 1.0])
        soft.at(t)
        soft(x)
        assert x.tolist() == [-1, 1]


def test_only_relus_are_softened():
    class Derived(nn.ReLU):
        pass

    kinds = [nn.ReLU6(), nn.LeakyReLU(), nn.GELU(), Derived()]
    softened = Softened(nn.Sequential(*kinds, nn.ReLU()))
    assert [type(module) for module in softened.module] == [*map(type, kinds), SoftReLU]


class Functional(nn.Module):
    def __init__(self, relu: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.relu_ = nn.Linear(5, 5), relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu_(self.linear(x))


RELUS = (F.relu, torch.relu, torch.relu_, lambda x: x.relu(), lambda x: x.relu_(), lambda x: F.relu(x, True))


@pytest.mark.parametrize("relu", RELUS)
def test_relu_as_a_function_is_refused(relu: Callable[[Tensor], Tensor]):
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(5, 5), Functional(relu)))
    before = looks(model)
    with pytest.raises(
        ValueError, match="Softened: 1.1 calls relu as a function, make it an nn.ReLU or pass"
    ):
        Softened(model)
    assert looks(model) == before
    with pytest.raises(ValueError, match="the model itself calls relu"):
        Softened(Functional(relu))
    assert len(Softened(model, activations=False).added()) == 3  # around 1.0


def test_relu_within_a_layer_of_torch_is_refused():
    with pytest.raises(ValueError, match="Softened: 0 calls relu as a function"):
        Softened(nn.Sequential(nn.TransformerEncoderLayer(4, 1)))


def test_what_cannot_be_traced_is_said(caplog: pytest.LogCaptureFixture):
    class Decides(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x if x.sum() > 0 else -x)

    model = Decides(nn.Linear(5, 5), nn.ReLU())
    softened = Softened(model)
    assert "torch.fx cannot trace Decides (TraceError" in caplog.text
    assert type(model[1]) is SoftReLU and not hasattr(model, "seen")
    softened(torch.randn(2, 5))


def test_tracing_leaves_nothing_behind():
    torch.manual_seed(3)
    model, state = convolutional(), torch.get_rng_state()
    before = looks(model)
    model[0].register_forward_hook(lambda *_: torch.rand(1) and None)
    softened = Softened(model, skips=False)
    assert torch.equal(torch.get_rng_state(), state) and not hasattr(model[0], "last")
    model[0]._forward_hooks.clear()
    assert looks(softened.finish()) == before
