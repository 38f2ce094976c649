"""Multiply-adds of an entry, from one forward pass."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from drive.targets.multiply_adds import dense_work, multiply_adds, samples_of
from drive.targets.targets import prunable


def costs_of(model: nn.Module, *inputs: torch.Tensor) -> dict[str, int]:
    return multiply_adds(model, prunable(model), lambda: model(*inputs), samples_of(inputs), op="test")


def test_convolutions_and_linear():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(), nn.Linear(4 * 26 * 26, 10),
    )  # fmt: skip
    found = costs_of(model, torch.randn(5, 3, 32, 32))
    assert found == {"0.weight": 15 * 15, "1.weight": 13 * 13, "2.weight": 13 * 13, "4.weight": 1}
    assert dense_work(found, prunable(model)) == 15**2 * 216 + 13**2 * (8 * 2 * 9 + 8 * 4 * 4) + 27040


def test_tokens_however_they_are_laid_out():
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return self.second(hidden.flatten(0, 1)).view_as(x)

    assert costs_of(Flattens(), torch.randn(4, 7, 6)) == {"first.weight": 7, "second.weight": 7}


@pytest.mark.parametrize("batch_first", (False, True))
def test_attention_and_recurrent(batch_first: bool):
    x = torch.randn(3, 9, 8) if batch_first else torch.randn(9, 3, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    found = multiply_adds(attention, prunable(attention), lambda: attention(x, x, x), samples=3, op="test")
    assert found == {"in_proj_weight": 9, "out_proj.weight": 9}
    lstm = nn.LSTM(8, 5, batch_first=batch_first)
    found = multiply_adds(lstm, prunable(lstm), lambda: lstm(x), samples=3, op="test")
    assert found == {"weight_ih_l0": 9, "weight_hh_l0": 9}


def test_shared_and_repeated():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert costs_of(model, torch.randn(2, 4)) == {"0.weight": 2}
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert costs_of(tied, torch.randn(2, 3, 4)) == {"0.weight": 6}


def test_parametrised():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)))
    assert list(costs_of(model, torch.randn(2, 2, 8, 8)).values()) == [36]


def test_what_the_pass_does_not_come_by(caplog):
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    with caplog.at_level(logging.WARNING):
        found = multiply_adds(
            model, prunable(model), lambda: model["used"](torch.randn(2, 3)), samples=2, op="test"
        )
    assert found == {"used.weight": 1, "unused.weight": 1} and "unused.weight" in caplog.text


def test_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        costs_of(model, torch.randn(2, 5))
    assert not model[0]._forward_hooks
