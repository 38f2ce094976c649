"""Weights that are several matrices, cut into them: for what counts per matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from drive.layers import Weight

Box = tuple[slice, ...]  # in every dimension, all of them given


def boxes(shape: Sequence[int], axes: Weight) -> list[Box]:
    """Where the matrices of a weight lie, in the order of their first entries.

    Args:
        shape: of the whole weight.
        axes: how the layer multiplies by it.
    """
    pieces = [1] * len(shape)
    for axis in axes.matrices:
        pieces[axis] = max(1, shape[axis])
    if axes.parts > 1:
        pieces[axes.stacked] *= axes.parts
    lengths = [size // count for size, count in zip(shape, pieces, strict=True)]
    spans = (
        [slice(i * n, (i + 1) * n) for i in range(count)] for n, count in zip(lengths, pieces, strict=True)
    )
    return list(product(*spans))


def cut(shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Weight]) -> list[tuple[int, Box]]:
    """The matrices of all weights: which weight it is of, by position, and where in it."""
    return [(t, box) for t, (name, shape) in enumerate(shapes.items()) for box in boxes(shape, axes[name])]


def entries(box: Box) -> int:
    """How many there are in it."""
    count = 1
    for span in box:
        count *= span.stop - span.start
    return count
