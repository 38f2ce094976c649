"""Programs of the engine: steps as numbers, in the order of the structs in csrc/sparse/engine/program.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drive.sparse.frozen.graph import ACTIVATIONS

from .lanes import Field, Moves

CONV, MOVE, ENTER, LEAVE, MEAN, POOL, ADD, SCALE = range(8)


@dataclass
class Room:
    """A value's memory in the arena, once it is known."""

    floats: int  # a unit
    base: int = -1
    unit: int = 0
    thread: int = 0
    ring: int = 0


@dataclass(frozen=True)
class Place:
    """A value: a slice, from channel `first` on, of the field in a room."""

    room: Room
    field: Field
    first: int = 0

    def numbers(self) -> list[int]:
        room, lanes = self.room, self.field.lanes
        return [
            room.base, room.unit, room.thread, room.ring, self.first,
            self.field.channels, lanes.rows, lanes.cols, self.field.top, self.field.left,
        ]  # fmt: skip


_NOWHERE = [-1, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def _numbers(place: Place | None) -> list[int]:
    return _NOWHERE if place is None else place.numbers()


@dataclass
class Program:
    """Steps, and the constants that they use."""

    numbers: list[int] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    _known: dict[int, int] = field(default_factory=dict)

    def constant(self, tensor: Tensor) -> int:
        """Its number; the same tensor's is the same."""
        if id(tensor) not in self._known:
            self._known[id(tensor)] = len(self.constants)
            self.constants.append(tensor)
        return self._known[id(tensor)]

    def _step(self, kind: int, items: int, rest: Sequence[int]) -> None:
        self.numbers += [kind, 3 + len(rest), items, *rest]

    def conv(
        self,
        input: Place,
        output: Place,
        residual: Place | None,
        packed: tuple[Tensor, Tensor, Tensor],
        bias: Tensor,
        block: int,
        in_blocks: int,
        stride: Sequence[int],
        tile: tuple[int, int],
        act: str,
    ) -> None:
        lanes, outputs = output.field.lanes, bias.numel()
        items = -(-lanes.rows // tile[0]) * -(-lanes.cols // tile[1]) * -(-outputs // block)
        rest = [
            *input.numbers(),
            *output.numbers(),
            *_numbers(residual),
            *map(self.constant, (*packed, bias)),
        ]
        self._step(CONV, items, [*rest, outputs, block, in_blocks, *stride, *tile, ACTIVATIONS.index(act)])

    def move(
        self, source: Place, target: Place, units: int, moves: Moves, channels: int, parts: int, lowest: bool
    ) -> None:
        rows = moves.rows.numel() - 1
        chunks = 1 if rows >= 4 * parts else min(parts, channels)
        tables = map(self.constant, (moves.positions, moves.pieces, moves.shuffles, moves.rows))
        rest = [*source.numbers(), *target.numbers(), units, *tables, rows, chunks, channels, int(lowest)]
        self._step(MOVE, rows * chunks, rest)

    def enter(self, plain: int, target: Place, offsets: Tensor, masks: Tensor, channels: int) -> None:
        lanes = target.field.lanes
        area = lanes.height * lanes.width
        tables = [self.constant(offsets), self.constant(masks), area, channels]
        rest = [plain, area * channels, lanes.images, *target.numbers(), *tables]
        self._step(ENTER, lanes.rows + 2 * target.field.top, rest)

    def leave(self, source: Place, plain: int, offsets: Tensor, masks: Tensor, channels: int) -> None:
        lanes = source.field.lanes
        area = lanes.height * lanes.width
        tables = [self.constant(offsets), self.constant(masks), area, channels]
        self._step(LEAVE, lanes.rows, [*source.numbers(), plain, area * channels, lanes.images, *tables])

    def mean(self, source: Place, plain: int, masks: Tensor, channels: int, parts: int) -> None:
        lanes = source.field.lanes
        rest = [plain, lanes.images, self.constant(masks), lanes.height * lanes.width, channels]
        self._step(MEAN, min(parts, channels), [*source.numbers(), *rest])

    def pool(
        self,
        input: Place,
        output: Place,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        channels: int,
    ) -> None:
        rest = [*input.numbers(), *output.numbers(), *kernel, *stride, *padding, *dilation, channels]
        self._step(POOL, output.field.lanes.rows, rest)

    def add(self, a: Place, b: Place | None, output: Place, channels: int, act: str) -> None:
        rest = [*a.numbers(), *_numbers(b), *output.numbers(), channels, ACTIVATIONS.index(act)]
        self._step(ADD, output.field.lanes.rows, rest)

    def scale(self, a: Place, output: Place, plain: int, channels: int) -> None:
        rest = [*a.numbers(), *output.numbers(), plain, output.field.lanes.images, channels]
        self._step(SCALE, output.field.lanes.rows, rest)

    def tensor(self) -> Tensor:
        return torch.tensor(self.numbers, dtype=torch.int64)
