"""Of the entries on a threshold, which is the last that survives (step 4 of launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import loaded_keys, row_of
from .selection import candidates, state_of
from .tables import (
    ANYWHERE,
    CHUNKS,
    CUT,
    CUT_CHUNK,
    CUT_RANK,
    EQUAL,
    FIRST_CHUNK,
    INSIDE,
    KEY,
    LOGICAL_WALK,
    NUMEL,
    PLACE,
    RANK,
    WALK,
)


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
    GUARDING: tl.constexpr, BLOCK: tl.constexpr,
    FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """Ties by chunk, where not all of them survive."""
    lane = tl.arange(0, BLOCK)
    chunks = tl.load(table + CHUNKS)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        state = state_of(table, tl.load(chunk_item + chunk), GUARDING)
        if is_cut(state):
            place = tl.load(state + PLACE)
            if place == ANYWHERE:
                keys, _ = candidates(table, chunk_item, chunk, -1, GUARDING, BLOCK, FRESH, WIDE, COSTED)
                equal = equal_to(keys, state)
            else:
                equal = tl.load(counts + place * chunks + chunk)
                if place == INSIDE:
                    at = tl.load(starts + chunk) + lane
                    equal = equal_to(loaded_keys(tl.load(listed + at, mask=lane < equal, other=0)), state)
            tl.store(ties + chunk, equal)


@triton.jit
def locate(table, chunk_cost, ties_up_to, GUARDING: tl.constexpr, BLOCK: tl.constexpr, COSTED: tl.constexpr):
    """One program a selection: the chunk in which its surviving ties end, by cost maybe before the first.
    ties_up_to: running sum of the ties, or of what they cost."""
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
        left = rank - tl.load(ties_up_to + low - 1, mask=low > 0, other=0)
        if COSTED and not GUARDING:
            left = left // tl.load(chunk_cost + low)
        tl.store(state + CUT_RANK, left)


@triton.jit
def disorderly_item(table, chunk_item):
    """The item in which the global selection cuts ties, if its walk is not in row-major order; else -1."""
    chunk = tl.load(state_of(table, 0, False) + CUT_CHUNK)
    item = tl.load(chunk_item + chunk, mask=chunk >= 0, other=0)
    row = row_of(table, item)
    in_order = tl.load(row + WALK) == tl.load(row + LOGICAL_WALK)
    return tl.where((chunk < 0) | in_order, -1, item)


@triton.jit
def recount(
    table, chunk_item, ties,
    BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """Ties by chunk of the row-major order, in the disorderly item: in others the order does not matter."""
    item = disorderly_item(table, chunk_item)
    if item >= 0:
        state = state_of(table, item, False)
        first = tl.load(row_of(table, item) + FIRST_CHUNK)
        end = first + tl.cdiv(tl.load(row_of(table, item) + NUMEL), BLOCK)
        for chunk in range(first + tl.program_id(0), end, tl.num_programs(0)):
            keys, _ = candidates(table, chunk_item, chunk, item, False, BLOCK, FRESH, WIDE, COSTED)
            tl.store(ties + chunk, equal_to(keys, state))


@triton.jit
def cut(
    table, chunk_item, ties_up_to,
    GUARDING: tl.constexpr, BLOCK: tl.constexpr,
    FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """One program a selection: the global index of the last surviving tie, or that before the chunk."""
    state = state_of(table, tl.program_id(0), GUARDING)
    chunk = tl.load(state + CUT_CHUNK)
    if chunk >= 0:
        item = tl.load(chunk_item + chunk)
        keys, first = candidates(table, chunk_item, chunk, item, GUARDING, BLOCK, FRESH, WIDE, COSTED)
        tie = keys == tl.load(state + KEY).to(keys.dtype)
        survive = tl.load(state + CUT_RANK)
        last = tie & (tl.cumsum(tie.to(tl.int32), 0) == survive)
        if COSTED and not GUARDING:
            before = tl.load(ties_up_to + chunk - 1, mask=chunk > 0, other=0)
            tl.store(state + RANK, 0, mask=(survive == 0) & (before == 0))
        tl.store(state + CUT, first - 1 + tl.sum(tl.where(last, tl.arange(1, BLOCK + 1), 0), 0))
