"""The blocked layout of a batch of images, [ceil(N / 16), C, H, W, 16], and the ops to and from it.

Sixteen images are innermost, a cache line of float32: whatever the plane's size, one load takes the same
pixel of all of them. Lanes beyond the batch are 0 on the way in and their gradients are 0 on the way back.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.library import library, serve

LANES = 16

library.define("to_blocks(Tensor input) -> Tensor")  # [N, C, H, W] -> [ceil(N / 16), C, H, W, 16]
library.define("from_blocks(Tensor input, SymInt batch) -> Tensor")  # and back
library.define(
    "blocked_norm("  # batch normalisation by the batch's own statistics, then + residual, then ReLU
    "Tensor input, "  # [ceil(N / 16), C, H, W, 16]
    "SymInt batch, "  # N
    "Tensor weight, Tensor bias, "  # [C]
    "float eps, "
    "Tensor? residual=None, "  # shape of the input
    "bool relu=False"
    ") -> (Tensor output, Tensor mean, Tensor var)"  # [C], var biased
)
library.define(
    "blocked_norm_backward("
    "Tensor grad, Tensor input, SymInt batch, Tensor weight, float eps, Tensor mean, Tensor var, "
    "Tensor? output, "  # given: where it is not above 0, the gradient stops (ReLU)
    "bool residual"  # is its gradient needed? else it comes back empty
    ") -> (Tensor input, Tensor weight, Tensor bias, Tensor residual)"
)


def to_blocks_reference(input: Tensor) -> Tensor:
    """What drive::to_blocks means, in plain PyTorch."""
    padded = F.pad(input, (0, 0, 0, 0, 0, 0, 0, -input.shape[0] % LANES))
    blocks: Tensor = padded.view(padded.shape[0] // LANES, LANES, *padded.shape[1:])
    return blocks.permute(0, 2, 3, 4, 1).contiguous()


def from_blocks_reference(input: Tensor, batch: int) -> Tensor:
    """What drive::from_blocks means, in plain PyTorch."""
    return input.permute(0, 4, 1, 2, 3).flatten(0, 1)[:batch].contiguous()


def norm_reference(
    input: Tensor,
    batch: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What drive::blocked_norm means, in plain PyTorch."""
    plain = from_blocks_reference(input, batch)
    output = to_blocks_reference(F.batch_norm(plain, None, None, weight, bias, training=True, eps=eps))
    if residual is not None:
        output = output + residual
    var, mean = torch.var_mean(plain, (0, 2, 3), correction=0)
    return output.relu() if relu else output, mean, var


def norm_backward_reference(
    grad: Tensor,
    input: Tensor,
    batch: int,
    weight: Tensor,
    eps: float,
    mean: Tensor,
    var: Tensor,
    output: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What drive::blocked_norm_backward means, in plain PyTorch."""
    masked = grad if output is None else grad * (output > 0)
    plain = from_blocks_reference(masked, batch)
    found = torch.ops.aten.native_batch_norm_backward(
        plain, from_blocks_reference(input, batch), weight, None, None, mean, (var + eps).rsqrt(), True, eps,
        [True, True, True],
    )  # fmt: skip
    return (
        to_blocks_reference(found[0]),
        found[1],
        found[2],
        masked.clone() if residual else grad.new_empty(0),
    )


def _norm_fake(
    input: Tensor,
    batch: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = input.new_empty(input.shape[1])
    return input.new_empty(input.shape), mean, torch.empty_like(mean)


def _norm_backward_fake(
    grad: Tensor,
    input: Tensor,
    batch: int,
    weight: Tensor,
    eps: float,
    mean: Tensor,
    var: Tensor,
    output: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_weight = input.new_empty(input.shape[1])
    to_residual = input.new_empty(input.shape if residual else [0])
    return input.new_empty(input.shape), to_weight, torch.empty_like(to_weight), to_residual


def _to_blocks_fake(input: Tensor) -> Tensor:
    batch, *rest = input.shape
    return input.new_empty([(batch + LANES - 1) // LANES, *rest, LANES])


def _from_blocks_fake(input: Tensor, batch: int) -> Tensor:
    return input.new_empty([batch, *input.shape[1:-1]])


for _name, _fake, _reference in (
    ("to_blocks", _to_blocks_fake, to_blocks_reference),
    ("from_blocks", _from_blocks_fake, from_blocks_reference),
    ("blocked_norm", _norm_fake, norm_reference),
    ("blocked_norm_backward", _norm_backward_fake, norm_backward_reference),
):
    serve(_name, _fake, _reference)

# Their gradients are registered in csrc/sparse/ops.cpp.

# Under autocast computed in float32, as all sparse ops (conv.py).
for _name in ("to_blocks", "blocked_norm"):
    torch.library.register_autocast(f"drive::{_name}", "cpu", torch.float32, lib=library)
