"""The masked ops by the products of masked_products.py: how a layer becomes launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from drive_kernels.launching import launch_kernel

from . import masked
from .masked import Found, Gradients
from .masked_products import convolve, correlate


class Tuning(NamedTuple):
    """Sizes, each with its reason."""

    least: int = 16  # of a side of a tile: what tl.dot takes
    # At most, of the sides of a tile. rows and inner in bytes, so that a tile of float32, which CUDA cores
    # multiply out of registers, has half the rows: 128 x 32 half floats, 64 x 16 of float32.
    rows: int = 256
    inner: int = 64
    columns: int = 64
    warps: int = 8  # with 4, tiles of weights that are not channels_last spill registers
    band: int = 8  # rows of tiles that programs go through together: their tiles of P stay in cache
    programs: int = 256  # of correlate, if there are pixels for them: for every multiprocessor of any GPU
    least_pixels: int = 512  # of a piece: far more to multiply than to write
    narrow: int = 1 << 30  # offsets below are int32, which leaves as much for what tiles reach beyond


TUNING = Tuning()


class Convolution(NamedTuple):
    """What all three products have in common."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def constants(self, weight: Tensor, tensors: Sequence[Tensor]) -> dict[str, Any]:
        full_precision = torch.backends.cuda.matmul.fp32_precision != "tf32"
        return {
            "KERNEL": tuple(weight.shape[2:]),
            "STRIDE": tuple(self.stride),
            "PADDING": tuple(self.padding),
            "DILATION": tuple(self.dilation),
            "WIDE": any(_reach(t) >= TUNING.narrow for t in tensors),
            "PRECISION": "ieee" if full_precision else "tf32",
            "INNER": TUNING.inner // weight.element_size(),
            "num_warps": TUNING.warps,
            "enable_fp_fusion": True,  # sums of float32 products
        }


LINEAR = Convolution((1, 1), (0, 0), (1, 1), 1)


def _reach(tensor: Tensor) -> int:
    """The offset of a tensor's last entry."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _side(size: int, most: int) -> int:
    """Of a tile: no larger than it must be."""
    return int(min(max(triton.next_power_of_2(size), TUNING.least), most))


def _side_by_side(images: Tensor) -> Tensor:
    """With a stride of 1 between channels, for wide loads: of NCHW, a copy."""
    if images.stride(1) == 1:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _bits(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _convolve(
    source: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    target: Tensor,
    convolution: Convolution,
    transposed: bool,
) -> None:
    source = _side_by_side(source)
    rows = target.shape[0] * target.shape[2] * target.shape[3]
    inner, columns = source.shape[1] // convolution.groups, target.shape[1] // convolution.groups
    tile = _side(rows, TUNING.rows // weight.element_size()), _side(columns, TUNING.columns)
    programs = triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]) * convolution.groups
    with torch.cuda.device_of(source):
        launch_kernel(
            convolve, (programs,),
            source=source, source_strides=source.stride(), source_plane=tuple(source.shape[2:]),
            weight=weight, weight_strides=weight.stride(), mask=_bits(mask), mask_strides=mask.stride(),
            bias=None if bias is None else bias.contiguous(),
            target=target, target_strides=target.stride(), target_plane=tuple(target.shape[2:]),
            rows=rows, inner=inner, columns=columns,
            TRANSPOSED=transposed, BAND=TUNING.band, ROWS=tile[0], COLUMNS=tile[1],
            **convolution.constants(weight, (source, weight, mask, target)),
        )  # fmt: skip


def _correlate(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    to_weight: Tensor | None,
    to_mask: Tensor | None,
    convolution: Convolution,
) -> None:
    grad, input = _side_by_side(grad), _side_by_side(input)
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    outputs, channels = weight.shape[0] // convolution.groups, weight.shape[1]
    tile = _side(outputs, TUNING.rows // weight.element_size()), _side(channels, TUNING.columns)
    programs = triton.cdiv(outputs, tile[0]) * triton.cdiv(channels, tile[1])
    programs *= convolution.groups * weight.shape[2] * weight.shape[3]
    at_most = min(TUNING.programs // max(programs, 1), pixels // TUNING.least_pixels)
    constants = convolution.constants(weight, (grad, input, weight, mask))
    pixels_a_piece = triton.cdiv(pixels, max(at_most, 1) * constants["INNER"]) * constants["INNER"]
    count = max(triton.cdiv(pixels, max(pixels_a_piece, 1)), 1)
    pieces = None
    if count > 1:
        pieces = weight.new_empty(count, *weight.shape, dtype=torch.float32).permute(1, 2, 3, 4, 0)
    direct = [None if pieces is not None else t for t in (to_weight, to_mask)]
    with torch.cuda.device_of(grad):
        launch_kernel(
            correlate, (programs, count),
            grad=grad, grad_strides=grad.stride(), grad_plane=tuple(grad.shape[2:]),
            input=input, input_strides=input.stride(), input_plane=tuple(input.shape[2:]),
            weight=weight, weight_strides=weight.stride(), mask=_bits(mask), mask_strides=mask.stride(),
            to_weight=direct[0], to_weight_strides=_strides(direct[0]),
            to_mask=direct[1], to_mask_strides=_strides(direct[1]),
            pieces=pieces, piece_strides=_strides(pieces), pixels_a_piece=pixels_a_piece,
            pixels=pixels, outputs=outputs, channels=channels, ROWS=tile[0], COLUMNS=tile[1], **constants,
        )  # fmt: skip
    if pieces is not None:
        masked.fill_from_product(to_weight, to_mask, pieces.sum(-1), weight, mask)


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _images(tensor: Tensor) -> Tensor:
    """[N, C] as images of one pixel."""
    return tensor[:, :, None, None]


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor, found: Found, convolution: Convolution
) -> None:
    """Writes those of the four gradients that are there."""
    to_input, to_weight, to_mask, to_bias = found
    grad = _side_by_side(grad)  # once for all of them
    if to_input is not None:
        _convolve(grad, weight, mask, None, to_input, convolution, transposed=True)
    if to_weight is not None or to_mask is not None:
        _correlate(grad, input, weight, mask, to_weight, to_mask, convolution)
    if to_bias is not None:
        torch.sum(grad, (0, 2, 3), out=to_bias)


# Triton before 3.8 takes float32 that went through a bool mask for something narrower: on the tensor cores of
# sm_100 and sm_110 it rounds such products to TF32, whatever it is told.
ROUNDS = tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 8)


def _left_to_reference(input: Tensor, mask: Tensor) -> bool:
    if input.dtype != torch.float32 or mask.dtype != torch.bool or not ROUNDS or not input.is_cuda:
        return input.dtype == torch.float64
    full_precision = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return full_precision and torch.cuda.get_device_capability(input.device)[0] in (10, 11)


def masked_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """drive::masked_linear for tensors on one GPU; for tensors on the CPU in Triton's interpreter."""
    if _left_to_reference(input, mask):
        return masked.linear_reference(input, weight, mask, bias)
    output = input.new_empty(masked.linear_size(input, weight, mask, bias))
    source, weight, mask, target = (_images(masked.matrix(t)) for t in (input, weight, mask, output))
    _convolve(source, weight, mask, bias, target, LINEAR, transposed=False)
    return output


def masked_linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor, needed: Sequence[bool]
) -> Gradients:
    """drive::masked_linear_backward, likewise."""
    if _left_to_reference(input, mask):
        return masked.linear_backward_reference(grad, input, weight, mask, needed)
    masked.check_linear_grad(grad, input, weight, mask)
    found = masked.empty_gradients(input, weight, mask, needed)
    grad, input, weight, mask = (_images(masked.matrix(t)) for t in (grad, input, weight, mask))
    to_input, to_weight, to_mask = (None if t is None else _images(masked.matrix(t)) for t in found[:3])
    _backward(grad, input, weight, mask, (to_input, to_weight, to_mask, found[3]), LINEAR)
    return masked.returned(found, input)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """drive::masked_conv2d, likewise."""
    options = (stride, padding, dilation, groups)
    if _left_to_reference(input, mask):
        return masked.conv2d_reference(input, weight, mask, bias, *options)
    output = masked.empty_images(input, masked.conv2d_size(input, weight, mask, *options, bias))
    _convolve(input, weight, mask, bias, output, Convolution(*options), transposed=False)
    return output


def masked_conv2d_backward(
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
    """drive::masked_conv2d_backward, likewise."""
    options = (stride, padding, dilation, groups)
    if _left_to_reference(input, mask):
        return masked.conv2d_backward_reference(grad, input, weight, mask, *options, needed)
    masked.check_conv2d_grad(grad, input, weight, mask, *options)
    found = masked.empty_gradients(input, weight, mask, needed)
    _backward(grad, input, weight, mask, found, Convolution(*options))
    return masked.returned(found, input)
