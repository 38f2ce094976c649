"""Which lanes planes of each size are cut into.

Planes of one size are cut alike, so that what is added or concatenated lies alike. Where a strided
convolution finds its input in pieces twice (three times ...) as large as its output's, in the same grid, it
reads it as it is; elsewhere lanes move first. Chosen by what both cost, along the sizes as they follow one
another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .lanes import LANES, Lanes, cut

_FMA, _MOVE, _HALO = 0.8, 10.0, 4.0  # cycles a vector

# What reading or writing a vector costs beside, by how much memory a layer's input and output take.
_TRAFFIC = ((700_000, 1.0), (12_000_000, 3.0), (math.inf, 10.0))


@dataclass
class Stage:
    """Planes of one size, and what is computed of them for one image: taps and channels, for all their
    pixels."""

    plane: tuple[int, int]
    taps: float = 0.0  # multiply-adds a pixel
    channels: float = 0.0  # that need a border
    traffic: float = 0.0  # channels that are read and written, by all layers
    widest: float = 0.0  # and by one of them at most
    strides: set[tuple[int, int]] = field(default_factory=set)  # by which it comes from the stage before
    moved: float = 0.0  # channels that come from there


def assign(stages: Sequence[Stage], batch: int, threads: int, one_size: bool) -> dict[tuple[int, int], Lanes]:
    """Lanes by plane.

    Args:
        stages: in the order in which they are reached.
        batch: images.
        threads: that work.
        one_size: must all lanes hold the same number of images? Else it may grow from stage to stage.
    """
    options = _options(stages, batch)
    best: list[dict[Lanes, tuple[float, Lanes | None]]] = []
    for i, stage in enumerate(stages):
        costs: dict[Lanes, tuple[float, Lanes | None]] = {}
        for lanes in options[i]:
            own = _cost(stage, lanes, batch, threads)
            if i == 0:
                costs[lanes] = (own, None)
                continue
            rivals = [
                (total + _between(before, lanes, stage, batch), before)
                for before, (total, _) in best[-1].items()
                if (before.images == lanes.images if one_size else before.images <= lanes.images)
            ]
            if rivals:
                total, before_it = min(rivals, key=lambda r: r[0])
                costs[lanes] = (own + total, before_it)
        best.append(costs)
    found: dict[tuple[int, int], Lanes] = {}
    chosen: Lanes | None = min(best[-1], key=lambda lanes: best[-1][lanes][0])
    for stage, costs in zip(reversed(stages), reversed(best), strict=True):
        assert chosen is not None
        found[stage.plane] = chosen
        chosen = costs[chosen][1]
    return found


def _options(stages: Sequence[Stage], batch: int) -> list[list[Lanes]]:
    """Natural pieces, and those that suit what the next stage's may be."""
    found: list[list[Lanes]] = []
    after: list[Lanes] = []
    strides: set[tuple[int, int]] = set()
    for stage in reversed(stages):
        options = {
            cut(images, down, LANES // images // down, *stage.plane): None
            for images in (1, 2, 4, 8, 16)
            if images < 2 * batch
            for down in (1, 2, 4, 8, 16)
            if LANES // images % down == 0
        }
        for lanes in after:
            for sy, sx in strides:
                rows, cols = lanes.rows * sy, lanes.cols * sx
                if rows * lanes.down >= stage.plane[0] and cols * lanes.across >= stage.plane[1]:
                    options[lanes.resized(*stage.plane, rows, cols)] = None
        after, strides = list(options), stage.strides
        found.append(after)
    return found[::-1]


def _units(lanes: Lanes, batch: int) -> int:
    return -(-batch // lanes.images)


def _cost(stage: Stage, lanes: Lanes, batch: int, threads: int) -> float:
    units = _units(lanes, batch)
    few = 1 + 1 / lanes.positions  # few sums: latency, and a broadcast for each
    together = 1.05 if units % threads else 1.0
    # Taps of one pixel next to nothing are as many as those of another: positions count, not pixels.
    work = stage.taps * lanes.positions * _FMA * few
    border = 2 * (lanes.rows + lanes.cols) + 4 + (0 if lanes.full else lanes.rows + lanes.cols)
    bytes_of_layer = stage.widest * lanes.positions * LANES * 4
    memory = stage.traffic * lanes.positions * next(cost for most, cost in _TRAFFIC if bytes_of_layer <= most)
    return (work * together + stage.channels * border * _HALO + memory) * units


def _between(before: Lanes, lanes: Lanes, stage: Stage, batch: int) -> float:
    if before.grid == lanes.grid and all(
        (before.rows, before.cols) == (lanes.rows * sy, lanes.cols * sx) for sy, sx in stage.strides
    ):
        return 0.0
    area = max((sy * sx for sy, sx in stage.strides), default=1)
    return stage.moved * lanes.positions * area * _MOVE * _units(lanes, batch)
