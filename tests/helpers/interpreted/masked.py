"""The masked ops' Triton kernels in the interpreter, on CPU tensors, against float64: test_masked_triton.py
runs these tests in a process of their own, for TRITON_INTERPRET=1 must be set before Triton is imported."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from ahead_of_time import patch_once
from masked_cases import CASES, Case, assert_right
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from drive_kernels.linear import masked_triton

patch_once()

# Small tiles and pieces, so that small inputs have many.
SMALL = masked_triton.TUNING._replace(rows=32, inner=32, columns=16, band=2, least_pixels=16)
_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _dot_of_floats(self, a, b, *rest):
    """The interpreter's own multiplies the bits of bfloat16 as if they were integers."""
    if a.dtype == tl.bfloat16:
        a, b = (self.create_fp_ext(t, tl.float32) for t in (a, b))
    return _dot(self, a, b, *rest)


def _cast_to_nearest(self, source, dtype):
    """As GPUs round to bfloat16; the interpreter's own cuts bits off."""
    if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, dtype)
    rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
    return TensorHandle(rounded.numpy(), tl.bfloat16)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot_of_floats)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _cast_to_nearest)


@pytest.mark.parametrize(
    ("dtype", "learned", "narrow"),
    ((torch.float32, False, SMALL.narrow), (torch.bfloat16, True, 0), (torch.float16, False, 0)),
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_tiles(
    case: Case, dtype: torch.dtype, learned: bool, narrow: int, monkeypatch: pytest.MonkeyPatch
):
    """Offsets are in int64 where `narrow` is 0."""
    monkeypatch.setattr(masked_triton, "TUNING", SMALL._replace(narrow=narrow))
    assert_right(masked_triton, case, dtype, learned)


@pytest.mark.parametrize("case", CASES[:3] + CASES[6:8], ids=str)
def test_real_tiles(case: Case):
    assert_right(masked_triton, case, torch.float32, True)


def test_pieces_are_made(monkeypatch: pytest.MonkeyPatch):
    made = []
    fill = masked_triton.masked.fill_from_product
    monkeypatch.setattr(masked_triton, "TUNING", SMALL)
    monkeypatch.setattr(masked_triton.masked, "fill_from_product", lambda *given: made.append(fill(*given)))
    assert_right(masked_triton, CASES[0], torch.float32, True)
    assert made
