"""The threshold of each selection, by digits of its key (step 3 of launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import loaded_keys, row_of
from .selection import candidates, state_of
from .tables import (
    ABOVE,
    ALIVE,
    ANYWHERE,
    BUCKETS,
    BUDGET,
    CAPACITY,
    CHUNKS,
    COST,
    CUT,
    DIGIT_BITS,
    EQUAL,
    GUARDED,
    HIGH,
    INSIDE,
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
    """Where the threshold of the global selection lies, by what the entries that the survey counts cost."""
    state = state_of(table, 0, False)
    above = tl.load(totals + ABOVE)
    on_high = tl.load(totals + ON_HIGH)
    inside = tl.load(totals + INSIDE)
    on_low = tl.load(totals + ON_LOW)
    rank = tl.minimum(tl.load(table + BUDGET), tl.load(totals + ALIVE)) - tl.load(table + GUARDED)
    fits = tl.load(table + LISTED) <= tl.load(table + CAPACITY)
    if tl.load(totals + NONFINITE) > 0:  # what is alive survives
        settle(state, 0, 0, 0, ANYWHERE)
        tl.store(state + CUT, -1)
    elif rank <= 0:
        settle(state, TOP64 if WIDE else TOP32, 0, 0, ANYWHERE)
    elif (rank <= above) | (rank > above + on_high + inside + on_low) | (fits == 0):
        tl.store(state + RANK, rank)
    elif rank <= above + on_high:
        settle(state, tl.load(state + HIGH), rank - above, on_high, ON_HIGH)
    elif rank > above + on_high + inside:
        settle(state, tl.load(state + LOW), rank - above - on_high - inside, on_low, ON_LOW)
    else:
        tl.store(state + RANK, rank - above - on_high)
        tl.store(state + PLACE, INSIDE)


@triton.jit
def add_digits(histogram, keys, cost, state):
    """Adds up, by the digit looked for, the keys that agree with the digits before, for what each costs."""
    shift = tl.load(state + SHIFT)
    if shift >= 0:
        prefix = tl.load(state + KEY).to(keys.dtype)
        by = shift.to(keys.dtype)
        agrees = (((keys ^ prefix) >> by) >> DIGIT_BITS) == 0
        digit = ((keys >> by) & (BUCKETS - 1)).to(tl.int32)
        found = tl.histogram(digit, BUCKETS, mask=(keys > 0) & agrees).to(tl.int64) * cost
        tl.atomic_add(histogram + tl.arange(0, BUCKETS), found, mask=found > 0, sem="relaxed")


@triton.jit
def count_digit(
    table, chunk_item, chunk_cost, listed, histogram,
    GUARDING: tl.constexpr, BLOCK: tl.constexpr,
    FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """`add_digits` of all keys that the selections are about."""
    lane = tl.arange(0, BLOCK)
    selection = state_of(table, 0, False)
    among_listed = tl.load(selection + PLACE) == INSIDE
    size = tl.load(table + CHUNKS)
    if among_listed:
        size = tl.cdiv(tl.load(table + LISTED), BLOCK)
    if not GUARDING:
        done = tl.load(selection + SHIFT) < 0
        if COSTED:
            done |= among_listed  # by count_listed
        size = tl.where(done, 0, size)
    for block in range(tl.program_id(0).to(tl.int64), size, tl.num_programs(0)):
        item = block * 0
        if among_listed:
            at = block * BLOCK + lane
            keys = loaded_keys(tl.load(listed + at, mask=at < tl.load(table + LISTED), other=0))
        else:
            keys, _ = candidates(table, chunk_item, block, -1, GUARDING, BLOCK, FRESH, WIDE, COSTED)
            if GUARDING:
                item = tl.load(chunk_item + block).to(tl.int64)
        cost = 1
        if COSTED and not GUARDING:
            cost = tl.load(chunk_cost + block)
        add_digits(histogram + item * BUCKETS, keys, cost, state_of(table, item, GUARDING))


@triton.jit
def count_listed(table, chunk_cost, counts, starts, listed, histogram, LISTED_AT_ONCE: tl.constexpr):
    """`count_digit` among the listed keys, by cost: chunk by chunk, for the entries of one cost the same."""
    state = state_of(table, 0, False)
    chunks = tl.load(table + CHUNKS)
    size = tl.where((tl.load(state + PLACE) == INSIDE) & (tl.load(state + SHIFT) >= 0), chunks, 0)
    for chunk in range(tl.program_id(0).to(tl.int64), size, tl.num_programs(0)):
        cost = tl.load(chunk_cost + chunk)
        begin = tl.load(starts + chunk)
        end = begin + tl.load(counts + INSIDE * chunks + chunk)
        for first in range(begin, end, LISTED_AT_ONCE):
            at = first + tl.arange(0, LISTED_AT_ONCE)
            add_digits(histogram, loaded_keys(tl.load(listed + at, mask=at < end, other=0)), cost, state)


@triton.jit
def pick_digit(table, histogram, GUARDING: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr):
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
            guarded = rank * tl.load(row_of(table, item) + COST) if COSTED else rank
            tl.atomic_add(table + GUARDED, guarded, sem="relaxed")
        if rank == 0:
            settle(state, TOP64 if WIDE else TOP32, 0, 0, ANYWHERE)
        else:
            up_to_here = tl.cumsum(counts, 0, reverse=True)  # from the largest
            digit = tl.max(tl.where(up_to_here >= rank, bucket, 0), 0)
            tl.store(state + KEY, tl.load(state + KEY) | (digit.to(tl.int64) << shift))
            tl.store(state + RANK, rank - tl.sum(tl.where(bucket > digit, counts, 0), 0))
            tl.store(state + EQUAL, tl.sum(tl.where(bucket == digit, counts, 0), 0))
            tl.store(state + SHIFT, shift - DIGIT_BITS)
