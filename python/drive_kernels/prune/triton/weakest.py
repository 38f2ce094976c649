"""The weakest survivor's key, where no entry on the threshold survives (step 4 of launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import loaded_keys
from .selection import candidates, state_of
from .tables import CHUNKS, EQUAL, HIGH, INSIDE, KEY, LISTED, NEXT, PLACE, RANK, TOP32, TOP64


@triton.jit
def look_above(
    table, chunk_item, listed,
    BLOCK: tl.constexpr, FRESH: tl.constexpr, WIDE: tl.constexpr, COSTED: tl.constexpr,
):  # fmt: skip
    """NEXT: where costs are high, what is left for the entries on the threshold seldom suffices for one.
    Above a threshold inside the bracket lies a listed key, or HIGH, which is an entry's."""
    state = state_of(table, 0, False)
    threshold = tl.load(state + KEY)
    among_listed = tl.load(state + PLACE) == INSIDE
    top = TOP64 if WIDE else TOP32
    at_most = tl.where(among_listed, tl.load(state + HIGH), top)
    size = tl.load(table + CHUNKS)
    if among_listed:
        size = tl.cdiv(tl.load(table + LISTED), BLOCK)
    size = tl.where((tl.load(state + RANK) == 0) & (tl.load(state + EQUAL) > 0), size, 0)
    for block in range(tl.program_id(0).to(tl.int64), size, tl.num_programs(0)):
        if among_listed:
            at = block * BLOCK + tl.arange(0, BLOCK)
            keys = loaded_keys(tl.load(listed + at, mask=at < tl.load(table + LISTED), other=0))
        else:
            keys, _ = candidates(table, chunk_item, block, -1, False, BLOCK, FRESH, WIDE, COSTED)
        keys = keys.to(tl.int64)
        above = tl.min(tl.where(keys > threshold, keys, at_most), 0)
        tl.atomic_min(state + NEXT, above, mask=above < top, sem="relaxed")
