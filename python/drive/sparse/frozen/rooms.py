"""Where values lie while a program runs: one arena, planned once.

What one phase alone uses shares a region, a copy of it for each thread; memory is used again as soon as nothing
reads it any more. What a later phase reads has a room of its own: for all units, or, where a thread goes on
with its own units at once, a ring of those that the next one needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .program import Program, Room

# A unit's size is rounded up so that units, whose sizes are powers of two often, do not all fall into the same sets
# of the caches.
_PAGE, _SKEW = 1024, 64 * 37


@dataclass
class Step:
    """What a step reads and writes, and how it is written down when rooms have their places."""

    phase: int
    reads: list[Room]
    writes: list[Room]
    write: Callable[[Program], None]


def room_size(floats: int) -> int:
    return -(-floats // _PAGE) * _PAGE + _SKEW


def arrange(steps: Sequence[Step], units: Sequence[int], ratios: Sequence[int], chained: int, threads: int) -> int:
    """Give every room its place; returns how many floats all of them take.

    Args:
        steps: in their order.
        units: of each phase.
        ratios: units of the phase before that one of each phase consists of.
        chained: so many phases form a chain (csrc/sparse/engine/run.cpp).
        threads: of the chain.
    """
    spans: dict[int, tuple[Room, int, int, int, int]] = {}  # first and last step, first and last phase
    for i, step in enumerate(steps):
        for room in (*step.reads, *step.writes):
            _, first, _, phase, _ = spans.get(id(room), (room, i, i, step.phase, step.phase))
            spans[id(room)] = (room, first, i, phase, step.phase)
    region = _region(spans.values())
    top = region * threads
    for room, _, _, first, last in spans.values():
        if first == last:
            room.thread = region
            continue
        size = room.floats
        room.base, room.unit = top, size
        if last < chained:
            room.ring = 1
            for phase in range(first + 1, last + 1):
                room.ring *= ratios[phase]
            room.thread = room.ring * size
            top += room.thread * threads
        else:
            top += size * units[first]
    return top


def _region(spans: object) -> int:
    """Offsets for the rooms that one phase uses: the lowest that is free from its first step to its last."""
    placed: list[tuple[int, int, int, int, int]] = []  # phase, first, last, begin, end
    top = 0
    for room, first, last, phase, last_phase in spans:  # type: ignore[attr-defined]
        if phase != last_phase:
            continue
        taken = sorted((b, e) for p, f, l, b, e in placed if p == phase and f <= last and first <= l)
        at = 0
        for begin, end in taken:
            if at + room.floats <= begin:
                break
            at = max(at, end)
        room.base = at
        placed.append((phase, first, last, at, at + room.floats))
        top = max(top, at + room.floats)
    return top
