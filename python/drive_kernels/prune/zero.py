"""drive::zero_pruned_ - masks held: the entries that are pruned become +0, in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from drive_kernels.library import library, serve

library.define(
    "zero_pruned_("
    "Tensor(a!)[] tensors, "  # any shapes and strides; float32, bfloat16, float16, float64
    "Tensor[] masks"  # bool, shape of its tensor, any strides; False: pruned
    ") -> ()"
)

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _zero_pruned_fake(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    return None


def reference(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """What drive::zero_pruned_ means, in plain PyTorch.

    By the bits: a product with the mask would keep NaN and signs, and masked_fill_ needs the mask's inverse.
    """
    for tensor, mask in zip(tensors, masks, strict=True):
        bits = tensor.detach().view(_BITS[tensor.element_size()])
        bits.bitwise_and_(mask.to(bits.dtype).neg_())


serve("zero_pruned_", _zero_pruned_fake, reference)
