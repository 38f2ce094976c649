"""How the convolution's loop walks: which outputs are in registers, which are together, which inputs.

By a model of the loop, fitted to 8,700 measured layers, tiles and blocks (AMD EPYC, Zen 5): what it chooses
takes 1.04 times as long as the best that was measured, in the mean of 64 layers, 1.2 times at worst.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass

import torch

from .lanes import LANES, Lanes

_VECTOR = LANES * 4
# Cycles a vector (4 GHz): an FMA whose input comes from L1 or L2, and what lies between by how much the
# tile's input exceeds L1; a broadcast; an output in a block of inputs; its sums' way to L2 and back; its way
# out; a line's way to L1.
_FROM_L1, _FROM_L2, _EXCESS = 0.62, 0.99, (0.7, 4.0)
_BROADCAST, _OUTPUT, _SUM, _OUT, _LINE = 0.13, 2.9, 0.95, 2.2, 0.6
_LATENCY = 3.0  # so many sums hide an FMA's latency
MOST_WAITING = 900_000  # bytes of sums between blocks of inputs: nearly L2


@functools.cache
def _l1() -> int:
    try:
        return os.sysconf("SC_LEVEL1_DCACHE_SIZE") or 32768
    except (ValueError, OSError):
        return 32768


@functools.cache
def most_sums() -> int:
    """Positions whose sums fit this processor's registers."""
    return int(torch.ops.drive.engine_sums())


@dataclass(frozen=True)
class Walk:
    """Rows and columns of a tile; output channels, and input channels of a group, that are together."""

    tile: tuple[int, int]
    block: int
    in_block: int
    cycles: float  # of all tiles and outputs, as the model has it


@dataclass(frozen=True)
class Work:
    """A convolution.

    lanes: of the output.
    channels: of a group of the input.
    outputs: channels of the output.
    taps: non-zeros of the weight.
    kernel: what it spans, dilation included.
    stride: as taken here.
    threads: that share one unit; 1: each has its own.
    """

    lanes: Lanes
    channels: int
    outputs: int
    taps: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    threads: int


@functools.lru_cache(maxsize=4096)
def choose(work: Work, groups: int) -> Walk:
    """The fastest by the model."""
    together = work.outputs // groups
    in_blocks = {min(work.channels, c) for c in (8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)}
    if groups > 1 and together < LANES:  # all groups at once: each output looks at its own channels
        together, in_blocks = work.outputs, set()
    walks = [
        Walk(tile, block, in_block, _cycles(work, tile, block, in_block))
        for tile in _tiles(work.lanes)
        for in_block in sorted(in_blocks | {work.channels})
        for block in sorted({-(-together // parts) for parts in (1, 2, 3, 4, 6, 8)})
    ]
    return min(walks, key=lambda walk: walk.cycles)


def _tiles(lanes: Lanes) -> list[tuple[int, int]]:
    """Tiles that cut rows and columns evenly, as far as these can be."""
    cols = {-(-lanes.cols // n) for n in range(1, lanes.cols + 1)}
    rows = {-(-lanes.rows // n) for n in range(1, lanes.rows + 1)}
    most = most_sums()
    return [
        (y, x)
        for y in rows
        for x in cols
        if y <= 4 and (x <= 8 or (x == 14 and lanes.cols % 14 == 0)) and y * x <= most
    ]


def _cycles(work: Work, tile: tuple[int, int], block: int, in_block: int) -> float:
    sums = tile[0] * tile[1]
    in_blocks, out_blocks = -(-work.channels // in_block), -(-work.outputs // block)
    if in_blocks > 1 and block * sums * _VECTOR > MOST_WAITING:
        return math.inf
    seen = math.prod((t - 1) * s + k for t, s, k in zip(tile, work.stride, work.kernel, strict=True))
    in_bytes = seen * in_block * _VECTOR
    low, high = _EXCESS
    missing = min(1.0, max(0.0, (in_bytes / _l1() - low) / (high - low)))
    fma = (_FROM_L1 + (_FROM_L2 - _FROM_L1) * missing) * max(1.0, _LATENCY / sums)
    cycles = work.taps * (sums * fma + _BROADCAST) + work.outputs * in_blocks * _OUTPUT
    cycles += work.outputs * sums * (_OUT + (in_blocks - 1) * _SUM)
    if work.kernel == (1, 1):  # some lines no tap may ask for
        lines = in_bytes / _VECTOR * min(1.0, work.taps / out_blocks / work.channels)
    else:
        lines = in_bytes / _VECTOR
    cycles += out_blocks * in_blocks * lines * (1 - missing) * _LINE
    tiles = -(-work.lanes.rows // tile[0]) * -(-work.lanes.cols // tile[1])
    items = tiles * out_blocks
    slowest = -(-items // work.threads) * work.threads / items
    return cycles * tiles * slowest
