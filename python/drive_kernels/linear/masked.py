"""drive::masked_linear, drive::masked_conv2d - dense layers that apply a mask as they load their weight.

For masks that still change, that are learned, or whose gradient is wanted: the weight stays dense.

    P = weight where a bool mask is True, else 0; or weight * mask, in the weight's dtype
    linear   out[n, o] = bias[o] + sum over i of in[n, i] * P[o, i]
    conv2d   out[n, o, y, x] = bias[o] + sum over c, ky, kx of in[n, c, y', x'] * P[o, c, ky, kx]

    dL/dweight = mask * dL/dP      dL/dmask = weight * dL/dP, of masks of the weight's dtype

A convolution's output and gradient to its input are channels_last where its input is. The gradients to
weight and mask are laid out as these are.
The Triton kernels never have P in memory; the references do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.library import library, serve

library.define(
    "masked_linear("
    "Tensor input, "  # [..., I]; float32, bfloat16, float16, float64
    "Tensor weight, "  # [O, I], input's dtype
    "Tensor mask, "  # [O, I], bool or weight's dtype
    "Tensor? bias"  # [O]
    ") -> Tensor"  # [..., O]
)
library.define(
    "masked_linear_backward("
    "Tensor grad, Tensor input, Tensor weight, Tensor mask, "
    "bool[4] needed"  # which of the gradients: input, weight, mask, bias; the others come back empty
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "masked_conv2d("
    "Tensor input, "  # [N, C, H, W]
    "Tensor weight, "  # [O, C / groups, kh, kw]
    "Tensor mask, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups"
    ") -> Tensor"  # [N, O, H', W']
)
library.define(
    "masked_conv2d_backward("
    "Tensor grad, Tensor input, Tensor weight, Tensor mask, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool[4] needed"
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ---- What the arguments must be: kernels see addresses only ----


def _check(op: str, input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
    if input.dtype not in FLOATS:
        raise TypeError(f"{op}: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    if weight.dtype != input.dtype:
        raise TypeError(f"{op}: weight must be {input.dtype}, as input is, got {weight.dtype}")
    if mask.dtype not in (torch.bool, weight.dtype):
        raise TypeError(f"{op}: mask must be torch.bool or {weight.dtype}, got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(f"{op}: mask must have shape {list(weight.shape)}, got {list(mask.shape)}")
    if bias is not None:
        if bias.dtype != input.dtype:
            raise TypeError(f"{op}: bias must be {input.dtype}, as input is, got {bias.dtype}")
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{op}: bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("mask", mask), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} must be on {input.device}, as input is, got {tensor.device}")


def _check_grad(op: str, grad: Tensor, input: Tensor, size: list[int]) -> None:
    if list(grad.shape) != size:
        raise ValueError(f"{op}: grad must have shape {size}, got {list(grad.shape)}")
    if grad.dtype != input.dtype:
        raise TypeError(f"{op}: grad must be {input.dtype}, as input is, got {grad.dtype}")
    if grad.device != input.device:
        raise ValueError(f"{op}: grad must be on {input.device}, as input is, got {grad.device}")


def linear_size(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> list[int]:
    """The output's, once the arguments are found to fit together."""
    op = "drive::masked_linear"
    _check(op, input, weight, mask, bias)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [O, I], got {list(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: input must be [..., {weight.shape[1]}], got {list(input.shape)}")
    return [*input.shape[:-1], weight.shape[0]]


def conv2d_size(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
) -> list[int]:
    """The output's, once the arguments are found to fit together."""
    op = "drive::masked_conv2d"
    _check(op, input, weight, mask, bias)
    if weight.dim() != 4 or 0 in weight.shape[2:]:
        raise ValueError(f"{op}: weight must be [O, C / groups, kh, kw], got {list(weight.shape)}")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{op}: {name} must be two numbers >= {least}, got {list(pair)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide {weight.shape[0]} output channels, got {groups}")
    channels = weight.shape[1] * groups
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(f"{op}: input must be [N, {channels}, H, W], got {list(input.shape)}")
    kernel = [dilation[d] * (weight.shape[2 + d] - 1) + 1 for d in range(2)]
    padded = [input.shape[2 + d] + 2 * padding[d] for d in range(2)]
    if padded[0] < kernel[0] or padded[1] < kernel[1]:
        raise ValueError(f"{op}: padded input must be no smaller than the kernel, {kernel}, got {padded}")
    plane = [(padded[d] - kernel[d]) // stride[d] + 1 for d in range(2)]
    return [input.shape[0], weight.shape[0], *plane]


def check_linear_grad(grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor) -> None:
    _check_grad("drive::masked_linear_backward", grad, input, linear_size(input, weight, mask))


def check_conv2d_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    size = conv2d_size(input, weight, mask, stride, padding, dilation, groups)
    _check_grad("drive::masked_conv2d_backward", grad, input, size)


# ---- What comes back ----

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # to input, weight, mask and bias
Found = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # None: not needed


def matrix(tensor: Tensor) -> Tensor:
    """[..., I] as [N, I]; a view, if the tensor is contiguous or has two dimensions."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def empty_images(input: Tensor, size: Sequence[int]) -> Tensor:
    """channels_last if the input is."""
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


def empty_gradients(input: Tensor, weight: Tensor, mask: Tensor, needed: Sequence[bool]) -> Found:
    linear = weight.dim() == 2
    return (
        (input.new_empty(input.shape) if linear else empty_images(input, input.shape)) if needed[0] else None,
        torch.empty_like(weight) if needed[1] else None,
        torch.empty_like(mask) if needed[2] else None,
        weight.new_empty(weight.shape[0]) if needed[3] else None,
    )


def returned(found: Found, input: Tensor) -> Gradients:
    """An op returns tensors: those that are not needed, empty."""
    to_input, to_weight, to_mask, to_bias = (input.new_empty(0) if t is None else t for t in found)
    return to_input, to_weight, to_mask, to_bias


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """P."""
    return weight.masked_fill(~mask, 0) if mask.dtype == torch.bool else weight * mask


def fill_from_product(
    to_weight: Tensor | None, to_mask: Tensor | None, product: Tensor, weight: Tensor, mask: Tensor
) -> None:
    """Writes the gradients to weight and mask, given product = dL/dP."""
    if to_weight is not None:
        to_weight.copy_(masked_weight(product, mask))
    if to_mask is not None:
        to_mask.copy_(product * weight)


# ---- References ----


def linear_reference(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """What drive::masked_linear means, in plain PyTorch."""
    linear_size(input, weight, mask, bias)
    return F.linear(input, masked_weight(weight, mask), bias).contiguous()


def linear_backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor, needed: Sequence[bool]
) -> Gradients:
    """What drive::masked_linear_backward means, in plain PyTorch."""
    check_linear_grad(grad, input, weight, mask)
    found = empty_gradients(input, weight, mask, needed)
    to_input, to_weight, to_mask, to_bias = found
    if to_input is not None:
        to_input.copy_(grad @ masked_weight(weight, mask))
    if to_weight is not None or to_mask is not None:
        fill_from_product(to_weight, to_mask, matrix(grad).t() @ matrix(input), weight, mask)
    if to_bias is not None:
        to_bias.copy_(matrix(grad).sum(0))
    return returned(found, input)


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """What drive::masked_conv2d means, in plain PyTorch."""
    size = conv2d_size(input, weight, mask, stride, padding, dilation, groups, bias)
    options = list(stride), list(padding), list(dilation), groups
    return empty_images(input, size).copy_(F.conv2d(input, masked_weight(weight, mask), bias, *options))


def conv2d_backward_reference(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> Gradients:
    """What drive::masked_conv2d_backward means, in plain PyTorch."""
    check_conv2d_grad(grad, input, weight, mask, stride, padding, dilation, groups)
    found = empty_gradients(input, weight, mask, needed)
    to_input, to_weight, to_mask, to_bias = found
    dx, product, db = torch.ops.aten.convolution_backward(
        grad, input, masked_weight(weight, mask), [weight.shape[0]], list(stride), list(padding),
        list(dilation), False, [0, 0], groups, [needed[0], needed[1] or needed[2], needed[3]],
    )  # fmt: skip
    if to_input is not None:
        to_input.copy_(dx)
    fill_from_product(to_weight, to_mask, product, weight, mask)
    if to_bias is not None:
        to_bias.copy_(db)
    return returned(found, input)


# ---- Shapes alone ----


def _linear_fake(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(linear_size(input, weight, mask, bias))


def _linear_backward_fake(
    grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor, needed: Sequence[bool]
) -> Gradients:
    check_linear_grad(grad, input, weight, mask)
    return returned(empty_gradients(input, weight, mask, needed), input)


def _conv2d_fake(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return empty_images(input, conv2d_size(input, weight, mask, stride, padding, dilation, groups, bias))


def _conv2d_backward_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> Gradients:
    check_conv2d_grad(grad, input, weight, mask, stride, padding, dilation, groups)
    return returned(empty_gradients(input, weight, mask, needed), input)


# ---- Autograd ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[4:]  # of a convolution


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _found(ctx, torch.ops.drive.masked_linear_backward, grad)


def _conv2d_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _found(ctx, torch.ops.drive.masked_conv2d_backward, grad)


def _found(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:4])
    found = backward(grad, *ctx.saved_tensors, *ctx.options, needed)
    return (*(g if n else None for g, n in zip(found, needed, strict=True)), *[None] * len(ctx.options))


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "masked_linear": (_linear_fake, linear_reference),
    "masked_linear_backward": (_linear_backward_fake, linear_backward_reference),
    "masked_conv2d": (_conv2d_fake, conv2d_reference),
    "masked_conv2d_backward": (_conv2d_backward_fake, conv2d_backward_reference),
}
for _name, (_fake, _reference) in OPS.items():
    serve(_name, _fake, _reference)

torch.library.register_autograd("drive::masked_linear", _linear_autograd, setup_context=_setup, lib=library)
torch.library.register_autograd("drive::masked_conv2d", _conv2d_autograd, setup_context=_setup, lib=library)
