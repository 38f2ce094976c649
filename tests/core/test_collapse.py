"""collapse: dead channels by construction, and against a search of the graph."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import drive
from drive import Masks


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in drive.targets.prunable(model).items()}


def test_whole_networks_are_connected():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(3 * 36, 4)
    )
    model[1].running_mean.fill_(1e3)
    found = drive.collapse(model, Masks(full(model)), torch.randn(1, 2, 8, 8))
    assert found.empty == found.disconnected == []
    assert found.effective == {"0.weight": 54, "4.weight": 432}


def test_an_empty_layer_disconnects_the_others_but_not_past_a_residual():
    class Residual(nn.Module):
        def __init__(self, skip: bool):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.skip = skip

        def forward(self, x):
            x = self.first(x).relu()
            inner = self.middle(x).relu()
            return self.last(inner + x if self.skip else inner)

    for skip in (False, True):
        model = Residual(skip)
        masks = full(model)
        masks["middle.weight"][:] = False
        found = drive.collapse(model, Masks(masks), torch.randn(3, 4))
        assert found.empty == ["middle.weight"]
        assert found.disconnected == ([] if skip else ["first.weight", "last.weight"])


def test_survivors_into_a_dead_channel():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3))
    masks = full(model)
    masks["0.weight"][0] = False  # channel 0 of the first layer gets nothing,
    masks["2.weight"][:, 1] = False  # and nobody reads channel 1
    found = drive.collapse(model, Masks(masks), torch.randn(1, 1, 8, 8))
    assert found.empty == [] and found.disconnected == ["0.weight", "2.weight", "4.weight"]
    masks["2.weight"][1, 1, 0, 0] = True
    found = drive.collapse(model, Masks(masks), torch.randn(1, 1, 8, 8))
    assert found.disconnected == [] and found.effective == {"0.weight": 9, "2.weight": 1, "4.weight": 9}


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_search_of_the_graph(seed: int):
    torch.manual_seed(seed)
    sizes = [5, 8, 8, 6, 3]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())])
    masks = {name: torch.rand(mask.shape) < 0.15 for name, mask in full(model).items()}
    matrices = list(masks.values())
    reached = [torch.ones(5, dtype=torch.bool)]
    for m in matrices:
        reached.append((m & reached[-1]).any(1))
    leads = [torch.ones(3, dtype=torch.bool)]
    for m in reversed(matrices):
        leads.insert(0, (m & leads[0][:, None]).any(0))
    on_path = [m & reached[i] & leads[i + 1][:, None] for i, m in enumerate(matrices)]
    found = drive.collapse(model, Masks(masks), torch.randn(1, 5))
    assert list(found.effective.values()) == [int(m.sum()) for m in on_path]


def test_deep_networks():
    model = nn.Sequential(*[part for _ in range(150) for part in (nn.Linear(64, 64), nn.ReLU())])
    found = drive.collapse(model, Masks(full(model)), torch.randn(1, 64))
    assert set(found.effective.values()) == {4096}


def test_attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    masks = full(model)
    masks["linear1.weight"][3] = False
    found = drive.collapse(model, Masks(masks), torch.randn(2, 5, 8))
    assert found.effective["linear2.weight"] == 8 * 15 and found.disconnected == []


def test_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3))
    before, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    drive.collapse(model, Masks(full(model)), torch.randn(4, 3))
    rng_after = torch.get_rng_state()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and model.training
    torch.set_rng_state(rng)
    torch.randn(4, 3)
    assert torch.equal(torch.get_rng_state(), rng_after)


def test_refuses():
    with pytest.raises(ValueError, match="has no parameter other"):
        drive.collapse(nn.Linear(2, 2), Masks({"other": torch.ones(2, dtype=torch.bool)}), torch.ones(1, 2))
    with pytest.raises(TypeError, match="collapse: the model must return tensors, got int"):
        model = nn.Linear(2, 2)
        model.forward = lambda x: 3
        drive.collapse(model, Masks(full(model)), torch.ones(1, 2))
