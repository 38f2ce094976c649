"""Memory that is kept to be used again: drive::new_masks and drive.release_memory."""

from __future__ import annotations

import pytest
import torch

import drive
from drive_kernels.memory import reference

LARGE = 5 << 20  # below 4 MB malloc keeps memory itself


def pruned(seed: int, entries: int = LARGE) -> drive.PruneResult:
    generator = torch.Generator().manual_seed(seed)
    weight, grad = (torch.randn(entries, generator=generator) for _ in range(2))
    return drive.fused_drive_prune([weight], [grad], sparsity=0.9)


def test_masks_lie_where_earlier_ones_have():
    drive.release_memory()
    first = pruned(0).masks["0"]
    address = first.data_ptr()
    second = pruned(1).masks["0"]
    assert second.data_ptr() != address  # the first is still there
    del first
    assert pruned(2).masks["0"].data_ptr() == address


def test_what_is_kept_can_be_released():
    drive.release_memory()
    masks = torch.ops.drive.new_masks(torch.empty(0), LARGE)
    assert drive.release_memory() == 0  # in use
    del masks
    assert drive.release_memory() >= LARGE
    assert drive.release_memory() == 0


def test_what_is_kept_is_bounded():
    drive.release_memory()
    masks = [torch.ops.drive.new_masks(torch.empty(0), 100 << 20) for _ in range(7)]  # never touched
    del masks
    assert 400 << 20 < drive.release_memory() <= 512 << 20


def test_masks_outlive_what_is_released():
    masks = pruned(3).masks
    before = masks["0"].clone()
    drive.release_memory()
    torch.ops.drive.new_masks(torch.empty(0), LARGE).fill_(True)
    assert torch.equal(masks["0"], before)


@pytest.mark.parametrize("entries", (0, 1, 1000, LARGE))
def test_new_masks(entries: int):
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.empty(3, dtype=dtype)
        ours, expected = torch.ops.drive.new_masks(like, entries), reference(like, entries)
        assert (ours.shape, ours.dtype, ours.device) == (expected.shape, expected.dtype, expected.device)
        checks = ("test_schema", "test_faketensor")  # others compare what is not initialised
        torch.library.opcheck(torch.ops.drive.new_masks.default, (like, entries), test_utils=checks)
    assert torch.ops.drive.new_masks(torch.empty(3, device="meta"), entries).is_meta
