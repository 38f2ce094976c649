"""How the scores of a round become what a step can rank."""

from __future__ import annotations

import math
import struct

import hypothesis.strategies as st
import torch
from hypothesis import example, given, settings

from drive.rounds import ordered


def _float32(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


ugly = st.one_of(
    st.integers(0, 2**32 - 1).map(_float32).filter(math.isfinite),
    st.sampled_from((0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFF)).map(_float32),
    st.sampled_from((0.0, -0.0, 1.0, -1.0)),
)


def _neighbours(given: tuple[float, int]) -> list[float]:
    """A number and the next ones below it."""
    found = [torch.tensor(given[0])]
    for _ in range(given[1]):
        found.append(torch.nextafter(found[-1], torch.tensor(-torch.inf)))
    return [float(value) for value in found if value.isfinite()]


def _flat(lists: list[list[float]]) -> list[float]:
    return [value for values in lists for value in values]


@given(st.lists(st.tuples(ugly, st.integers(0, 2)).map(_neighbours), min_size=1, max_size=25).map(_flat))
@example([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, -(2.0**-126), 3.4028235e38, -3.4028235e38])
@settings(max_examples=200, deadline=None)
def test_signed_order_is_that_of_sort(values: list[float]):
    """Any float32 numbers: -0.0 is 0.0, denormals count, ties stay ties."""
    given = torch.tensor(values, dtype=torch.float32)
    found = ordered(given)
    assert found.dtype == torch.float64 and (found >= 0).all() and not found.signbit().any()
    assert torch.equal(found.argsort(stable=True), given.sort(stable=True).indices)
    assert torch.equal(found[:, None] < found, given[:, None] < given)
