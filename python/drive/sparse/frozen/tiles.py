"""How the convolution's loop walks: which outputs are in registers, which are together, which inputs.

By a model of the loop, in cycles of one core: on AMD's Zen 4 and 5 an FMA whose input comes from L1 takes 1.15 to
1.3 (a load each), one from L2 1.9 to 2.2, the sums of an output a load and a store a block of input channels.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass

import torch

from .lanes import LANES, Lanes

_VECTOR = LANES * 4
_FROM_L1, _FROM_L2 = 1.2, 1.9
_OUTPUT = 12.0  # an output in a block: a mispredicted end of its taps, its pointers
_L2_BYTES = 32.0  # a cycle


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


@functools.lru_cache(maxsize=4096)
def choose(
    lanes: Lanes,
    channels: int,
    outputs: int,
    taps: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    threads: int,
) -> Walk:
    """The fastest by the model.

    Args:
        lanes: of the output.
        channels: of a group of the input.
        outputs: channels of the output.
        taps: non-zeros of the weight.
        kernel: what it spans, dilation included.
        stride: as taken here.
        groups: of the convolution.
        threads: that share one unit; 1: each has its own.
    """
    together = outputs // groups if groups > 1 else outputs
    if together < LANES:  # all groups at once: each output looks at its own channels
        together, groups = outputs, 1
        in_blocks = [channels]
    else:
        in_blocks = sorted({min(channels, c) for c in (8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)})
        in_blocks.append(channels)
    blocks = sorted({-(-together // parts) for parts in (1, 2, 3, 4, 6, 8)})
    best: Walk | None = None
    for tile in _tiles(lanes):
        for in_block in in_blocks:
            for block in blocks:
                cycles = _cycles(lanes, channels, outputs, taps, kernel, stride, threads, tile, block, in_block)
                if best is None or cycles < best.cycles:
                    best = Walk(tile, block, in_block, cycles)
    assert best is not None
    return best


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


def _cycles(
    lanes: Lanes,
    channels: int,
    outputs: int,
    taps: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    threads: int,
    tile: tuple[int, int],
    block: int,
    in_block: int,
) -> float:
    sums = tile[0] * tile[1]
    seen = math.prod((t - 1) * s + k for t, s, k in zip(tile, stride, kernel, strict=True))
    in_bytes = seen * in_block * _VECTOR
    in_blocks = -(-channels // in_block)
    waiting = block * sums * _VECTOR  # sums between blocks of input channels, in L2
    if in_blocks > 1 and waiting > 600_000:
        return math.inf
    fits = in_bytes + 4096 <= 0.75 * _l1()
    fma = _FROM_L1 if fits else _FROM_L2
    latency = max(1.0, 3.0 / sums)
    tile_count = -(-lanes.rows // tile[0]) * -(-lanes.cols // tile[1])
    out_blocks = -(-outputs // block)
    each = taps * (sums * fma * latency + 0.5)
    each += outputs * in_blocks * (_OUTPUT + 1.1 * sums)
    if fits:  # into L1 once a block
        each += out_blocks * in_blocks * in_bytes / _L2_BYTES
    items = tile_count * out_blocks
    share = -(-items // threads) * threads / items  # the slowest thread's
    if threads > 1 and items < 4 * threads and items % threads:
        share = max(share, 1.0)
    return each * tile_count * share
