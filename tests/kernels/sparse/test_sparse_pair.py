"""drive::sparse_conv2d_pair against two dense convolutions, whatever the shapes and in however many steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on
from sparse_cases import TOLERANCE, Conv
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.sparse import pair
from drive_kernels.sparse.pattern import pattern_of

ops = torch.ops.drive

# the two convolutions; the second's batch, height and width follow
PAIRS = (
    (Conv(32, 4, 6, 8, 8), Conv(0, 6, 5, 0, 0)),
    (Conv(17, 4, 6, 9, 11, stride=(2, 2)), Conv(0, 6, 4, 0, 0, groups=2)),
    (Conv(5, 4, 6, 7, 12, padding=(0, 1)), Conv(0, 6, 4, 0, 0, padding=(0, 2))),
    (Conv(16, 3, 8, 5, 4, kernel=(1, 1), padding=(0, 0)), Conv(0, 8, 4, 0, 0, kernel=(5, 1), padding=(4, 0))),
    (Conv(16, 4, 4, 6, 6, padding=(3, 3)), Conv(0, 4, 3, 0, 0, kernel=(1, 1), padding=(2, 1))),
    (
        Conv(3, 4, 4, 12, 9, kernel=(3, 2), stride=(1, 3), dilation=(2, 1), groups=4),
        Conv(0, 4, 6, 0, 0, kernel=(2, 3), dilation=(3, 2)),
    ),
    (Conv(1, 2, 2, 1, 1), Conv(0, 2, 2, 0, 0)),
    (Conv(0, 2, 2, 4, 4), Conv(0, 2, 2, 0, 0)),
)
# so large that they are worked on some rows at a time: some 130 KB a row between the two
TALL = (
    (Conv(16, 90, 100, 41, 20), Conv(0, 100, 8, 0, 0)),
    (Conv(16, 8, 150, 40, 20, stride=(2, 1)), Conv(0, 150, 8, 0, 0, kernel=(5, 3), padding=(1, 1))),
    (Conv(16, 60, 150, 30, 12), Conv(0, 150, 4, 0, 0, padding=(5, 1), dilation=(2, 1))),
    # no room for enough rows: one convolution after the other
    (Conv(16, 700, 700, 4, 20), Conv(0, 700, 4, 0, 0)),
)


def arguments(
    first: Conv, second: Conv, dtype: torch.dtype, density: float, relu: tuple[bool, bool]
) -> tuple[list[Any], Tensor]:
    """Of the op, and what the second dense convolution gives."""
    x, weight, bias, mask = first.inputs(dtype, density)
    _, weight2, bias2, mask2 = second.inputs(dtype, density, seed=1)
    between = F.conv2d(x, weight, bias, *first.options[1:])
    between = between.relu() if relu[0] else between
    expected = F.conv2d(between, weight2, bias2, *second.options[1:])
    residual = torch.randn_like(expected)
    expected = expected + residual
    expected = expected.relu() if relu[1] else expected
    return [
        ops.to_blocks(x),
        [weight[mask], weight2[mask2]],
        [*pattern_of(mask, first.groups), *pattern_of(mask2, second.groups)],
        [bias, bias2],
        [*first.shape, *second.shape],
        *([*a, *b] for a, b in zip(first.options[1:4], second.options[1:4], strict=True)),
        [first.groups, second.groups],
        ops.to_blocks(residual),
        list(relu),
    ], expected


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_pair_right(
    first: Conv,
    second: Conv,
    dtype: torch.dtype,
    density: float = 0.3,
    relu: tuple[bool, bool] = (True, True),
) -> None:
    given, expected = arguments(first, second, dtype, density, relu)
    found = ops.from_blocks(ops.sparse_conv2d_pair(*given), first.batch)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("density", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("convs", PAIRS, ids=str)
def test_pair(convs: tuple[Conv, Conv], dtype: torch.dtype, density: float):
    with threads(1):
        assert_pair_right(*convs, dtype, density)


@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("convs", TALL, ids=str)
def test_some_rows_at_a_time(convs: tuple[Conv, Conv], count: int):
    """Threads that the blocks cannot be shared out to make one convolution after the other."""
    with threads(count):
        assert_pair_right(*convs, torch.float64, 0.05)


def test_blocks_of_one_thread_do_not_disturb_each_other():
    with threads(1):
        assert_pair_right(Conv(40, 60, 90, 33, 20), Conv(0, 90, 5, 0, 0), torch.float64, 0.05)


@pytest.mark.parametrize("relu", ((False, False), (True, False), (False, True)))
def test_either_relu(relu: tuple[bool, bool]):
    assert_pair_right(*PAIRS[0], torch.float64, relu=relu)


def test_no_residual():
    given, expected = arguments(*PAIRS[0], torch.float64, 0.3, (True, False))
    residual = ops.from_blocks(given[-2], 32)
    given[-2] = None
    found = ops.from_blocks(ops.sparse_conv2d_pair(*given), 32)
    torch.testing.assert_close(found, expected - residual, **TOLERANCE[torch.float64])


def check_variant() -> None:
    """Run in a process with another instruction set."""
    for convs in (*PAIRS, TALL[0]):
        assert_pair_right(*convs, torch.float32, 0.1)


@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_variants(capability: str, tmp_path: Path):
    run_on(capability, tmp_path, check_variant)


def test_opcheck_and_reference():
    given, _ = arguments(*PAIRS[1], torch.float64, 0.5, (True, True))
    torch.library.opcheck(ops.sparse_conv2d_pair, tuple(given))
    torch.testing.assert_close(
        ops.sparse_conv2d_pair(*given), pair.pair_reference(*given), **TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize(
    ("at", "value", "message"),
    (
        (0, torch.ones(1, 4, 8, 8), "input must be blocked"),
        (0, torch.ones(2, 3, 8, 8, 16), "input must have 4 channels, got 3"),
        (1, [torch.ones(3)], "values, bias and groups must be two each"),
        (3, [torch.ones(6), torch.ones(6)], "bias must have 6 and 5 entries"),
        (4, [6, 4, 3, 3, 5, 7, 3, 3], "input must have 7 channels, got 6"),
        (4, [6, 4, 3, 3], "shape must be 8 numbers"),
        (5, [1, 1, 2, 2], "the second stride must be 1"),
        (9, torch.ones(2, 5, 8, 9, 16), "residual must have shape"),
    ),
)
def test_refuses(at: int, value: object, message: str):
    given, _ = arguments(*PAIRS[0], torch.float32, 0.5, (True, True))
    given[at] = value
    with pytest.raises(ValueError, match=f"drive::sparse_conv2d_pair: {message}"):
        ops.sparse_conv2d_pair(*given)
