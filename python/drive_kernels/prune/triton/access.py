"""Entries of any dtype and strides, and their keys: 1 + the bits of |score|, as in csrc/prune/key.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import (
    BFLOAT16,
    DIM,
    DTYPE,
    FIRST_CHUNK,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GRAD,
    GRAD_SCALE,
    HEADER,
    LOGICAL_WALK,
    MASK,
    MASK_GRAD,
    NUMEL,
    PRODUCT_SCALE,
    ROW,
    TOP32,
    TOP64,
    WALK,
    WEIGHT,
)


@triton.jit
def key_of(score):
    """1 + the bits of |score|: integers in the order of the scores. 0 is for what was pruned before."""
    if score.dtype == tl.float64:
        return (score.to(tl.uint64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) + 1
    else:
        return (score.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) + 1


@triton.jit
def loaded_keys(keys):
    """Memory holds them as signed integers, which PyTorch can sort; they differ for one NaN only."""
    return keys.to(tl.uint64 if keys.dtype == tl.int64 else tl.uint32, bitcast=True)


@triton.jit
def score_of(key):
    """float64 |score| of a key other than 0."""
    if key.dtype == tl.uint64:
        return (key - 1).to(tl.float64, bitcast=True)
    else:
        return (key - 1).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def top_of(key):
    """Above the key of every finite score."""
    if key.dtype == tl.uint64:
        return TOP64
    else:
        return TOP32


@triton.jit
def widened(x, WIDE: tl.constexpr):
    """Entries as float32 or float64, exactly; those of bfloat16 come as the upper halves of float32s."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64 if WIDE else tl.float32)


@triton.jit
def vector(row, OPERAND: tl.constexpr, T: tl.constexpr):
    """A plain item's operand, to be read and written 16 bytes at a time."""
    return tl.multiple_of(tl.load(row + OPERAND).to(tl.pointer_type(T)), 16)


@triton.jit
def scale_of(row, FIELD: tl.constexpr, WIDE: tl.constexpr):
    return widened(tl.load(row + FIELD).to(tl.int32).to(tl.float32, bitcast=True), WIDE)


@triton.jit
def product(row, w, g, WIDE: tl.constexpr, COSTED: tl.constexpr):
    """w * g, one of which is scaled: g or the product. The other's scale is 1, which changes no bit."""
    if COSTED:
        g *= scale_of(row, GRAD_SCALE, WIDE)
    score = w * g
    if COSTED:
        score *= scale_of(row, PRODUCT_SCALE, WIDE)
    return score


@triton.jit
def score_as(row, position, T: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr):
    """Scores of a plain chunk of one dtype."""
    w = widened(tl.load(vector(row, WEIGHT, T) + position), WIDE)
    g = widened(tl.load(vector(row, GRAD, T) + position), WIDE)
    if WIDE and tl.load(row + MASK_GRAD) != 0:
        w *= widened(tl.load(vector(row, MASK_GRAD, T) + position), WIDE)
    return product(row, w, g, WIDE, COSTED)


@triton.jit
def scores(row, position, WIDE: tl.constexpr, COSTED: tl.constexpr):
    """Scores of a plain chunk."""
    dtype = tl.load(row + DTYPE)
    if dtype == FLOAT32:
        score = score_as(row, position, tl.float32, WIDE, COSTED)
    elif dtype == BFLOAT16:
        score = score_as(row, position, tl.int16, WIDE, COSTED)
    elif not WIDE or dtype == FLOAT16:
        score = score_as(row, position, tl.float16, WIDE, COSTED)
    else:
        score = score_as(row, position, tl.float64, WIDE, COSTED)
    return score


@triton.jit
def zero_as(row, begin, keep, T: tl.constexpr, BLOCK: tl.constexpr):
    """`zero_lost` for weights of one size."""
    V: tl.constexpr = 128 // T.primitive_bitwidth
    vectors = tl.arange(0, BLOCK // V)[:, None] * V + tl.arange(0, V)[None, :]
    at = vector(row, WEIGHT, T) + begin + vectors
    w = tl.load(at)
    stays = tl.where(tl.reshape(keep, [BLOCK // V, V]), w, 0)
    changes = tl.max((stays != w).to(tl.int32), 1, keep_dims=True)
    tl.store(at, stays, mask=tl.broadcast_to(changes, [BLOCK // V, V]) != 0)


@triton.jit
def zero_lost(row, begin, keep, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Sets what a plain chunk loses to zero, in those vectors of 16 bytes that change by it. For that weights
    are integers: -0.0 changes."""
    dtype = tl.load(row + DTYPE)
    if dtype == FLOAT32:
        zero_as(row, begin, keep, tl.int32, BLOCK)
    elif not WIDE or dtype != FLOAT64:
        zero_as(row, begin, keep, tl.int16, BLOCK)
    else:
        zero_as(row, begin, keep, tl.int64, BLOCK)


@triton.jit
def mask_of(row):
    """A plain item's mask, to be read and written 4 bytes at a time: masks may share one piece of memory."""
    return tl.multiple_of(tl.load(row + MASK).to(tl.pointer_type(tl.int8)), 4)


@triton.jit
def plain_chunk(
    row, begin, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr
):
    """Keys of a plain chunk: whole, and of operands that lie in memory without gaps in the order of the
    item's walk, at addresses for vectors."""
    position = begin + tl.arange(0, BLOCK)
    if FRESH:
        keys = key_of(scores(row, position, WIDE, COSTED))
    else:
        alive = tl.load(mask_of(row) + position)  # first, so that it does not wait for the others
        keys = tl.where(alive != 0, key_of(scores(row, position, WIDE, COSTED)), 0)
    return keys


@triton.jit
def gather_as(address, at, where, T: tl.constexpr, WIDE: tl.constexpr):
    return widened(tl.load(address.to(tl.pointer_type(T)) + at, mask=where, other=0), WIDE)


@triton.jit
def gather(address, dtype, at, where, WIDE: tl.constexpr):
    """Entries of any dtype; 0 where not `where`. address: [] or [BLOCK], the rest: [BLOCK]."""
    x = gather_as(address, at, where & (dtype == FLOAT32), tl.float32, WIDE)
    x += gather_as(address, at, where & (dtype == BFLOAT16), tl.int16, WIDE)
    x += gather_as(address, at, where & (dtype == FLOAT16), tl.float16, WIDE)
    if WIDE:
        x += gather_as(address, at, where & (dtype == FLOAT64), tl.float64, WIDE)
    return x


@triton.jit
def scatter_zeros(address, dtype, at, where):
    """Writes 0 to entries of any dtype. dtype, at, where: [BLOCK]."""
    zero = tl.zeros_like(at)
    size = tl.where(dtype == FLOAT32, 4, tl.where(dtype == FLOAT64, 8, 2))
    tl.store(address.to(tl.pointer_type(tl.int16)) + at, zero.to(tl.int16), mask=where & (size == 2))
    tl.store(address.to(tl.pointer_type(tl.int32)) + at, zero.to(tl.int32), mask=where & (size == 4))
    tl.store(address.to(tl.pointer_type(tl.int64)) + at, zero, mask=where & (size == 8))


@triton.jit
def offsets(walk, dims, most, position):
    """Where entries [BLOCK] lie in weight, gradient, mask and mask gradient. walk, dims: [] or [BLOCK];
    most: the most dims of any of them."""
    w = tl.zeros_like(position)
    g = w
    m = w
    mg = w
    for d in range(most):
        dim = walk + d * DIM
        has = d < dims
        index = position
        if d < most - 1:  # nothing is left to divide in the outermost one
            size = tl.load(dim, mask=has, other=1)
            index = position % size
            position = position // size
        w += index * tl.load(dim + 1, mask=has, other=0)
        g += index * tl.load(dim + 2, mask=has, other=0)
        m += index * tl.load(dim + 3, mask=has, other=0)
        mg += index * tl.load(dim + 4, mask=has, other=0)
    return w, g, m, mg


@triton.jit
def gather_keys(
    row, walk, dims, most, position, inside,
    FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """Keys of entries wherever they lie; 0 where not `inside`. row, walk, dims: [] or [BLOCK]."""
    w_at, g_at, m_at, mg_at = offsets(walk, dims, most, position)
    each = tl.zeros_like(position)
    dtype = tl.load(row + DTYPE) + each
    alive = inside
    if not FRESH:
        alive = tl.load(tl.load(row + MASK).to(tl.pointer_type(tl.int8)) + m_at, mask=inside, other=0) != 0
    w = gather(tl.load(row + WEIGHT), dtype, w_at, inside, WIDE)
    if WIDE:
        mask_grad = tl.load(row + MASK_GRAD) + each
        factor = gather(mask_grad, dtype, mg_at, inside & (mask_grad != 0), WIDE)
        w *= tl.where(mask_grad != 0, factor, 1.0)
    g = gather(tl.load(row + GRAD), dtype, g_at, inside, WIDE)
    return tl.where(alive, key_of(product(row, w, g, WIDE, COSTED)), 0)


@triton.jit
def walk_of(table, row, logical):
    at = row + tl.where(logical, LOGICAL_WALK, WALK)
    return table + tl.load(at), tl.load(at + 1)


@triton.jit
def any_chunk(
    table, row, begin, logical,
    BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """Keys of any chunk, 0 beyond its end; `logical`: of the row-major order, not of the memory's."""
    position = begin + tl.arange(0, BLOCK)
    walk, dims = walk_of(table, row, logical)
    inside = position < tl.load(row + NUMEL)
    return gather_keys(row, walk, dims, dims, position, inside, FRESH, WIDE, COSTED)


@triton.jit
def row_of(table, item):
    return table + HEADER + item.to(tl.int64) * ROW


@triton.jit
def begin_of(row, chunk, BLOCK: tl.constexpr):
    """A chunk's first position in the walk of its item."""
    return (chunk - tl.load(row + FIRST_CHUNK)) * BLOCK
