"""The work list, and a bracket for the threshold from a sample (step 1 of launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import gather_keys, row_of, walk_of
from .selection import chosen, state_of
from .tables import (
    BUDGET,
    CHUNKS,
    COST,
    COST_BEFORE,
    FIRST,
    FIRST_CHUNK,
    GUARDED,
    HIGH,
    ITEMS,
    LAST,
    LOW,
    MIN_KEEP,
    PLAIN,
    PLAIN_BEFORE,
    PLAIN_CHUNKS,
    SAMPLES,
    TOP32,
    TOP64,
    TOTAL,
)


@triton.jit
def item_of(table, x, FIELD: tl.constexpr):
    """The items in which chunks or places by cost [BLOCK] lie: the last with a FIELD up to that."""
    item = tl.zeros_like(x)
    reach = tl.load(table + ITEMS)
    while reach > 1:
        half = reach // 2
        item = tl.where(tl.load(row_of(table, item + half) + FIELD) <= x, item + half, item)
        reach -= half
    return item


@triton.jit
def list_chunks(table, chunk_item, chunk_cost, work, work_item, BLOCK: tl.constexpr, COSTED: tl.constexpr):
    """The item and the cost of every chunk; the work list, plain chunks first, and their items."""
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
    if COSTED:
        tl.store(chunk_cost + chunk, tl.load(row + COST), mask=real)
    tl.store(work + at, chunk.to(tl.int32), mask=real)
    tl.store(work_item + at, item.to(tl.int32), mask=real)


@triton.jit
def scrambled(x):
    """Pseudo-random numbers for indices (splitmix64, as in prune/sampling.h): samples must not fall in step
    with a tensor's shape, and a step should depend on nothing but its input."""
    x = x.to(tl.uint64) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def sample(
    table, keys,
    SAMPLES_A_PROGRAM: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """Keys of entries at random by cost, one of each of SAMPLES parts of all entries that cost the same."""
    part = tl.program_id(0) * SAMPLES_A_PROGRAM + tl.arange(0, SAMPLES_A_PROGRAM)
    total = tl.load(table + TOTAL)
    random = (scrambled(part) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53: in [0, 1)
    at = (part + random) * total.to(tl.float64) / tl.load(table + SAMPLES).to(tl.float64)
    index = tl.minimum(at.to(tl.int64), total - 1)
    item = item_of(table, index, COST_BEFORE)
    row = row_of(table, item)
    walk, dims = walk_of(table, row, False)
    position = index - tl.load(row + COST_BEFORE)
    if COSTED:
        position = position // tl.load(row + COST)
        index = tl.load(row + FIRST) + position
    found = gather_keys(row, walk, dims, tl.max(dims, 0), position, position >= 0, FRESH, WIDE, COSTED)
    if tl.load(table + MIN_KEEP) > 0:
        guard = state_of(table, item, True)
        found = tl.where(chosen(found, index, guard, 0, LAST), 0, found)
    tl.store(keys + part, found)


@triton.jit
def bracket(table, keys, SIGMAS: tl.constexpr, WIDE: tl.constexpr):
    """LOW and HIGH from the sample's sorted keys: very likely the threshold lies between them."""
    samples = tl.load(table + SAMPLES)
    budget = tl.load(table + BUDGET) - tl.load(table + GUARDED)
    share = budget.to(tl.float64) / tl.load(table + TOTAL).to(tl.float64)
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
