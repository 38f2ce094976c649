"""Where the pixels of a batch lie: 16 lanes, each a piece of an image's plane, that are never neighbours.

A field is [rows + 2 top][channels][cols + 2 left][16] floats; what lies beyond a piece's edges, in the
field's border, is what its neighbours hold there, or zeros. So whatever a convolution's tap looks at is one
vector at a distance that is the same for all positions, strided or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LANES = 16


@dataclass(frozen=True)
class Lanes:
    """How planes of height x width are cut: `images` of them, each into down x across pieces of rows x
    cols."""

    images: int
    down: int
    across: int
    rows: int
    cols: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.images, self.down, self.across)

    @property
    def positions(self) -> int:
        return self.rows * self.cols

    @property
    def full(self) -> bool:
        """Is every lane of every position inside the plane?"""
        return self.rows * self.down == self.height and self.cols * self.across == self.width

    def resized(self, height: int, width: int, rows: int, cols: int) -> Lanes:
        """The same grid of other pieces, of another plane."""
        return Lanes(self.images, self.down, self.across, rows, cols, height, width)


def cut(images: int, down: int, across: int, height: int, width: int) -> Lanes:
    """The smallest pieces for a plane."""
    return Lanes(images, down, across, -(-height // down), -(-width // across), height, width)


@dataclass(frozen=True)
class Field:
    """Lanes with channels and a border."""

    lanes: Lanes
    channels: int
    top: int = 0
    left: int = 0

    @property
    def pitch(self) -> int:
        """Vectors of a channel's row."""
        return self.lanes.cols + 2 * self.left

    @property
    def floats(self) -> int:
        return (self.lanes.rows + 2 * self.top) * self.channels * self.pitch * LANES


def _places(lanes: Lanes, top: int, left: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, y, x and whether that is inside the plane, of each lane at each position; [rows, cols, 16]."""
    lane = torch.arange(LANES)
    y = torch.arange(-top, lanes.rows + top)[:, None, None] + lane // lanes.across % lanes.down * lanes.rows
    x = torch.arange(-left, lanes.cols + left)[None, :, None] + lane % lanes.across * lanes.cols
    inside = (y >= 0) & (y < lanes.height) & (x >= 0) & (x < lanes.width)
    image = (lane // (lanes.down * lanes.across)).expand(inside.shape)
    return image, y.expand(inside.shape), x.expand(inside.shape), inside


def _bits(inside: Tensor) -> Tensor:
    """[..., 16] bool as one number each."""
    return (inside.long() << torch.arange(LANES)).sum(-1)


def as_uint16(numbers: Tensor) -> Tensor:
    return torch.where(numbers >= 1 << 15, numbers - (1 << 16), numbers).to(torch.int16)


@lru_cache(maxsize=256)
def plain_offsets(field: Field, image: int, borders: bool) -> tuple[Tensor, Tensor]:
    """Where lanes are in a contiguous [N, C, H, W] whose images are so many entries apart.

    Returns:
        offsets [positions, 16] int32 in the first channel, and masks [positions] of uint16 (as int16).
    """
    lanes = field.lanes
    i, y, x, inside = _places(lanes, field.top * borders, field.left * borders)
    offsets = torch.where(inside, i * image + y * lanes.width + x, 0)
    return offsets.flatten(0, 1).int().contiguous(), as_uint16(_bits(inside).flatten())


@lru_cache(maxsize=256)
def masks(lanes: Lanes) -> Tensor:
    """[rows * cols] of uint16 (as int16): which lanes are inside the plane."""
    return as_uint16(_bits(_places(lanes, 0, 0)[3]).flatten())


@dataclass(frozen=True)
class Moves:
    """How a field's vectors are put together from those of others; see MoveStep in csrc/sparse/engine."""

    positions: Tensor  # [n, 3] int32: offset in the target, first piece, pieces
    pieces: Tensor  # [m, 2] int32: offset in the source; shuffle and mask, 16 bits each
    shuffles: Tensor  # [s, 16] int32
    rows: Tensor  # [r + 1] int32: first position of each row of work


@lru_cache(maxsize=256)
def halo(field: Field) -> Moves:
    """A field's own border, and zeros where pieces reach beyond the plane."""
    lanes, source = field.lanes, (field.lanes, field.channels, field.top, field.left)
    image, y, x, inside = _places(lanes, field.top, field.left)
    rows, cols = inside.shape[:2]
    border = torch.ones(rows, cols, dtype=torch.bool)
    border[field.top : rows - field.top, field.left : cols - field.left] = False
    return _moves(field, border | ~inside.all(-1), image, y, x, inside, source, 0)


@lru_cache(maxsize=256)
def between(source: Field, unit: int, target: Field, stride: tuple[int, int]) -> Moves:
    """From other lanes, whose units are so many floats apart: every vector, or those of every stride-th row
    and column of the source's plane."""
    image, y, x, inside = _places(target.lanes, target.top, target.left)
    everything = torch.ones(inside.shape[:2], dtype=torch.bool)
    lanes = source.lanes
    inside = inside & (y * stride[0] < lanes.height) & (x * stride[1] < lanes.width)
    y, x = y * stride[0], x * stride[1]
    return _moves(
        target, everything, image, y, x, inside, (lanes, source.channels, source.top, source.left), unit
    )


def _moves(
    target: Field,
    wanted: Tensor,
    image: Tensor,
    y: Tensor,
    x: Tensor,
    inside: Tensor,
    source: tuple[Lanes, int, int, int],
    unit: int,
) -> Moves:
    lanes, channels, _, left = source
    row = channels * (lanes.cols + 2 * left) * LANES
    offset = image // lanes.images * unit + y % lanes.rows * row + x % lanes.cols * LANES
    lane = (image % lanes.images * lanes.down + y // lanes.rows) * lanes.across + x // lanes.cols
    offsets, lane_of, there = offset.tolist(), lane.tolist(), inside.tolist()
    target_row = target.channels * target.pitch * LANES
    shuffles: dict[tuple[int, ...], int] = {}
    positions: list[tuple[int, int, int]] = []
    pieces: list[tuple[int, int]] = []
    rows = [0]
    for r, wanted_row in enumerate(wanted.tolist()):
        for c in (c for c, w in enumerate(wanted_row) if w):
            first = len(pieces)
            for at, lanes_of_it in _by_offset(offsets[r][c], there[r][c]):
                index = [0] * LANES
                for i in lanes_of_it:
                    index[i] = lane_of[r][c][i]
                shuffle = shuffles.setdefault(tuple(index), len(shuffles))
                pieces.append((at, shuffle | sum(1 << i for i in lanes_of_it) << 16))
            positions.append(
                ((r - target.top) * target_row + (c - target.left) * LANES, first, len(pieces) - first)
            )
        rows.append(len(positions))
    packed = torch.tensor(pieces or [(0, 0)], dtype=torch.int64)
    packed[:, 1] = torch.where(packed[:, 1] >= 1 << 31, packed[:, 1] - (1 << 32), packed[:, 1])
    return Moves(
        torch.tensor(positions, dtype=torch.int32).view(-1, 3),
        packed.int(),
        torch.tensor(list(shuffles) or [(0,) * LANES], dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int32),
    )


def _by_offset(offsets: list[int], there: list[bool]) -> Iterator[tuple[int, list[int]]]:
    found: dict[int, list[int]] = {}
    for lane, (offset, is_there) in enumerate(zip(offsets, there, strict=True)):
        if is_there:
            found.setdefault(offset, []).append(lane)
    return iter(found.items())
