"""`fused_drive_prune` to a budget of costs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from drive import fused_drive_prune
from drive.reference import drive_prune
from drive.targets.costs import Budget

COSTS = {"0.weight": 900, "3.weight": 7}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    made(torch.randn(4, 3, 32, 32)).square().mean().backward()
    return made


def spent(masks) -> int:
    return sum(int(mask.sum()) * COSTS[name] for name, mask in masks.items())


@pytest.mark.parametrize("alpha", (0.0, 0.5, 1, 1.5))
@pytest.mark.parametrize("min_keep", (0, 30))
def test_budget_is_kept_and_used(alpha: float, min_keep: int):
    ours, theirs = model(), model()
    total = sum(dict(ours.named_parameters())[name].numel() * cost for name, cost in COSTS.items())
    goal = {"costs": COSTS, "max_cost": total // 10, "alpha": alpha, "min_keep": min_keep}
    result, expected = fused_drive_prune(ours, **goal), drive_prune(theirs, **goal)
    assert total // 10 - max(COSTS.values()) < spent(result.masks) <= total // 10
    for name, mask in result.masks.items():
        assert torch.equal(mask, expected.masks[name]) and int(mask.sum()) >= min_keep
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name))
    assert result.threshold == pytest.approx(expected.threshold, rel=1e-9)


def test_alpha_moves_the_work_to_cheap_entries():
    kept = {}
    for alpha in (0.0, 1.0):
        result = fused_drive_prune(model(), costs=COSTS, max_cost=60_000, alpha=alpha)
        kept[alpha] = {count.name: count.kept for count in result.per_tensor}
    assert kept[1.0]["0.weight"] < kept[0.0]["0.weight"]
    assert kept[1.0]["3.weight"] > kept[0.0]["3.weight"]


def test_goes_on_from_masks():
    net = model()
    first = fused_drive_prune(net, costs=COSTS, max_cost=100_000)
    before = {name: mask.clone() for name, mask in first.masks.items()}
    again = fused_drive_prune(net, costs=COSTS, max_cost=30_000, masks=first.masks)
    assert spent(again.masks) <= 30_000
    for name, mask in again.masks.items():
        assert not (mask & ~before[name]).any()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, "sparsity must be given, or costs and max_cost, got neither"),
        ({"sparsity": 0.5, "costs": COSTS, "max_cost": 9}, ValueError, "costs and max_cost, got both"),
        ({"sparsity": 0.5, "alpha": 1}, ValueError, "alpha must be 0 without costs, got 1"),
        ({"costs": COSTS}, ValueError, "max_cost must be an integer >= 0, got None"),
        ({"max_cost": 9}, TypeError, "costs must be a mapping of names to integers, got None"),
        ({"costs": {"0.weight": 1}, "max_cost": 9}, ValueError, "costs has no entry for 3.weight"),
        (
            {"costs": {**COSTS, "0.weight": 0}, "max_cost": 9},
            ValueError,
            "costs['0.weight'] must be an integer",
        ),
        ({"costs": {**COSTS, "0.weight": 2.0}, "max_cost": 9}, ValueError, "from 1 to 2^31 - 1, got 2.0"),
        ({"costs": COSTS, "max_cost": -1}, ValueError, "max_cost must be an integer >= 0, got -1"),
        ({"costs": COSTS, "max_cost": 9, "alpha": -1}, ValueError, "alpha must be a finite number >= 0"),
        ({"costs": COSTS, "max_cost": 9, "alpha": float("nan")}, ValueError, "alpha must be a finite number"),
        (
            {"costs": COSTS, "max_cost": 9, "min_keep": 2},
            ValueError,
            "min_keep=2 asks for survivors that cost 1814, max_cost is 9",
        ),
    ],
)
def test_refuses(given, error, words):
    net = model()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    with pytest.raises(error) as raised:
        fused_drive_prune(net, **given)
    assert words in str(raised.value) and str(raised.value).startswith("fused_drive_prune: ")
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())


def test_refuses_costs_beyond_int64():
    budget, words = Budget({"a": 2**31 - 1, "b": 2}, 5, 0.0), "^prune: all entries must cost less than 2\\^63"
    budget.check_total("prune", {"a": 2**32, "b": 2**31 - 1})
    with pytest.raises(ValueError, match=f"{words} together, got {2**63}$"):
        budget.check_total("prune", {"a": 2**32, "b": 2**31})


def test_budget_beyond_int64_prunes_nothing():
    net = model()
    assert fused_drive_prune(net, costs=COSTS, max_cost=2**64).pruned == 0


def test_ties_at_0_are_said(caplog):
    net = model()
    net[3].weight.grad.zero_()
    with caplog.at_level(logging.WARNING):
        fused_drive_prune(net, costs=COSTS, max_cost=900 * 216 + 7 * 10)
    assert "0" in caplog.text
