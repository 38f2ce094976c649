"""Inside torch.inference_mode(), or with what was made there: served without gradients, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import drive
from drive import methods

NEEDS_NONE = ("magnitude", "random")
BATCHES = [
    (torch.randn(8, 6, generator=torch.Generator().manual_seed(s)), torch.arange(8) % 4) for s in range(3)
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def prune(model: nn.Module, **options: Any) -> drive.Masks:
    options = {"progress": False, **options}
    if "macs" not in options:
        options = {"sparsity": 0.5, **options}
    return drive.prune(model, BATCHES, F.cross_entropy, **options)


def same(one: drive.Masks, two: drive.Masks) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", methods.names())
def test_gradients_cannot_be_had_there(method: str):
    model = network()
    before, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    if method in NEEDS_NONE:
        expected = prune(network(), method=method)
        with torch.inference_mode():
            assert same(prune(model, method=method), expected)
        return
    with torch.inference_mode(), pytest.raises(
        ValueError, match=r": this needs gradients, which cannot be had inside torch.inference_mode\(\)"
    ):  # fmt: skip
        prune(model, method=method, iterations=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and model.training


@pytest.mark.parametrize("options", ({}, {"macs": 0.4}, {"scope": "uniform"}, {"structure": "2x2"}))
def test_masks_from_there_are_used_elsewhere(options: dict[str, Any]):
    model = network()
    with torch.inference_mode():
        masks = prune(model, method="magnitude", **options)
    assert same(masks, prune(network(), method="magnitude", **options))
    F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    drive.fused_drive_prune(model, sparsity=0.9, masks=masks)
    masks.attach(model)
    for mask in masks.values():
        mask.logical_and_(torch.ones_like(mask))


def test_one_step_there_gives_masks_for_elsewhere():
    weight, grad = torch.arange(1.0, 9), torch.ones(8)
    with torch.inference_mode():
        masks = drive.fused_drive_prune([weight], [grad], sparsity=0.25).masks
    assert drive.fused_drive_prune([weight], [grad], sparsity=0.5, masks=masks).kept == 4


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("options", ({"sparsity": 0.5}, {"macs": 0.4}))
def test_without_gradients_they_are_had_all_the_same(method: str, options: dict[str, Any]):
    if "macs" in options and method == "rigl":
        return  # layer by layer
    expected = prune(network(), method=method, **options, iterations=2)
    with torch.no_grad():
        assert same(prune(network(), method=method, **options, iterations=2), expected)


@pytest.mark.parametrize("method", ("drive", "magnitude", "synflow", "gradual"))
@pytest.mark.parametrize("part", ("0.weight", "3.bias", "1.running_mean"))
def test_models_that_were_made_there(method: str, part: str):
    model = network()
    path, _, key = part.rpartition(".")
    with torch.inference_mode():
        module = model.get_submodule(path)
        tensor = module.get_parameter(key) if key != "running_mean" else module.get_buffer(key)
        made = tensor.clone()
        setattr(module, key, nn.Parameter(made) if key != "running_mean" else made)
    with pytest.raises(
        ValueError, match=rf"^prune: {part} must be a tensor that can change, got one made inside"
    ):
        prune(model, method=method)
