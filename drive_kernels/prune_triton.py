"""drive::prune_ in Triton: for GPUs where the compiled kernels are missing.

The step of csrc/prune/prune.cpp without the host ever waiting: every kernel reads from device memory what it has
to do and returns early where that is nothing, so a step can be captured in a CUDA graph (after a first call,
which compiles). All tensors go through one work list of chunks.

  1. Sample: random keys, sorted, bracket the threshold, low <= T <= high (sample, bracket).
  2. Survey (reads theta, G and an old mask): per chunk, how many keys lie above, at and inside the bracket;
     those inside are listed. Also the sum of |S|, and the count of non-finite scores, which makes
     everything that follows a no-op (survey).
  3. Threshold T, the k-th largest key: the counts say whether it lies on an edge of the bracket, or inside,
     where radix selection among the listed keys finds it; or outside, or the list was too short, then the
     same goes through all entries (decide, count_digit, pick_digit).
  4. Ties: of the entries on the threshold those with the lowest global index, in row-major order, survive.
     They are counted by chunk; a running sum finds the chunk with the last survivor, a look at that chunk
     finds it (count_ties, locate, recount, cut).
  5. Apply (reads theta, G, old mask; writes theta, mask). All memory was taken before (apply, finish).

With min_keep, steps 3 and 4 come first for all tensors at once, through all entries: what they choose, the
guards, survives in any case, and the global selection is among the other entries.

Bytes an entry, float32: 8 + 8 read, 4 + 1 written, 2 more for an old mask. Scratch: 0.06 byte an entry for
the listed keys (0.13 for 64-bit ones), and 0.02 for the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch_kernel
from .prune import Outputs


class Tuning(NamedTuple):
    """Sizes, each with its reason."""

    chunk: int = 4096  # entries: 16 a thread and operand, which keeps 128 bytes a thread in flight
    plain_warps: int = 8  # 70 registers a thread for float32: three chunks at a time on a multiprocessor
    chunk_warps: int = 16  # of kernels that take any chunk: each entry needs four 64-bit offsets
    few_warps: int = 4  # of kernels that look at a few numbers only
    programs: int = 4096  # of kernels that seldom have work: they fill any GPU, and return soon
    # 5 sigma on both sides of the threshold put 4 % (k = n / 2) of the entries into a bracket of 2^14
    # samples, 1.4 % into one of 2^17: less than the list holds. Up to 2^14 entries, all are in the bracket.
    sigmas: float = 5.0
    small_sample: int = 1 << 14
    large_sample: int = 1 << 17
    large_from: int = (1 << 20) + 1  # entries
    samples_a_program: int = 512  # few, so that many programs share the cache misses
    entries_a_listed_key: int = 64
    least_listed: int = 1 << 16


TUNING = Tuning()

# ---- The table: one tensor of int64 with all that the kernels need to know. First its header ----

ITEMS = tl.constexpr(0)
ENTRIES = tl.constexpr(1)
CHUNKS = tl.constexpr(2)
PLAIN_CHUNKS = tl.constexpr(3)
KEEP = tl.constexpr(4)  # survivors wanted
MIN_KEEP = tl.constexpr(5)
GUARDED = tl.constexpr(6)  # entries that survive in any case because of min_keep
SQUARED = tl.constexpr(7)  # 1: |S| is the square of the score that is ranked, 0: it is that score
SAMPLES = tl.constexpr(8)
CAPACITY = tl.constexpr(9)  # of the list of keys inside the bracket
LISTED = tl.constexpr(10)  # keys that were to go there
SELECTION = tl.constexpr(11)  # where the state of the global selection lies in the table
GUARDS = tl.constexpr(12)  # where the items' states lie, if min_keep > 0
HEADER = tl.constexpr(13)

# Then a row an item, which is one tensor with its gradients and its mask.
WEIGHT = tl.constexpr(0)  # addresses
GRAD = tl.constexpr(1)
MASK_GRAD = tl.constexpr(2)  # 0: there is none
MASK = tl.constexpr(3)
DTYPE = tl.constexpr(4)
NUMEL = tl.constexpr(5)
FIRST = tl.constexpr(6)  # global index of its first entry
FIRST_CHUNK = tl.constexpr(7)
PLAIN = tl.constexpr(8)  # so many of its chunks, from the first on, are plain: see `plain_chunk`
PLAIN_BEFORE = tl.constexpr(9)  # plain chunks of the items before
WALK = tl.constexpr(10)  # where the dimensions of its walk lie in the table: order of the weight's memory
DIMS = tl.constexpr(11)  # how many there are
LOGICAL_WALK = tl.constexpr(12)  # the same for the row-major order; the same place if the order is the same
LOGICAL_DIMS = tl.constexpr(13)
ROW = tl.constexpr(14)

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Then the states of the selections, the global one and with min_keep one an item.
RANK = tl.constexpr(0)  # wanted: the rank-th largest of the keys with the prefix; at last: ties that survive
KEY = tl.constexpr(1)  # the prefix, digits found so far; at last the threshold
EQUAL = tl.constexpr(2)  # entries on the threshold
SHIFT = tl.constexpr(3)  # of the next digit; negative: the threshold is found
PLACE = tl.constexpr(4)  # of the threshold, one of those below
CUT = tl.constexpr(5)  # global index of the last tie that survives
CUT_CHUNK = tl.constexpr(6)  # its chunk; -1: all ties survive
CUT_RANK = tl.constexpr(7)  # ties of that chunk that survive
LOW = tl.constexpr(8)  # the bracket
HIGH = tl.constexpr(9)
STATE = tl.constexpr(10)

ON_HIGH = tl.constexpr(0)
ON_LOW = tl.constexpr(1)
INSIDE = tl.constexpr(2)
ANYWHERE = tl.constexpr(3)

# Last the dimensions of the walks, innermost first: size; strides of weight, gradient, mask, mask gradient.
DIM = tl.constexpr(5)

# What the survey counts in each chunk, beside keys ON_HIGH, ON_LOW and INSIDE.
ABOVE = tl.constexpr(3)
ALIVE = tl.constexpr(4)
NONFINITE = tl.constexpr(5)
COUNTS = tl.constexpr(6)

# Keys are those of csrc/prune/key.h. Digits are shorter: tl.histogram takes time for every bucket.
DIGIT_BITS = tl.constexpr(8)
BUCKETS = tl.constexpr(256)
TOP32 = tl.constexpr(0x7F800001)  # above every finite score's key
TOP64 = tl.constexpr(0x7FF0000000000001)
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)

# ---- Keys ----


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


# ---- Entries ----


@triton.jit
def widened(x, WIDE: tl.constexpr):
    """Entries as float32 or float64, exactly; those of bfloat16 come as the upper halves of float32s."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64 if WIDE else tl.float32)


@triton.jit
def narrowed(x, T: tl.constexpr):
    """Undoes `widened`."""
    if tl.int16 == T:
        return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        return x.to(T)


@triton.jit
def vector(row, OPERAND: tl.constexpr, T: tl.constexpr):
    """A plain item's operand, to be read and written 16 bytes at a time."""
    return tl.multiple_of(tl.load(row + OPERAND).to(tl.pointer_type(T)), 16)


@triton.jit
def load_as(row, position, T: tl.constexpr, WIDE: tl.constexpr):
    """Weights and scores of a plain chunk of one dtype."""
    w = widened(tl.load(vector(row, WEIGHT, T) + position), WIDE)
    g = widened(tl.load(vector(row, GRAD, T) + position), WIDE)
    score = w
    if WIDE and tl.load(row + MASK_GRAD) != 0:
        score = w * widened(tl.load(vector(row, MASK_GRAD, T) + position), WIDE)
    return w, score * g


@triton.jit
def store_as(row, begin, w, keep, T: tl.constexpr, BLOCK: tl.constexpr):
    """Sets what a plain chunk of one dtype loses to zero, in those vectors of 16 bytes that change by it."""
    V: tl.constexpr = 128 // T.primitive_bitwidth
    changes = tl.where(keep, 0, w.to(tl.int64 if w.dtype == tl.float64 else tl.int32, bitcast=True) != 0)
    change = tl.max(tl.reshape(changes.to(tl.int32), [BLOCK // V, V]), 1, keep_dims=True)
    at = begin + tl.arange(0, BLOCK // V)[:, None] * V + tl.arange(0, V)[None, :]
    value = tl.reshape(narrowed(tl.where(keep, w, 0.0), T), [BLOCK // V, V])
    tl.store(vector(row, WEIGHT, T) + at, value, mask=tl.broadcast_to(change, [BLOCK // V, V]) != 0)


@triton.jit
def load(row, position, WIDE: tl.constexpr):
    """Weights and scores of a plain chunk."""
    dtype = tl.load(row + DTYPE)
    if dtype == FLOAT32:
        w, score = load_as(row, position, tl.float32, WIDE)
    elif dtype == BFLOAT16:
        w, score = load_as(row, position, tl.int16, WIDE)
    elif not WIDE or dtype == FLOAT16:
        w, score = load_as(row, position, tl.float16, WIDE)
    else:
        w, score = load_as(row, position, tl.float64, WIDE)
    return w, score


@triton.jit
def store(row, begin, w, keep, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Writes the weights of a plain chunk."""
    dtype = tl.load(row + DTYPE)
    if dtype == FLOAT32:
        store_as(row, begin, w, keep, tl.float32, BLOCK)
    elif dtype == BFLOAT16:
        store_as(row, begin, w, keep, tl.int16, BLOCK)
    elif not WIDE or dtype == FLOAT16:
        store_as(row, begin, w, keep, tl.float16, BLOCK)
    else:
        store_as(row, begin, w, keep, tl.float64, BLOCK)


@triton.jit
def mask_of(row):
    """A plain item's mask, to be read and written 4 bytes at a time: masks may share one piece of memory."""
    return tl.multiple_of(tl.load(row + MASK).to(tl.pointer_type(tl.int8)), 4)


@triton.jit
def plain_chunk(row, begin, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr):
    """Weights and keys of a plain chunk: whole, and of operands that lie in memory without gaps in the order
    of the item's walk, at addresses for vectors."""
    position = begin + tl.arange(0, BLOCK)
    if FRESH:
        w, score = load(row, position, WIDE)
        keys = key_of(score)
    else:
        alive = tl.load(mask_of(row) + position)  # first, so that it does not wait for the others
        w, score = load(row, position, WIDE)
        keys = tl.where(alive != 0, key_of(score), 0)
    return w, keys


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
def gather_keys(row, walk, dims, most, position, inside, FRESH: tl.constexpr, WIDE: tl.constexpr):
    """Keys of entries wherever they lie; 0 where not `inside`. row, walk, dims: [] or [BLOCK]."""
    w_at, g_at, m_at, mg_at = offsets(walk, dims, most, position)
    each = tl.zeros_like(position)
    dtype = tl.load(row + DTYPE) + each
    alive = inside
    if not FRESH:
        alive = tl.load(tl.load(row + MASK).to(tl.pointer_type(tl.int8)) + m_at, mask=inside, other=0) != 0
    score = gather(tl.load(row + WEIGHT), dtype, w_at, inside, WIDE)
    if WIDE:
        mask_grad = tl.load(row + MASK_GRAD) + each
        factor = gather(mask_grad, dtype, mg_at, inside & (mask_grad != 0), WIDE)
        score *= tl.where(mask_grad != 0, factor, 1.0)
    score *= gather(tl.load(row + GRAD), dtype, g_at, inside, WIDE)
    return tl.where(alive, key_of(score), 0)


@triton.jit
def walk_of(table, row, logical):
    at = row + tl.where(logical, LOGICAL_WALK, WALK)
    return table + tl.load(at), tl.load(at + 1)


@triton.jit
def any_chunk(table, row, begin, logical, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr):
    """Keys of any chunk, 0 beyond its end; `logical`: of the row-major order, not of the memory's."""
    position = begin + tl.arange(0, BLOCK)
    walk, dims = walk_of(table, row, logical)
    return gather_keys(row, walk, dims, dims, position, position < tl.load(row + NUMEL), FRESH, WIDE)


@triton.jit
def row_of(table, item):
    return table + HEADER + item.to(tl.int64) * ROW


@triton.jit
def begin_of(row, chunk, BLOCK: tl.constexpr):
    """A chunk's first position in the walk of its item."""
    return (chunk - tl.load(row + FIRST_CHUNK)) * BLOCK


# ---- Selections ----


@triton.jit
def state_of(table, item, GUARDING: tl.constexpr):
    """State of the item's guard, or of the global selection."""
    if GUARDING:
        return table + tl.load(table + GUARDS) + item * STATE
    else:
        return table + tl.load(table + SELECTION)


@triton.jit
def chosen(keys, place, state, first, BLOCK: tl.constexpr):
    """Which entries survive by a selection that is over. place: their global indices, from `first` on."""
    threshold = tl.load(state + KEY).to(keys.dtype)
    cut = tl.minimum(tl.maximum(tl.load(state + CUT) - first, -1), BLOCK)
    return (keys > threshold) | ((keys == threshold) & (place <= cut.to(place.dtype)))


@triton.jit
def mark_guarded(table, item, keys, first, mark, BLOCK: tl.constexpr):
    """A chunk's keys, `mark` for entries that survive in any case because of min_keep."""
    if tl.load(table + MIN_KEEP) > 0:
        guarded = chosen(keys, tl.arange(0, BLOCK), state_of(table, item, True), first, BLOCK)
        keys = tl.where(guarded, mark, keys)
    return keys


@triton.jit
def candidates(
    table, chunk_item, chunk, logical_item,
    GUARDING: tl.constexpr, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keys of any chunk, 0 for entries that the selection is not about, and its first global index."""
    item = tl.load(chunk_item + chunk)
    row = row_of(table, item)
    begin = begin_of(row, chunk, BLOCK)
    logical = item == logical_item
    in_order = tl.load(row + WALK) == tl.load(row + LOGICAL_WALK)
    if (begin < tl.load(row + PLAIN) * BLOCK) & (in_order | (logical == 0)):
        _, keys = plain_chunk(row, begin, BLOCK, FRESH, WIDE)
    else:
        keys = any_chunk(table, row, begin, logical, BLOCK, FRESH, WIDE)
    first = tl.load(row + FIRST) + begin
    if not GUARDING:
        keys = mark_guarded(table, item, keys, first, 0, BLOCK)
    return keys, first


# ---- The work list, and step 1: sample ----


@triton.jit
def item_of(table, x, FIELD: tl.constexpr):
    """The items in which chunks or global indices [BLOCK] lie: the last with a FIELD up to that."""
    item = tl.zeros_like(x)
    reach = tl.load(table + ITEMS)
    while reach > 1:
        half = reach // 2
        item = tl.where(tl.load(row_of(table, item + half) + FIELD) <= x, item + half, item)
        reach -= half
    return item


@triton.jit
def list_chunks(table, chunk_item, work, work_item, BLOCK: tl.constexpr):
    """The item of every chunk; the work list, plain chunks first, and their items."""
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = chunk < tl.load(table + CHUNKS)
    item = item_of(table, chunk, FIRST_CHUNK)
    row = row_of(table, item)
    number = chunk - tl.load(row + FIRST_CHUNK)
    plain = tl.load(row + PLAIN)
    plain_before = tl.load(row + PLAIN_BEFORE) + tl.minimum(number, plain)
    others_before = chunk - plain_before
    at = tl.where(number < plain, plain_before, tl.load(table + PLAIN_CHUNKS) + others_before)
    tl.store(chunk_item + chunk, item.to(tl.int32), mask=real)
    tl.store(work + at, chunk.to(tl.int32), mask=real)
    tl.store(work_item + at, item.to(tl.int32), mask=real)


@triton.jit
def scrambled(x):
    """Pseudo-random numbers for indices (splitmix64, as in csrc/prune/sample.h): samples must not fall in step with
    a tensor's shape, and a step should depend on nothing but its input."""
    x = x.to(tl.uint64) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def sample(table, keys, SAMPLES_A_PROGRAM: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr):
    """Keys of random entries, one of each of SAMPLES equal parts of all entries."""
    part = tl.program_id(0) * SAMPLES_A_PROGRAM + tl.arange(0, SAMPLES_A_PROGRAM)
    entries = tl.load(table + ENTRIES)
    random = (scrambled(part) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53: in [0, 1)
    at = (part + random) * entries.to(tl.float64) / tl.load(table + SAMPLES).to(tl.float64)
    index = tl.minimum(at.to(tl.int64), entries - 1)
    item = item_of(table, index, FIRST)
    row = row_of(table, item)
    walk, dims = walk_of(table, row, False)
    position = index - tl.load(row + FIRST)
    found = gather_keys(row, walk, dims, tl.max(dims, 0), position, position >= 0, FRESH, WIDE)
    if tl.load(table + MIN_KEEP) > 0:
        guard = state_of(table, item, True)
        found = tl.where(chosen(found, index, guard, 0, LAST), 0, found)
    tl.store(keys + part, found)


@triton.jit
def bracket(table, keys, SIGMAS: tl.constexpr, WIDE: tl.constexpr):
    """LOW and HIGH from the sample's sorted keys: very likely the threshold lies between them."""
    samples = tl.load(table + SAMPLES)
    keep = tl.load(table + KEEP) - tl.load(table + GUARDED)
    share = keep.to(tl.float64) / tl.load(table + ENTRIES).to(tl.float64)
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    rank = share * samples.to(tl.float64)  # from the largest
    margin = SIGMAS * tl.sqrt(rank * (1.0 - share)) + 1.0
    first = tl.floor(rank - margin).to(tl.int64)
    last = tl.floor(rank + margin).to(tl.int64)
    high = tl.load(keys + samples - 1 - first, mask=first >= 0, other=0).to(tl.int64)
    high = tl.where(first >= 0, high, TOP64 if WIDE else TOP32)
    low = tl.load(keys + samples - 1 - last, mask=last < samples, other=0).to(tl.int64)
    state = state_of(table, 0, False)
    tl.store(state + HIGH, high)
    tl.store(state + LOW, tl.minimum(low, high - 1))


# ---- Step 2: survey ----


@triton.jit
def across(x, BLOCK: tl.constexpr):
    """A chunk's entries in another order: the 8 that a thread holds side by side come far apart, the first
    ones of all threads next to each other. A store to scattered places in that order moves nothing."""
    return tl.reshape(tl.trans(tl.reshape(x, [BLOCK // 8, 8])), [BLOCK])


@triton.jit
def survey(
    table, work, work_item, counts, starts, sums, listed, nonfinite,
    PLAIN_ONES: tl.constexpr, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a chunk, of the plain ones or of the others."""
    i = tl.program_id(0).to(tl.int64)
    if not PLAIN_ONES:
        i += tl.load(table + PLAIN_CHUNKS)
    chunk = tl.load(work + i)
    item = tl.load(work_item + i)
    row = row_of(table, item)
    begin = begin_of(row, chunk, BLOCK)
    if PLAIN_ONES:
        _, keys = plain_chunk(row, begin, BLOCK, FRESH, WIDE)
    else:
        keys = any_chunk(table, row, begin, False, BLOCK, FRESH, WIDE)

    score = tl.where(keys != 0, score_of(keys), 0.0)
    if tl.load(table + SQUARED) != 0:
        score *= score
    total = tl.sum(score, 0)
    bad = 0
    if (total < float("inf")) == 0:  # else every score is finite
        bad = tl.sum((keys >= top_of(keys)).to(tl.int32), 0)
        tl.atomic_add(nonfinite + item, bad.to(tl.int64), sem="relaxed")
    alive = tl.minimum(tl.load(row + NUMEL) - begin, BLOCK).to(tl.int32)
    if not FRESH:
        alive = tl.sum((keys != 0).to(tl.int32), 0)

    state = state_of(table, item, False)
    low = tl.load(state + LOW).to(keys.dtype)
    high = tl.load(state + HIGH).to(keys.dtype)
    keys = mark_guarded(table, item, keys, tl.load(row + FIRST) + begin, 0, BLOCK)
    inside = (keys > low) & (keys < high)
    # two counts in one number, for both are at most BLOCK
    running = tl.cumsum(tl.where(keys > high, 1 << 16, tl.where(inside, 1, 0)), 0)
    above_inside = tl.max(running, 0)
    on_high_low = tl.sum(tl.where(keys == high, 1 << 16, tl.where(keys == low, 1, 0)), 0)
    found = above_inside & 0xFFFF
    start = tl.atomic_add(table + LISTED, found.to(tl.int64), sem="relaxed")
    room = tl.minimum(tl.load(table + CAPACITY) - start, BLOCK).to(tl.int32)
    place = across(tl.where(inside, (running & 0xFFFF) - 1, BLOCK), BLOCK)
    tl.store(listed + start + place, across(keys, BLOCK), mask=place < room)

    chunks = tl.load(table + CHUNKS)
    tl.store(starts + chunk, start)
    tl.store(sums + chunk, total)
    tl.store(counts + ON_HIGH * chunks + chunk, on_high_low >> 16)
    tl.store(counts + ON_LOW * chunks + chunk, on_high_low & 0xFFFF)
    tl.store(counts + INSIDE * chunks + chunk, found)
    tl.store(counts + ABOVE * chunks + chunk, above_inside >> 16)
    tl.store(counts + ALIVE * chunks + chunk, alive)
    tl.store(counts + NONFINITE * chunks + chunk, bad)


# ---- Step 3: threshold ----


@triton.jit
def settle(state, key, rank, equal, place):
    tl.store(state + KEY, key)
    tl.store(state + RANK, rank)
    tl.store(state + EQUAL, equal)
    tl.store(state + PLACE, place)
    tl.store(state + SHIFT, -1)


@triton.jit
def decide(table, totals, WIDE: tl.constexpr):
    """Where the threshold of the global selection lies, by the survey's counts."""
    state = state_of(table, 0, False)
    above = tl.load(totals + ABOVE)
    on_high = tl.load(totals + ON_HIGH)
    inside = tl.load(totals + INSIDE)
    on_low = tl.load(totals + ON_LOW)
    rank = tl.minimum(tl.load(table + KEEP), tl.load(totals + ALIVE)) - tl.load(table + GUARDED)
    if tl.load(totals + NONFINITE) > 0:  # what is alive survives
        settle(state, 0, 0, 0, ANYWHERE)
        tl.store(state + CUT, -1)
    elif rank <= 0:
        settle(state, TOP64 if WIDE else TOP32, 0, 0, ANYWHERE)
    elif (rank <= above) | (rank > above + on_high + inside + on_low) | (inside > tl.load(table + CAPACITY)):
        tl.store(state + RANK, rank)
    elif rank <= above + on_high:
        settle(state, tl.load(state + HIGH), rank - above, on_high, ON_HIGH)
    elif rank > above + on_high + inside:
        settle(state, tl.load(state + LOW), rank - above - on_high - inside, on_low, ON_LOW)
    else:
        tl.store(state + RANK, rank - above - on_high)
        tl.store(state + PLACE, INSIDE)


@triton.jit
def count_digit(
    table, chunk_item, listed, histogram,
    GUARDING: tl.constexpr, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds up, by the digit looked for, the keys that agree with the digits before."""
    lane = tl.arange(0, BLOCK)
    bucket = tl.arange(0, BUCKETS)
    selection = state_of(table, 0, False)
    among_listed = tl.load(selection + PLACE) == INSIDE
    size = tl.load(table + CHUNKS)
    if among_listed:
        size = tl.cdiv(tl.load(table + LISTED), BLOCK)
    if not GUARDING:
        size = tl.where(tl.load(selection + SHIFT) < 0, 0, size)
    for block in range(tl.program_id(0).to(tl.int64), size, tl.num_programs(0)):
        item = block * 0
        if among_listed:
            at = block * BLOCK + lane
            keys = loaded_keys(tl.load(listed + at, mask=at < tl.load(table + LISTED), other=0))
        else:
            keys, _ = candidates(table, chunk_item, block, -1, GUARDING, BLOCK, FRESH, WIDE)
            if GUARDING:
                item = tl.load(chunk_item + block).to(tl.int64)
        state = state_of(table, item, GUARDING)
        shift = tl.load(state + SHIFT)
        if shift >= 0:
            prefix = tl.load(state + KEY).to(keys.dtype)
            by = shift.to(keys.dtype)
            agrees = (((keys ^ prefix) >> by) >> DIGIT_BITS) == 0
            digit = ((keys >> by) & (BUCKETS - 1)).to(tl.int32)
            found = tl.histogram(digit, BUCKETS, mask=(keys > 0) & agrees).to(tl.int64)
            tl.atomic_add(histogram + item * BUCKETS + bucket, found, mask=found > 0, sem="relaxed")


@triton.jit
def pick_digit(table, histogram, GUARDING: tl.constexpr, WIDE: tl.constexpr):
    """One program a selection: the digit of the rank-th largest key. Clears the histogram for the next."""
    item = tl.program_id(0)
    state = state_of(table, item, GUARDING)
    shift = tl.load(state + SHIFT)
    if shift >= 0:
        bucket = tl.arange(0, BUCKETS)
        counters = histogram + item * BUCKETS + bucket
        counts = tl.load(counters)
        tl.store(counters, tl.zeros_like(counts))
        rank = tl.minimum(tl.load(state + RANK), tl.sum(counts, 0))
        if GUARDING and shift == (64 if WIDE else 32) - DIGIT_BITS:
            tl.atomic_add(table + GUARDED, rank, sem="relaxed")
        if rank == 0:
            settle(state, TOP64 if WIDE else TOP32, 0, 0, ANYWHERE)
        else:
            up_to_here = tl.cumsum(counts, 0, reverse=True)  # from the largest
            digit = tl.max(tl.where(up_to_here >= rank, bucket, 0), 0)
            tl.store(state + KEY, tl.load(state + KEY) | (digit.to(tl.int64) << shift))
            tl.store(state + RANK, rank - tl.sum(tl.where(bucket > digit, counts, 0), 0))
            tl.store(state + EQUAL, tl.sum(tl.where(bucket == digit, counts, 0), 0))
            tl.store(state + SHIFT, shift - DIGIT_BITS)


# ---- Step 4: ties ----


@triton.jit
def is_cut(state):
    """Do fewer ties survive than there are?"""
    return tl.load(state + RANK) < tl.load(state + EQUAL)


@triton.jit
def equal_to(keys, state):
    """The number of keys on the threshold."""
    return tl.sum((keys == tl.load(state + KEY).to(keys.dtype)).to(tl.int32), 0)


@triton.jit
def count_ties(
    table, chunk_item, counts, starts, listed, ties,
    GUARDING: tl.constexpr, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Ties by chunk, where not all of them survive."""
    lane = tl.arange(0, BLOCK)
    chunks = tl.load(table + CHUNKS)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        state = state_of(table, tl.load(chunk_item + chunk), GUARDING)
        if is_cut(state):
            place = tl.load(state + PLACE)
            if place == ANYWHERE:
                keys, _ = candidates(table, chunk_item, chunk, -1, GUARDING, BLOCK, FRESH, WIDE)
                equal = equal_to(keys, state)
            else:
                equal = tl.load(counts + place * chunks + chunk)
                if place == INSIDE:
                    at = tl.load(starts + chunk) + lane
                    equal = equal_to(loaded_keys(tl.load(listed + at, mask=lane < equal, other=0)), state)
            tl.store(ties + chunk, equal)


@triton.jit
def locate(table, ties_up_to, GUARDING: tl.constexpr, BLOCK: tl.constexpr):
    """One program a selection: the chunk with its last surviving tie. ties_up_to: running sum of the ties."""
    item = tl.program_id(0)
    state = state_of(table, item, GUARDING)
    if is_cut(state):
        high = tl.load(table + CHUNKS) - 1
        low = high * 0
        if GUARDING:
            low = tl.load(row_of(table, item) + FIRST_CHUNK)
            high = low + tl.cdiv(tl.load(row_of(table, item) + NUMEL), BLOCK) - 1
        before = tl.load(ties_up_to + low - 1, mask=low > 0, other=0)
        rank = before + tl.load(state + RANK)
        while low < high:
            middle = (low + high) // 2
            if tl.load(ties_up_to + middle) < rank:
                low = middle + 1
            else:
                high = middle
        tl.store(state + CUT_CHUNK, low)
        tl.store(state + CUT_RANK, rank - tl.load(ties_up_to + low - 1, mask=low > 0, other=0))


@triton.jit
def disorderly_item(table, chunk_item):
    """The item in which the global selection cuts ties, if its walk is not in row-major order; else -1."""
    chunk = tl.load(state_of(table, 0, False) + CUT_CHUNK)
    item = tl.load(chunk_item + chunk, mask=chunk >= 0, other=0)
    row = row_of(table, item)
    in_order = tl.load(row + WALK) == tl.load(row + LOGICAL_WALK)
    return tl.where((chunk < 0) | in_order, -1, item)


@triton.jit
def recount(table, chunk_item, ties, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr):
    """Ties by chunk of the row-major order, in the disorderly item: in others the order does not matter."""
    item = disorderly_item(table, chunk_item)
    if item >= 0:
        state = state_of(table, item, False)
        first = tl.load(row_of(table, item) + FIRST_CHUNK)
        end = first + tl.cdiv(tl.load(row_of(table, item) + NUMEL), BLOCK)
        for chunk in range(first + tl.program_id(0), end, tl.num_programs(0)):
            keys, _ = candidates(table, chunk_item, chunk, item, False, BLOCK, FRESH, WIDE)
            tl.store(ties + chunk, equal_to(keys, state))


@triton.jit
def cut(
    table, chunk_item,
    GUARDING: tl.constexpr, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a selection: the global index of the last surviving tie."""
    state = state_of(table, tl.program_id(0), GUARDING)
    chunk = tl.load(state + CUT_CHUNK)
    if chunk >= 0:
        item = tl.load(chunk_item + chunk)
        keys, first = candidates(table, chunk_item, chunk, item, GUARDING, BLOCK, FRESH, WIDE)
        tie = keys == tl.load(state + KEY).to(keys.dtype)
        last = tie & (tl.cumsum(tie.to(tl.int32), 0) == tl.load(state + CUT_RANK))
        tl.store(state + CUT, first + tl.sum(tl.where(last, tl.arange(0, BLOCK), 0), 0))


# ---- Step 5: apply ----


@triton.jit
def survivors(table, kept, item, keys, first, BLOCK: tl.constexpr):
    """Which of a chunk's entries survive. Counts them."""
    marked = mark_guarded(table, item, keys, first, top_of(keys), BLOCK)
    keep = chosen(marked, tl.arange(0, BLOCK), state_of(table, item, False), first, BLOCK)
    tl.atomic_add(kept + item, tl.sum(keep.to(tl.int32), 0).to(tl.int64), sem="relaxed")
    return keep


@triton.jit
def apply_plain(
    table, chunk_item, work, work_item, totals, kept,
    BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a plain chunk."""
    chunk = tl.load(work + tl.program_id(0))
    item = tl.load(work_item + tl.program_id(0))
    if item != disorderly_item(table, chunk_item):
        row = row_of(table, item)
        begin = begin_of(row, chunk, BLOCK)
        w, keys = plain_chunk(row, begin, BLOCK, FRESH, WIDE)
        keep = survivors(table, kept, item, keys, tl.load(row + FIRST) + begin, BLOCK)
        position = begin + tl.arange(0, BLOCK)
        tl.store(mask_of(row) + position, keep.to(tl.int8))
        if tl.load(totals + NONFINITE) == 0:
            store(row, begin, w, keep, BLOCK, WIDE)


@triton.jit
def apply_others(
    table, chunk_item, work, totals, kept, BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr
):
    """All other chunks, and the plain ones of the disorderly item."""
    disorderly = disorderly_item(table, chunk_item)
    plain_chunks = tl.load(table + PLAIN_CHUNKS)
    others = tl.load(table + CHUNKS) - plain_chunks
    row = row_of(table, tl.maximum(disorderly, 0))
    again = tl.load(row + FIRST_CHUNK)
    end = others + tl.where(disorderly < 0, 0, tl.load(row + PLAIN))
    for i in range(tl.program_id(0).to(tl.int64), end, tl.num_programs(0)):
        chunk = again + i - others
        if i < others:
            chunk = tl.load(work + plain_chunks + i).to(tl.int64)
        item = tl.load(chunk_item + chunk)
        row = row_of(table, item)
        begin = begin_of(row, chunk, BLOCK)
        logical = item == disorderly
        keys = any_chunk(table, row, begin, logical, BLOCK, FRESH, WIDE)
        keep = survivors(table, kept, item, keys, tl.load(row + FIRST) + begin, BLOCK)
        position = begin + tl.arange(0, BLOCK)
        inside = position < tl.load(row + NUMEL)
        walk, dims = walk_of(table, row, logical)
        w_at, _, m_at, _ = offsets(walk, dims, dims, position)
        tl.store(tl.load(row + MASK).to(tl.pointer_type(tl.int8)) + m_at, keep.to(tl.int8), mask=inside)
        if tl.load(totals + NONFINITE) == 0:
            dtype = tl.load(row + DTYPE) + tl.zeros_like(position)
            scatter_zeros(tl.load(row + WEIGHT), dtype, w_at, inside & (keep == 0))


@triton.jit
def finish(table, totals, total, scores, WIDE: tl.constexpr):
    """scores: z of the weakest survivor (inf if nothing survives), sum of |S|; NaN if one is not finite."""
    state = state_of(table, 0, False)
    weakest = tl.where(tl.load(state + RANK) > 0, tl.load(state + KEY), LAST)
    if tl.load(table + MIN_KEEP) > 0:
        for item in range(tl.load(table + ITEMS)):
            guard = state_of(table, item, True)
            weakest = tl.where(tl.load(guard + RANK) > 0, tl.minimum(weakest, tl.load(guard + KEY)), weakest)
    score = score_of(weakest.to(tl.uint64 if WIDE else tl.uint32))
    if tl.load(table + SQUARED) != 0:
        score *= score
    sum_of_all = tl.load(total)
    z = tl.where(sum_of_all == 0, score, score / sum_of_all)
    z = tl.where(weakest == LAST, float("inf"), z)
    finite = tl.load(totals + NONFINITE) == 0
    tl.store(scores, tl.where(finite, z, float("nan")))
    tl.store(scores + 1, tl.where(finite, sum_of_all, float("nan")))


# ---- The host's part: the table, the scratch, the launches ----

Dim = tuple[int, ...]  # size, then strides of weight, gradient, mask, mask gradient


class Item(NamedTuple):
    """One tensor with its gradients and its mask."""

    weight: Tensor
    grad: Tensor
    mask: Tensor
    mask_grad: Tensor | None
    walk: list[Dim]
    logical_walk: list[Dim]
    squared: bool  # |S| is the square of the score that is ranked

    @property
    def numel(self) -> int:
        return self.weight.numel()

    @property
    def chunks(self) -> int:
        return -(-self.numel // TUNING.chunk)

    @property
    def plain_chunks(self) -> int:
        """See `plain_chunk`."""
        floats = (self.weight, self.grad, self.weight if self.mask_grad is None else self.mask_grad)
        aligned = self.mask.data_ptr() % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in floats)
        dense = len(self.walk) == 1 and self.walk[0][1:] == (1, 1, 1, 1)
        return self.numel // TUNING.chunk if aligned and dense else 0


def _item(
    weight: Tensor, grad: Tensor | None, mask: Tensor, mask_grad: Tensor | None, in_order: bool
) -> Item:
    squared = grad is not None and mask_grad is None
    if grad is None:  # ones of every shape that take one entry of memory
        grad = weight.new_ones(()).expand_as(weight)
    operands = (weight, grad, mask, weight if mask_grad is None else mask_grad)
    strides = zip(*(t.stride() for t in operands), strict=True)
    dims = [(size, *by) for size, by in zip(weight.shape, strides, strict=True) if size != 1]
    logical = _merged(dims)
    walk = logical if in_order else _merged(sorted(dims, key=lambda dim: -dim[1]))
    return Item(weight, grad, mask, mask_grad, walk, logical, squared)


def _merged(dims: list[Dim]) -> list[Dim]:
    """Joins neighbouring dimensions that every operand steps through evenly, as csrc/prune/walk.h does."""
    merged: list[Dim] = []
    for size, *strides in dims:
        if merged and merged[-1][1:] == tuple(size * stride for stride in strides):
            size *= merged.pop()[0]
        merged.append((size, *strides))
    return merged or [(1, 1, 1, 1, 1)]


def _table(items: list[Item], wide: bool, keep: int, min_keep: int, samples: int, capacity: int) -> list[int]:
    """Header, rows, states and walks, as laid out above."""
    top = TOP64.value if wide else TOP32.value
    state = [0, 0, 0, _bits(wide) - DIGIT_BITS.value, ANYWHERE.value, LAST.value, -1, 0, 0, top]
    states = state + [min_keep, *state[1:]] * (len(items) if min_keep else 0)
    selection = HEADER.value + len(items) * ROW.value
    rows: list[int] = []
    walks: list[int] = []

    def place(walk: list[Dim]) -> tuple[int, int]:
        at = selection + len(states) + len(walks)
        for dim in reversed(walk):
            walks.extend(dim)
        return at, len(walk)

    entries = chunks = plain = 0
    for item in items:
        walk = place(item.walk)
        logical_walk = walk if item.walk == item.logical_walk else place(item.logical_walk)
        mask_grad = 0 if item.mask_grad is None else item.mask_grad.data_ptr()
        rows += [item.weight.data_ptr(), item.grad.data_ptr(), mask_grad, item.mask.data_ptr()]
        rows += [DTYPES[item.weight.dtype], item.numel, entries, chunks, item.plain_chunks, plain]
        rows += [*walk, *logical_walk]
        entries += item.numel
        chunks += item.chunks
        plain += item.plain_chunks
    header = [len(items), entries, chunks, plain, keep, min_keep, 0, int(items[0].squared)]
    header += [samples, capacity, 0, selection, selection + len(state)]
    return header + rows + states + walks


def _on_device(table: list[int], device: torch.device) -> Tensor:
    """A copy of the table, made without waiting for the device."""
    if device.type == "cpu":  # the interpreter
        return torch.tensor(table)
    if torch.cuda.is_current_stream_capturing():
        return _by_arguments(table, device)
    return torch.tensor(table, pin_memory=True).to(device, non_blocking=True)


def _by_arguments(table: list[int], device: torch.device) -> Tensor:
    """The same for a CUDA graph, which would read the host's copy anew at each replay: numbers that travel as
    arguments of kernels are the graph's own. 96 a launch."""
    on_device = torch.zeros(len(table), dtype=torch.int64, device=device)
    torch._foreach_add_(on_device.unbind(), table)
    return on_device


def _bits(wide: bool) -> int:
    return 64 if wide else 32


def _samples(entries: int) -> int:
    """0: all entries are in the bracket."""
    if entries <= TUNING.small_sample:
        return 0
    return TUNING.small_sample if entries < TUNING.large_from else TUNING.large_sample


def _step(items: list[Item], wide: bool, fresh: bool, keep: int, min_keep: int) -> Outputs:
    t = TUNING
    entries, chunks = sum(item.numel for item in items), sum(item.chunks for item in items)
    plain = sum(item.plain_chunks for item in items)
    disorderly = any(item.walk != item.logical_walk for item in items)
    samples, capacity = _samples(entries), max(entries // t.entries_a_listed_key, t.least_listed)
    keys = torch.int64 if wide else torch.int32
    table = _on_device(_table(items, wide, keep, min_keep, samples, capacity), items[0].weight.device)
    # arguments of the kernels, by their names
    arguments: dict[str, Any] = {
        "table": table,
        "chunk_item": table.new_empty(chunks, dtype=torch.int32),
        "work": table.new_empty(chunks, dtype=torch.int32),
        "work_item": table.new_empty(chunks, dtype=torch.int32),
        "keys": table.new_empty(samples, dtype=keys),
        "listed": table.new_empty(capacity, dtype=keys),
        "counts": table.new_empty(COUNTS.value, chunks, dtype=torch.int32),
        "starts": table.new_empty(chunks),
        "sums": table.new_empty(chunks, dtype=torch.float64),
        "histogram": table.new_zeros(len(items) if min_keep else 1, BUCKETS.value),
        "ties": table.new_zeros(chunks, dtype=torch.int32),
        "kept": table.new_zeros(len(items)),
        "nonfinite": table.new_zeros(len(items)),
        "scores": table.new_empty(2, dtype=torch.float64),
        "BLOCK": t.chunk,
        "SAMPLES_A_PROGRAM": t.samples_a_program,
        "SIGMAS": t.sigmas,
        "FRESH": fresh,
        "WIDE": wide,
    }

    def launch(kernel: Any, programs: int, warps: int, **constants: bool) -> None:
        everything = {**arguments, **constants}
        own = {name: everything[name] for name in kernel.arg_names}
        if programs:  # no fusion to FMA: products are rounded as everywhere else
            launch_kernel(kernel, (programs,), **own, num_warps=warps, enable_fp_fusion=False)

    def select(selections: int, guarding: bool) -> None:
        """Steps 3 and 4."""
        programs = min(chunks, t.programs)
        for _ in range(_bits(wide) // DIGIT_BITS.value):
            launch(count_digit, programs, t.chunk_warps, GUARDING=guarding)
            launch(pick_digit, selections, t.few_warps, GUARDING=guarding)
        launch(count_ties, programs, t.chunk_warps, GUARDING=guarding)
        arguments["ties_up_to"] = arguments["ties"].cumsum(0)
        launch(locate, selections, t.few_warps, GUARDING=guarding)
        if disorderly:
            launch(recount, programs, t.chunk_warps)
            arguments["ties_up_to"] = arguments["ties"].cumsum(0)
            launch(locate, selections, t.few_warps, GUARDING=guarding)
        launch(cut, selections, t.chunk_warps, GUARDING=guarding)

    launch(list_chunks, -(-chunks // t.chunk), t.chunk_warps)
    if min_keep:
        select(len(items), guarding=True)
    if samples:
        launch(sample, samples // t.samples_a_program, t.few_warps)
        arguments["keys"] = arguments["keys"].sort().values
        launch(bracket, 1, t.few_warps)
    launch(survey, plain, t.plain_warps, PLAIN_ONES=True)
    launch(survey, chunks - plain, t.chunk_warps, PLAIN_ONES=False)
    arguments["totals"], arguments["total"] = arguments["counts"].sum(1), arguments["sums"].sum()
    launch(decide, 1, t.few_warps)
    select(1, guarding=False)
    launch(apply_plain, plain, t.plain_warps)
    if plain < chunks or disorderly:
        launch(apply_others, min(chunks, t.programs), t.chunk_warps)
    launch(finish, 1, t.few_warps)
    return arguments["kept"], arguments["nonfinite"], arguments["scores"]


def _check(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    prune: int,
    min_keep: int,
) -> None:
    """Raise unless the arguments fit together, as csrc/prune/arguments.h does: kernels see addresses only."""
    op = "drive::prune_"
    if not weights:
        raise ValueError(f"{op}: weights must not be empty")
    device = weights[0].device
    lengths = [len(tensors) for tensors in (weights, grads, mask_grads, masks)]
    one = len(weights)
    if lengths not in ([one, one, one, one], [one, one, 0, one], [one, 0, 0, one]):
        raise ValueError(
            f"{op}: weights, grads, mask_grads and masks must be of one length (or mask_grads empty, or both "
            f"gradients), got {str(lengths)[1:-1]}"
        )
    if prune < 0 or min_keep < 0:
        raise ValueError(f"{op}: prune and min_keep must be >= 0, got {prune}, {min_keep}")
    for i, weight in enumerate(weights):
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"{op}: weights[{i}] must be float32, bfloat16, float16 or float64, got {weight.dtype}"
            )
        if weight.device != device:
            raise ValueError(f"{op}: weights[{i}] must be on {device}, as weights[0] is, got {weight.device}")
    for name, tensors in (("grads", grads), ("mask_grads", mask_grads), ("masks", masks)):
        for i, tensor in enumerate(tensors):
            weight = weights[i]
            dtype = torch.bool if name == "masks" else weight.dtype
            if tensor.shape != weight.shape:
                shapes = f"{list(weight.shape)}, got {list(tensor.shape)}"
                raise ValueError(f"{op}: {name}[{i}] must have shape {shapes}")
            if tensor.dtype != dtype:
                raise TypeError(f"{op}: {name}[{i}] must be {dtype}, got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(f"{op}: {name}[{i}] must be on {device}, got {tensor.device}")
            if tensor.layout != torch.strided:
                raise TypeError(f"{op}: {name}[{i}] must be a dense tensor, got layout {tensor.layout}")


def prune_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    prune: int,
    min_keep: int,
) -> Outputs:
    """drive::prune_ for tensors on one GPU; for tensors on the CPU in Triton's interpreter."""
    _check(weights, grads, mask_grads, masks, prune, min_keep)
    # Ties are cut in row-major order: with min_keep in any item, so then all walks are of that order.
    items = [
        _item(
            weight, grads[i] if grads else None, masks[i], mask_grads[i] if mask_grads else None, min_keep > 0
        )
        for i, weight in enumerate(weights)
    ]
    wide = bool(mask_grads) or any(weight.dtype == torch.float64 for weight in weights)
    keep = sum(item.numel for item in items) - prune
    with torch.cuda.device_of(weights[0]):
        outputs = _step(items, wide, fresh, keep, min_keep)
    torch.autograd.graph.increment_version([*weights, *masks])
    return outputs
