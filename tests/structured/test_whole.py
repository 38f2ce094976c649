"""What stays whole, and the reasons that are given."""

from __future__ import annotations

import logging

import pytest
import torch
from structured_cases import groups_of
from torch import nn
from torch.nn import functional as F

import drive

pytest.importorskip("torch_pruning")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(3, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.lstm(torch.relu(self.first(x)))[0][:, -1])


class Positions(nn.Module):
    """An embedding and a parameter that are added to what a layer makes."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(5, 8), nn.Linear(3, 8)
        self.positions, self.last = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x) + self.positions) + self.table(torch.arange(5)))


def conv(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.ReLU(), nn.Conv2d(8, 4, 3))


IMAGES, STEPS = torch.randn(2, 3, 7, 7), torch.randn(2, 5, 3)
CASES = {
    "LayerNorm": (conv(nn.LayerNorm([8, 5, 5])), IMAGES, {"0": "LayerNorm over the channels"}),
    "GroupNorm": (conv(nn.GroupNorm(2, 8)), IMAGES, {"0": "GroupNorm over the channels"}),
    "groups": (
        conv(nn.Conv2d(8, 8, 1, groups=4)),
        IMAGES,
        {"0": "a convolution in groups", "1": "a convolution in groups"},
    ),
    "LSTM": (Recurrent(), STEPS, {"first": "LSTM over the channels"}),
    "embedding": (Positions(), STEPS, {"first": "positions has a part in it"}),
}


@pytest.mark.parametrize("name", CASES)
def test_reasons(name: str):
    model, inputs, expected = CASES[name]
    whole = groups_of(model, inputs).whole
    assert expected.items() <= whole.items()
    assert "outputs of the network" in whole.values()


def test_norms_and_activations_by_channel_do_not_keep_a_group_whole():
    for between in (nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8), nn.PReLU()):
        assert [group.units for group in groups_of(conv(between), IMAGES).groups] == [8]


def test_zeros_do_not_hide_that_channels_are_mixed(caplog):
    """Behind a layer that starts at 0 nothing can be seen: the check has weights of its own."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            nn.init.zeros_(self.last.weight)

        def forward(self, x):
            return self.last(torch.relu(self.b(torch.softmax(self.a(x), -1))))

    torch.manual_seed(0)
    model, data = Mixed(), [(torch.randn(5, 6), torch.arange(5) % 4)]
    with caplog.at_level(logging.INFO):
        masks = drive.prune(
            model,
            data,
            F.cross_entropy,
            method="magnitude",
            structure="channels",
            sparsity=0.5,
            progress=False,
        )
    assert bool(masks["a.weight"].all()) and int(masks["b.weight"].any(1).sum()) == 4
    assert "would change more than to set them to 0: a" in caplog.text
    assert "1 groups of channels; whole stay outputs of the network: last" in caplog.text


@pytest.mark.parametrize("method", ["magnitude", "crop"])
def test_registered_layers_have_channels_too(method: str):
    class Backwards(nn.Module):
        """[inputs, outputs]"""

        def __init__(self, inputs: int, outputs: int):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs))

        def forward(self, x):
            return x @ self.weight

    layers = {Backwards: {"weight": drive.layers.Weight(outputs=1, inputs=0)}}
    torch.manual_seed(0)
    model = nn.Sequential(Backwards(6, 8), nn.ReLU(), Backwards(8, 4))
    data = [(torch.randn(5, 6), torch.arange(5) % 4)]
    masks = drive.prune(
        model, data, F.cross_entropy, method=method, structure="channels", sparsity=0.5, layers=layers,
        progress=False,
    )  # fmt: skip
    assert int(masks["0.weight"].all(0).sum()) == 4 == int(masks["0.weight"].any(0).sum())
    small = drive.shrink(model, masks, data[0][0], layers=layers).model
    assert (small[0].weight.shape, small[2].weight.shape) == ((6, 4), (4, 4))
    torch.testing.assert_close(small(data[0][0]), model(data[0][0]))
