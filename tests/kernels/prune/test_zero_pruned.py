"""drive::zero_pruned_: the compiled kernel and the reference, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drive_kernels.prune.zero import reference

OP = torch.ops.drive.zero_pruned_
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ugly(dtype: torch.dtype) -> list[Tensor]:
    """Whole blocks and rests, 0 and 1 entries, layouts of all kinds; NaN, infinities, -0.0, denormals."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, 64), torch.randn(100_003), torch.randn(5, 7, 3, 3), torch.randn(()), torch.randn(0, 3),
        torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last), torch.randn(40, 60).t(),
        torch.randn(40, 60)[::2, 1::3], torch.randn(1, 4, 1, 6).transpose(1, 3),
    ]  # fmt: skip
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, 0.0])
    found = []
    for tensor in tensors:
        if tensor.numel() > 6:
            flat = tensor.reshape(-1).clone()
            flat[torch.randperm(len(flat))[:6]] = special
            tensor.copy_(flat.view(tensor.shape))
        found.append(tensor.to(dtype))
    return found


def masks_of(tensors: list[Tensor]) -> list[Tensor]:
    """One of each tensor's own layout, or of another."""
    masks = [torch.rand(t.shape) < 0.3 for t in tensors]
    return [
        m if i % 2 else torch.empty_like(t, dtype=torch.bool).copy_(m)
        for i, (t, m) in enumerate(zip(tensors, masks, strict=True))
    ]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_reference(dtype: torch.dtype):
    tensors = ugly(dtype)
    masks = masks_of(tensors)
    expected = [torch.where(m, bits(t), 0) for t, m in zip(tensors, masks, strict=True)]
    for run in (OP, reference):
        mine = [t.clone(memory_format=torch.preserve_format) for t in tensors]
        strides = [t.stride() for t in mine]
        run(mine, masks)
        assert all(map(torch.equal, map(bits, mine), expected))
        assert [t.stride() for t in mine] == strides


def test_with_many_threads_and_views():
    tensor, mask = torch.randn(300_000), torch.rand(300_000) < 0.1
    base = tensor.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        OP([base[7:-5]], [mask[7:-5]])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(base[7:-5], torch.where(mask, tensor, 0.0)[7:-5])
    assert torch.equal(base[:7], tensor[:7]) and torch.equal(base[-5:], tensor[-5:]), "and nothing else"


def test_registration():
    tensors = [torch.randn(4, 5), torch.randn(3, dtype=torch.float64)]
    torch.library.opcheck(OP.default, (tensors, [torch.rand(t.shape) < 0.5 for t in tensors]))


def test_wrong_arguments_change_nothing():
    ones, mask = torch.ones(4), torch.zeros(4, dtype=torch.bool)
    for tensors, masks, error, words in (
        ([ones], [], ValueError, "tensors and masks must be of one length, got 1 and 0"),
        ([ones, ones], [mask, mask[:3]], ValueError, r"masks\[1\] must have shape \[4\], got \[3\]"),
        ([ones], [ones], TypeError, r"masks\[0\] must be Bool, got Float"),
        ([mask], [mask], TypeError, r"tensors\[0\] must be float32, bfloat16, float16 or float64, got Bool"),
    ):
        with pytest.raises(error, match=words):
            OP(tensors, masks)
    assert ones.all()
