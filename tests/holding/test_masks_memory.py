"""Memory of masks: a piece that steps share while a loop runs, and one of its own for each afterwards."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import drive
from drive import Masks, fused_drive_prune


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64),
        nn.Linear(64, 4),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def prune(model: nn.Module, **options: Any) -> Masks:
    seeds = map(torch.Generator().manual_seed, range(3))
    batches = [(torch.randn(8, 4, 5, 5, generator=seed), torch.arange(8) % 4) for seed in seeds]
    options = {"sparsity": 0.5, "iterations": 3, "progress": False, **options}
    return drive.prune(model, batches, F.cross_entropy, **options)


def written(mask: Tensor) -> int:
    file = io.BytesIO()
    torch.save(mask, file)
    return len(file.getvalue())


WAYS: dict[str, dict[str, Any]] = {
    "drive": {},
    "magnitude": {"method": "magnitude", "iterations": 1},
    "a scope": {"scope": "uniform"},
    "blocks": {"structure": "2x2"},
    "channels": {"structure": "channels", "sparsity": 0.2},
    "a budget": {"macs": 0.5, "sparsity": None},
    "training": {"method": "gradual"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masks", ("fresh", "given"))
def test_one_mask_is_saved_alone(way: str, masks: str):
    model = network()
    given = fused_drive_prune(
        dict(model.named_parameters()), network().state_dict(), sparsity=0.0, include=["*weight"]
    )
    found = prune(model, **WAYS[way], **({"masks": given.masks} if masks == "given" else {}))
    for name, mask in found.items():
        assert mask.untyped_storage().nbytes() == mask.numel(), name
        assert written(mask) < mask.numel() + 2000
        assert mask.stride() == model.get_parameter(name).stride(), "laid out as its weight"
    assert len({mask.data_ptr() for mask in found.values()}) == len(found)


@pytest.mark.parametrize("way", WAYS)
def test_what_on_step_was_given_is_what_is_returned(way: str):
    seen: list[Masks] = []
    found = prune(network(), **WAYS[way], on_step=lambda result: seen.append(result.masks))
    assert all(masks is found for masks in seen)


def test_masks_attached_in_the_loop_follow_after_it():
    model = network()
    kept: dict[str, Tensor] = {}

    def attach(result: drive.PruneResult) -> None:
        if not kept:
            result.masks.attach(model)
            kept.update(result.masks)

    masks = prune(model, on_step=attach)
    assert all(masks[name] is mask for name, mask in kept.items())
    model(torch.randn(2, 4, 5, 5)).sum().backward()
    fused_drive_prune(model, sparsity=0.9, masks=masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for _ in range(2):
        model(torch.randn(2, 4, 5, 5)).sum().backward()
        optimizer.step()
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert masks.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_the_shared_piece_is_given_back():
    """No mask is a view, which would keep what it is a view of."""
    shared: set[int] = set()
    found = prune(
        network(), on_step=lambda result: shared.update(m.data_ptr() for m in result.masks.values())
    )
    assert not any(mask._is_view() for mask in found.values())
    assert not shared & {mask.data_ptr() for mask in found.values()}


def test_a_step_makes_one_piece_and_updates_in_place():
    """Page faults in many small ones take as long as the step itself."""
    weights = {name: torch.randn(9, 7) for name in "abc"}
    grads = {name: torch.ones(9, 7) for name in "abc"}
    masks = fused_drive_prune(weights, grads, sparsity=0.3).masks
    assert len({mask.untyped_storage().data_ptr() for mask in masks.values()}) == 1
    before = {name: (mask, mask.data_ptr(), mask._version) for name, mask in masks.items()}
    again = fused_drive_prune(weights, grads, sparsity=0.6, masks=masks).masks
    for name, (mask, address, version) in before.items():
        assert again[name] is mask and mask.data_ptr() == address
        assert mask._version > version, "whoever keeps something made of it sees that it has changed"


def test_apart_is_nothing_where_they_are_apart():
    masks = Masks({"a": torch.ones(3, dtype=torch.bool), "none": torch.ones(0, 2, dtype=torch.bool)})
    addresses = [mask.data_ptr() for mask in masks.values()]
    assert masks.apart_() is masks and [mask.data_ptr() for mask in masks.values()] == addresses


def test_clones_are_apart():
    whole = torch.rand(4, 6) < 0.5
    masks = Masks({"a": whole[:2], "b": whole[2:]}, parameters=99)
    copies = masks.clone()
    assert copies.parameters == 99 and all(torch.equal(copies[name], masks[name]) for name in masks)
    whole.fill_(True)
    assert not copies["a"].all()
