"""How a node of a segment reads its input: as it lies, or after its lanes have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .lanes import Lanes


@dataclass(frozen=True)
class Read:
    """What a window (of a convolution, of a pool) needs of its input."""

    lanes: Lanes  # in which it has to lie
    moved: tuple[int, int]  # every so many-th row and column of it
    stride: tuple[int, int]  # of the window, then
    border: tuple[int, int]  # rows above and below, columns left and right
    lowest: bool = False  # beyond the plane: the lowest number, not 0


def read_window(
    input: Lanes,
    output: Lanes,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Read:
    """Of outputs in these lanes, whose input lies in those now."""
    sy, sx = stride
    rows, cols = sy * output.rows, sx * output.cols
    as_it_is = input.grid == output.grid and (input.rows, input.cols) == (rows, cols)
    if not as_it_is and tuple(kernel) == (1, 1) and tuple(padding) == (0, 0):
        lanes = output.resized(output.height, output.width, output.rows, output.cols)
        return Read(lanes, (sy, sx), (1, 1), (0, 0))
    lanes = output.resized(input.height, input.width, rows, cols)
    before = padding
    after = [(k - 1) * d - p - (s - 1) for k, d, p, s in zip(kernel, dilation, padding, stride, strict=True)]
    border = (max(before[0], after[0], 0), max(before[1], after[1], 0))
    return Read(lanes, (1, 1), (sy, sx), border)


def read_plain(output: Lanes) -> Read:
    """Position by position."""
    return Read(output, (1, 1), (1, 1), (0, 0))


def looks_beyond(
    plane: Sequence[int],
    output: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Does any window look beyond its input's plane?"""
    return any(
        p > 0 or (o - 1) * s + (k - 1) * d + 1 > i
        for i, o, k, s, p, d in zip(plane, output, kernel, stride, padding, dilation, strict=True)
    )
