"""Numbers that callers give: Python's own, numpy's and fractions. Truth values and tensors are none."""

from __future__ import annotations

from math import inf
from numbers import Integral, Real

MOST = 2**63 - 1  # what the kernels' integers hold


def whole(
    op: str, name: str, value: object, least: int = 0, most: int = MOST, *, words: str | None = None
) -> int:
    """An integer argument as Python's own.

    Args:
        op, name: whose it is, and what it is called, for the error message.
        least, most: what it may be.
        words: what it must be, in words. Default: by `least` and `most`.

    Raises:
        ValueError: it is none, or another.
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not least <= number <= most:
        too_large = number is not None and number > most
        expected = words or f"an integer >= {least}" + (f" and <= {most}" if too_large else "")
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r:.80}")
    return number


def real(value: object) -> float | None:
    """A number as Python's own float; None: it is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # of integers and fractions
        return inf
