"""A converted model in evaluation: one plan, that follows its tensors, and leaves what it is not for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import drive
from drive.sparse import convert, report

TOLERANCE = {"rtol": 0, "atol": 1e-5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, drive.Masks]:
    """A model in evaluation mode and what it is converted to, which shares its tensors; its masks."""
    torch.manual_seed(0)
    model = Net().eval()
    masks = drive.Masks({n: torch.rand_like(p) < 0.4 for n, p in model.named_parameters() if p.dim() > 1})
    masks.apply_(model)
    ours = convert(model, masks, torch.randn(2, 3, 12, 12), deterministic=True)
    assert report(ours).chosen == "one plan"
    return model, ours, masks


@torch.no_grad()
def assert_same(ours: nn.Module, model: nn.Module, *shape: int) -> None:
    x = torch.randn(shape or (2, 3, 12, 12))
    torch.testing.assert_close(ours(x), model(x), **TOLERANCE)


def test_follows_weights_statistics_masks_and_states(pair: tuple[nn.Module, nn.Module, drive.Masks]):
    model, ours, masks = pair
    assert_same(ours, model)
    with torch.no_grad():
        model.features[0].weight.mul_(2)
        assert_same(ours, model)
        model.features[1].running_mean.add_(0.5)
        assert_same(ours, model)
        mask = masks["features.3.weight"]
        mask[:4] = False
        masks.apply_(model)
        assert_same(ours, model)
    state = model.state_dict()
    others = {name: torch.randn_like(value) for name, value in state.items() if value.dim() > 1}
    model.load_state_dict({**state, **others})
    masks.apply_(model)
    assert_same(ours, model)


def test_copies_and_pickles_follow_their_own(pair: tuple[nn.Module, nn.Module, drive.Masks]):
    model, ours, _ = pair
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert_same(other, model)
        with torch.no_grad():
            other.features[0].weight.zero_()
        assert other(torch.ones(1, 3, 12, 12)).shape == (1, 4)
        assert_same(ours, model)
    assert list(ours.state_dict()) == list(model.state_dict())


def test_what_it_is_not_for_is_the_models_own(pair: tuple[nn.Module, nn.Module, drive.Masks]):
    model, ours, _ = pair
    x = torch.randn(2, 3, 12, 12)
    ours(x).sum().backward()
    assert model.fc.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(ours(x=x), model(x), **TOLERANCE)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == model(x).dtype == torch.bfloat16
    ours.train()
    statistics = model.features[1].running_mean.clone()
    ours(x)
    assert not torch.equal(statistics, model.features[1].running_mean)


def test_sizes_that_the_plan_does_not_know():
    """The model's own code serves them, as it did before it was converted."""

    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[2] % 2 == 0 else super().forward(x) * 2

    model = Picky().eval()
    masks = drive.Masks({n: torch.rand_like(p) < 0.4 for n, p in model.named_parameters() if p.dim() > 1})
    masks.apply_(model)
    ours = convert(model, masks, torch.randn(2, 3, 12, 12), deterministic=True)
    for shape in ((2, 3, 12, 12), (2, 3, 13, 12), (3, 3, 15, 15), (1, 3, 10, 10)):
        assert_same(ours, model, *shape)


def test_values_that_decide_sizes_are_no_plan():
    class Picks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[x.flatten(1).sum(1) > 0]

    model = Picks().eval()
    masks = drive.Masks({n: torch.rand_like(p) < 0.4 for n, p in model.named_parameters() if p.dim() > 1})
    masks.apply_(model)
    ours = convert(model, masks, torch.ones(2, 3, 12, 12), deterministic=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.ones(3, 3, 9, 9)), model(torch.ones(3, 3, 9, 9)), **TOLERANCE)
