"""The blocked layout of a batch of images, [ceil(N / 16), C, H, W, 16], and the ops to and from it.

Sixteen images are innermost, a cache line of float32: whatever the plane's size, one load takes the same
pixel of all of them. Lanes beyond the batch are 0 on the way in and their gradients are 0 on the way back.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .prune import _library

LANES = 16

_library.define("to_blocks(Tensor input) -> Tensor")  # [N, C, H, W] -> [ceil(N / 16), C, H, W, 16]
_library.define("from_blocks(Tensor input, SymInt batch) -> Tensor")  # and back


def to_blocks_reference(input: Tensor) -> Tensor:
    """What drive::to_blocks means, in plain PyTorch."""
    padded = F.pad(input, (0, 0, 0, 0, 0, 0, 0, -input.shape[0] % LANES))
    return padded.unflatten(0, (padded.shape[0] // LANES, LANES)).permute(0, 2, 3, 4, 1).contiguous()


def from_blocks_reference(input: Tensor, batch: int) -> Tensor:
    """What drive::from_blocks means, in plain PyTorch."""
    return input.permute(0, 4, 1, 2, 3).flatten(0, 1)[:batch].contiguous()


def _to_blocks_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.batch = inputs[0].shape[0]


def _to_blocks_autograd(ctx: Any, grad: Tensor) -> Tensor:
    found: Tensor = torch.ops.drive.from_blocks(grad, ctx.batch)
    return found


def _from_blocks_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.drive.to_blocks(grad), None


def _to_blocks_fake(input: Tensor) -> Tensor:
    batch, *rest = input.shape
    return input.new_empty([(batch + LANES - 1) // LANES, *rest, LANES])


def _from_blocks_fake(input: Tensor, batch: int) -> Tensor:
    return input.new_empty([batch, *input.shape[1:-1]])


torch.library.register_fake("drive::to_blocks", _to_blocks_fake, lib=_library)
torch.library.register_fake("drive::from_blocks", _from_blocks_fake, lib=_library)
_library.impl("to_blocks", to_blocks_reference, "CompositeExplicitAutograd")
_library.impl("from_blocks", from_blocks_reference, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "drive::to_blocks", _to_blocks_autograd, setup_context=_to_blocks_setup, lib=_library
)
torch.library.register_autograd("drive::from_blocks", _from_blocks_autograd, lib=_library)
