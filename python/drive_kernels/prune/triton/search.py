"""The threshold of each selection, by digits of its key (step 3 of launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import loaded_keys
from .selection import candidates, state_of
from .tables import (
    ABOVE,
    ALIVE,
    ANYWHERE,
    BUCKETS,
    CAPACITY,
    CHUNKS,
    CUT,
    DIGIT_BITS,
    EQUAL,
    GUARDED,
    HIGH,
    INSIDE,
    KEEP,
    KEY,
    LISTED,
    LOW,
    NONFINITE,
    ON_HIGH,
    ON_LOW,
    PLACE,
    RANK,
    SHIFT,
    TOP32,
    TOP64,
)


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
