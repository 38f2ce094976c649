"""A selection, the global one or the guard of an item: its state, what it is about, what survives by it."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import any_chunk, begin_of, plain_chunk, row_of
from .tables import CUT, FIRST, GUARDS, KEY, LOGICAL_WALK, MIN_KEEP, PLAIN, SELECTION, STATE, WALK


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
    GUARDING: tl.constexpr, BLOCK: tl.constexpr,
    FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """Keys of any chunk, 0 for entries that the selection is not about, and its first global index."""
    item = tl.load(chunk_item + chunk)
    row = row_of(table, item)
    begin = begin_of(row, chunk, BLOCK)
    logical = item == logical_item
    in_order = tl.load(row + WALK) == tl.load(row + LOGICAL_WALK)
    if (begin < tl.load(row + PLAIN) * BLOCK) & (in_order | (logical == 0)):
        keys = plain_chunk(row, begin, BLOCK, FRESH, WIDE, COSTED)
    else:
        keys = any_chunk(table, row, begin, logical, BLOCK, FRESH, WIDE, COSTED)
    first = tl.load(row + FIRST) + begin
    if not GUARDING:
        keys = mark_guarded(table, item, keys, first, 0, BLOCK)
    return keys, first
