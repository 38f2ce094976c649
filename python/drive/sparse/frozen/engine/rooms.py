"""Where values lie while a program runs: one arena, planned once.

What one phase alone uses shares a region, a copy of it for each thread; memory is used again as soon as
nothing reads it any more. What a later phase reads has a room of its own: for all units, or, where a thread
goes on with its own units at once, a ring of those that the next one needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .program import Program, Room

# A unit's size is rounded up so that units, whose sizes are powers of two often, do not all fall into the
# same sets of the caches.
_PAGE, _SKEW = 1024, 64 * 37


@dataclass
class Step:
    """What a step reads and writes, and how it is written down when rooms have their places."""

    reads: list[Room]
    writes: list[Room]
    write: Callable[[Program], None]


@dataclass
class Phase:
    """Steps with units of one size: so many in the batch, each made of `ratio` of the phase before in its
    level.

    chained: threads go through it with units of their own (csrc/sparse/engine/run.cpp).
    """

    level: int
    units: int
    ratio: int
    chained: bool
    steps: list[Step]


@dataclass
class _Life:
    room: Room
    first_phase: int
    first: int
    last_phase: int
    last: int


def room_size(floats: int) -> int:
    return -(-floats // _PAGE) * _PAGE + _SKEW


def arrange(phases: Sequence[Phase], threads: int) -> int:
    """Give every room its place; returns how many floats all of them take."""
    lives: dict[int, _Life] = {}
    for p, phase in enumerate(phases):
        for i, step in enumerate(phase.steps):
            for room in (*step.reads, *step.writes):
                life = lives.setdefault(id(room), _Life(room, p, i, p, i))
                life.last_phase, life.last = p, i
    shared = [life for life in lives.values() if life.first_phase == life.last_phase]
    region = _region(shared)
    for life in shared:
        life.room.thread = region
    top = region * threads
    for life in lives.values():
        if life.first_phase == life.last_phase:
            continue
        room, made, read = life.room, phases[life.first_phase], phases[life.last_phase]
        room.base, room.unit = top, room.floats
        if read.chained and read.level == made.level:
            between = phases[life.first_phase + 1 : life.last_phase + 1]
            room.ring = math.prod(phase.ratio for phase in between)
            room.thread = room.ring * room.floats
            top += room.thread * threads
        else:
            top += room.floats * made.units
    return top


def _region(lives: Sequence[_Life]) -> int:
    """Offsets for rooms that one phase uses: the lowest that is free from its first step to its last."""
    placed: list[_Life] = []
    top = 0
    for life in lives:
        taken = sorted(
            (p.room.base, p.room.base + p.room.floats)
            for p in placed
            if p.first_phase == life.first_phase and p.first <= life.last and life.first <= p.last
        )
        at = 0
        for begin, end in taken:
            if at + life.room.floats <= begin:
                break
            at = max(at, end)
        life.room.base = at
        placed.append(life)
        top = max(top, at + life.room.floats)
    return top
