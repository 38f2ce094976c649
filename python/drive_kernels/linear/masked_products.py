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

import triton
import triton.language as tl

# Strides are those of [N, C, H, W] or [O, C, kh, kw], taps (ky, kx), other pairs (y, x).


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
