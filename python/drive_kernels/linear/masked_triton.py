"""The masked ops in Triton: a tile of the weight goes through its mask when it is loaded, for every product.

Everything is a convolution: a linear layer is one of 1x1 over planes of one pixel. It goes as a product of
matrices that are never in memory either (implicit GEMM): rows are pixels, `inner` and `columns` channels of
one group, and the taps (ky, kx) of the kernel an inner dimension more.

    convolve               out[pixel, o] = bias[o] + sum over tap, c of in[pixel at tap, c] * P[o, c, tap]
    convolve, TRANSPOSED   dL/din[pixel, c] = sum over tap, o of grad[pixel at tap, o] * P[o, c, tap]
    correlate              dL/dP[o, c, tap] = sum over pixels of grad[pixel, o] * in[pixel at tap, c]

Sums are in float32; P is rounded to the weight's dtype, as it would be in memory, and dL/dP not at all.
float32 is multiplied as IEEE says, on CUDA cores, unless PyTorch was told to use tf32 in its own products.

Any strides will do. Images whose channels do not lie side by side are copied to channels_last, since single
half floats cannot be loaded ahead, behind the products (cp.async moves 4 bytes at least); weights and masks
are read as they lie. dL/dP goes through the mask where its product ends. Where it has few tiles and many
pixels, which would leave multiprocessors idle, it is made in pieces along the pixels, summed afterwards:
every result is the same each time.

What costs as much as if it were not 0: tiles of P without a survivor, since loads behind a branch are not
made ahead either; groups of less than 16 channels, which fill tiles of 16; to_input at a stride, where most
taps fall between the pixels of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from drive_kernels.launching import launch_kernel

from . import masked
from .masked import Found, Gradients


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

# ---- Kernels. Strides are those of [N, C, H, W] or [O, C, kh, kw], taps (ky, kx), other pairs (y, x) ----


@triton.jit
def coordinate(
    at, tap, size,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Where in its source a pixel finds a tap, in one dimension, and whether there is such a place."""
    if TRANSPOSED:
        shifted = at + PADDING - tap * DILATION
        return shifted // STRIDE, (shifted >= 0) & (shifted % STRIDE == 0) & (shifted < size * STRIDE)
    else:
        found = at * STRIDE - PADDING + tap * DILATION
        return found, (found >= 0) & (found < size)


@triton.jit
def split(row, plane):
    """Image, y and x of a pixel."""
    return row // (plane[0] * plane[1]), row // plane[1] % plane[0], row % plane[1]


@triton.jit
def locate(
    row, tap, plane, source_plane, strides,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Offsets of the source pixels that these pixels find at a tap, and which of them there are."""
    n, y, x = split(row, plane)
    y, there_y = coordinate(
        y, tap // KERNEL[1], source_plane[0], STRIDE[0], PADDING[0], DILATION[0], TRANSPOSED
    )
    x, there_x = coordinate(
        x, tap % KERNEL[1], source_plane[1], STRIDE[1], PADDING[1], DILATION[1], TRANSPOSED
    )
    return n * strides[0] + y * strides[2] + x * strides[3], there_y & there_x


@triton.jit
def pixel_offsets(row, plane, strides):
    n, y, x = split(row, plane)
    return n * strides[0] + y * strides[2] + x * strides[3]


@triton.jit
def entries(tensor, strides, first, second, tap, KERNEL: tl.constexpr, DIM: tl.constexpr):
    """Addresses of a tile at a tap of the weight, or of what is like it; `first` goes along DIM."""
    at_tap = tensor + (tap // KERNEL[1]) * strides[2] + (tap % KERNEL[1]) * strides[3]
    return at_tap + ((first * strides[DIM])[:, None] + (second * strides[1 - DIM])[None, :])


@triton.jit
def through(mask, value, inside):
    """value * mask, in float32 unless the mask is bool."""
    m = tl.load(mask, mask=inside, other=0)
    if m.dtype == tl.uint8:
        return tl.where(m != 0, value, 0.0)
    else:
        return value.to(tl.float32) * m.to(tl.float32)


@triton.jit
def convolve(
    source, source_strides, source_plane,
    weight, weight_strides, mask, mask_strides, bias,
    target, target_strides, target_plane,
    rows, inner, columns,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BAND: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a tile [ROWS, COLUMNS] of the target, in one group."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    INNER_DIM: tl.constexpr = 0 if TRANSPOSED else 1  # of the weight
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    group = (tl.program_id(0) // (row_tiles * column_tiles)).to(OFFSET)
    row_tile, column_tile = tl.swizzle2d(
        tile // column_tiles, tile % column_tiles, row_tiles, column_tiles, BAND
    )
    row = row_tile.to(OFFSET) * ROWS + tl.arange(0, ROWS)
    column = column_tile.to(OFFSET) * COLUMNS + tl.arange(0, COLUMNS)
    outputs = inner if TRANSPOSED else columns
    source += group * inner * source_strides[1]
    weight += group * outputs * weight_strides[0]
    mask += group * outputs * mask_strides[0]

    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    # One loop, not nested ones, so that the loads of any step overlap the products before. Taps change first:
    # what they have in common is in cache.
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    for step in range(TAPS * tl.cdiv(inner, INNER)):
        tap = step % TAPS
        k = step // TAPS * INNER + tl.arange(0, INNER).to(OFFSET)
        pixel, there = locate(
            row, tap, target_plane, source_plane, source_strides,
            KERNEL, STRIDE, PADDING, DILATION, TRANSPOSED,
        )  # fmt: skip
        a = tl.load(
            source + pixel[:, None] + (k * source_strides[1])[None, :],
            mask=(there & (row < rows))[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        inside = (k < inner)[:, None] & (column < columns)[None, :]
        w = tl.load(
            entries(weight, weight_strides, k, column, tap, KERNEL, INNER_DIM), mask=inside, other=0.0
        )
        p = through(entries(mask, mask_strides, k, column, tap, KERNEL, INNER_DIM), w, inside)
        sums = tl.dot(a, p.to(w.dtype), sums, input_precision=PRECISION)

    channel = group * columns + column
    if bias is not None:
        sums += tl.load(bias + channel, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    pixel = pixel_offsets(row, target_plane, target_strides)
    tl.store(
        target + pixel[:, None] + (channel * target_strides[1])[None, :],
        sums.to(target.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


@triton.jit
def correlate(
    grad, grad_strides, grad_plane,
    input, input_strides, input_plane,
    weight, weight_strides, mask, mask_strides,
    to_weight, to_weight_strides, to_mask, to_mask_strides,
    pieces, piece_strides, pixels_a_piece,
    pixels, outputs, channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a tile [ROWS, COLUMNS] of dL/dP, at one tap in one group: all of it, or a piece."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    program = tl.program_id(0)
    column_tiles = tl.cdiv(channels, COLUMNS)
    column = (program % column_tiles).to(OFFSET) * COLUMNS + tl.arange(0, COLUMNS)
    program //= column_tiles
    tap = program % TAPS
    program //= TAPS
    row_tiles = tl.cdiv(outputs, ROWS)
    row = (program % row_tiles).to(OFFSET) * ROWS + tl.arange(0, ROWS)
    group = (program // row_tiles).to(OFFSET)
    piece = tl.program_id(1).to(OFFSET)
    o, c = group * outputs + row, group * channels + column

    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = piece * pixels_a_piece
    for first in range(begin, tl.minimum(begin + pixels_a_piece, pixels), INNER):
        k = first + tl.arange(0, INNER)
        g = tl.load(
            grad + (o * grad_strides[1])[:, None] + pixel_offsets(k, grad_plane, grad_strides)[None, :],
            mask=(row < outputs)[:, None] & (k < pixels)[None, :],
            other=0.0,
        )
        pixel, there = locate(
            k, tap, grad_plane, input_plane, input_strides, KERNEL, STRIDE, PADDING, DILATION, False
        )
        x = tl.load(
            input + pixel[:, None] + (c * input_strides[1])[None, :],
            mask=(there & (k < pixels))[:, None] & (column < channels)[None, :],
            other=0.0,
        )
        sums = tl.dot(g, x, sums, input_precision=PRECISION)

    inside = (row < outputs)[:, None] & (column < channels)[None, :]
    if pieces is not None:
        at = entries(pieces, piece_strides, o, column, tap, KERNEL, 0)
        tl.store(at + piece * piece_strides[4], sums, mask=inside)
    if to_weight is not None:
        product = through(entries(mask, mask_strides, o, column, tap, KERNEL, 0), sums, inside)
        at = entries(to_weight, to_weight_strides, o, column, tap, KERNEL, 0)
        tl.store(at, product.to(to_weight.dtype.element_ty), mask=inside)
    if to_mask is not None:
        w = tl.load(entries(weight, weight_strides, o, column, tap, KERNEL, 0), mask=inside, other=0.0)
        at = entries(to_mask, to_mask_strides, o, column, tap, KERNEL, 0)
        tl.store(at, (sums * w.to(tl.float32)).to(to_mask.dtype.element_ty), mask=inside)


# ---- Launchers ----


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
