"""The two passes over all entries: survey and apply (steps 2 and 5 of launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import (
    any_chunk,
    begin_of,
    loaded_keys,
    mask_of,
    offsets,
    plain_chunk,
    row_of,
    scatter_zeros,
    score_of,
    top_of,
    walk_of,
    zero_lost,
)
from .selection import chosen, mark_guarded, state_of
from .tables import (
    ABOVE,
    ALIVE,
    CAPACITY,
    CHUNKS,
    DTYPE,
    FIRST,
    FIRST_CHUNK,
    HIGH,
    INSIDE,
    ITEMS,
    KEY,
    LAST,
    LISTED,
    LOW,
    MASK,
    MIN_KEEP,
    NEXT,
    NONFINITE,
    NUMEL,
    ON_HIGH,
    ON_LOW,
    OPEN,
    PLACE,
    PLAIN,
    PLAIN_CHUNKS,
    RANK,
    SQUARED,
    SURE,
    WEIGHT,
)
from .ties import disorderly_item, is_cut


@triton.jit
def across(x, BLOCK: tl.constexpr):
    """A chunk's entries in another order: the 8 that a thread holds side by side come far apart, the first
    ones of all threads next to each other. A store to scattered places in that order moves nothing."""
    return tl.reshape(tl.trans(tl.reshape(x, [BLOCK // 8, 8])), [BLOCK])


@triton.jit
def store_pairs(pairs, i, x, BLOCK: tl.constexpr):
    """Two bits an entry of the i-th plain chunk."""
    four = tl.sum(tl.reshape(x, [BLOCK // 4, 4]) << 2 * tl.arange(0, 4)[None, :], 1)
    tl.store(pairs + i * (BLOCK // 4) + tl.arange(0, BLOCK // 4), four.to(tl.uint8))


@triton.jit
def load_pairs(pairs, i, BLOCK: tl.constexpr):
    """What `store_pairs` stored."""
    four = tl.load(pairs + i * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.int32)
    return tl.reshape(four[:, None] >> 2 * tl.arange(0, 4)[None, :] & 3, [BLOCK])


@triton.jit
def survey(
    table, work, work_item, counts, starts, sums, listed, pairs, nonfinite,
    PLAIN_ONES: tl.constexpr, BLOCK: tl.constexpr,
    FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
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
        keys = plain_chunk(row, begin, BLOCK, FRESH, WIDE, COSTED)
    else:
        keys = any_chunk(table, row, begin, False, BLOCK, FRESH, WIDE, COSTED)

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
    scored = keys
    keys = mark_guarded(table, item, keys, tl.load(row + FIRST) + begin, 0, BLOCK)
    inside = (keys > low) & (keys < high)
    if PLAIN_ONES:  # here, for further down `scored` would still be held: 110 registers rather than 80
        sure = (keys >= high) | (keys != scored)
        store_pairs(pairs, i, tl.where(sure, SURE, tl.where(inside, OPEN, 0)), BLOCK)
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


@triton.jit
def add_kept(kept, item, keep):
    tl.atomic_add(kept + item, tl.sum(keep.to(tl.int32), 0).to(tl.int64), sem="relaxed")


@triton.jit
def bits_decide(table):
    """Do the survey's bits and list say who survives: all that is SURE, and of what is OPEN those with keys
    above the threshold or on it, up to the cut?"""
    state = state_of(table, 0, False)
    place = tl.load(state + PLACE)
    return (place == INSIDE) | ((place == ON_HIGH) & (is_cut(state) == 0))


@triton.jit
def apply_bits(
    table, chunk_item, work, work_item, pairs, starts, listed, kept,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a plain chunk, where the bits decide: no score is computed again."""
    i = tl.program_id(0).to(tl.int64)
    chunk = tl.load(work + i)
    item = tl.load(work_item + i)
    if bits_decide(table) & (item != disorderly_item(table, chunk_item)):
        row = row_of(table, item)
        begin = begin_of(row, chunk, BLOCK)
        lane = tl.arange(0, BLOCK)
        pair = load_pairs(pairs, i, BLOCK)
        is_open = pair == OPEN
        place = tl.cumsum(is_open.to(tl.int32), 0) - 1  # keys are listed in the order of the entries
        keys = loaded_keys(tl.load(listed + tl.load(starts + chunk) + place, mask=is_open, other=0))
        first = tl.load(row + FIRST) + begin
        keep = (pair == SURE) | chosen(keys, lane, state_of(table, item, False), first, BLOCK)
        add_kept(kept, item, keep)
        tl.store(mask_of(row) + begin + lane, keep.to(tl.int8))
        zero_lost(row, begin, keep, BLOCK, WIDE)


@triton.jit
def survivors(table, item, keys, first, BLOCK: tl.constexpr):
    """Which of a chunk's entries survive, by the keys of all of them."""
    marked = mark_guarded(table, item, keys, first, top_of(keys), BLOCK)
    return chosen(marked, tl.arange(0, BLOCK), state_of(table, item, False), first, BLOCK)


@triton.jit
def apply_keys(
    table, chunk_item, work, work_item, totals, kept,
    BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """All plain chunks, where the bits do not decide."""
    disorderly = disorderly_item(table, chunk_item)
    end = tl.where(bits_decide(table), 0, tl.load(table + PLAIN_CHUNKS))
    for i in range(tl.program_id(0).to(tl.int64), end, tl.num_programs(0)):
        chunk = tl.load(work + i)
        item = tl.load(work_item + i)
        if item != disorderly:
            row = row_of(table, item)
            begin = begin_of(row, chunk, BLOCK)
            keys = plain_chunk(row, begin, BLOCK, FRESH, WIDE, COSTED)
            keep = survivors(table, item, keys, tl.load(row + FIRST) + begin, BLOCK)
            add_kept(kept, item, keep)
            tl.store(mask_of(row) + begin + tl.arange(0, BLOCK), keep.to(tl.int8))
            if tl.load(totals + NONFINITE) == 0:
                zero_lost(row, begin, keep, BLOCK, WIDE)


@triton.jit
def apply_others(
    table, chunk_item, work, totals, kept,
    BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
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
        keys = any_chunk(table, row, begin, logical, BLOCK, FRESH, WIDE, COSTED)
        keep = survivors(table, item, keys, tl.load(row + FIRST) + begin, BLOCK)
        add_kept(kept, item, keep)
        position = begin + tl.arange(0, BLOCK)
        inside = position < tl.load(row + NUMEL)
        walk, dims = walk_of(table, row, logical)
        w_at, _, m_at, _ = offsets(walk, dims, dims, position)
        tl.store(tl.load(row + MASK).to(tl.pointer_type(tl.int8)) + m_at, keep.to(tl.int8), mask=inside)
        if tl.load(totals + NONFINITE) == 0:
            dtype = tl.load(row + DTYPE) + tl.zeros_like(position)
            scatter_zeros(tl.load(row + WEIGHT), dtype, w_at, inside & (keep == 0))


@triton.jit
def finish(table, totals, total, scores, WIDE: tl.constexpr, COSTED: tl.constexpr):
    """scores: z of the weakest survivor (inf if nothing survives), sum of |S|; NaN if one is not finite."""
    state = state_of(table, 0, False)
    otherwise = tl.load(state + NEXT) if COSTED else LAST
    weakest = tl.where(tl.load(state + RANK) > 0, tl.load(state + KEY), otherwise)
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
