"""The masked ops in Triton without a GPU: interpreted, compiled ahead of time, disassembled. test_masked.py
runs them on a device."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_masked import Case

pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import Launch, assert_passes, disassembled, interpreted, recorded

from drive_kernels import masked_triton

LINEAR = Case((4096, 512), (1024, 512))
CONVS = (
    Case((32, 64, 16, 16), (128, 64, 3, 3), padding=(1, 1), layout="channels_last"),
    Case((4, 256, 15, 15), (192, 128, 3, 3), (2, 2), (1, 1), groups=2),
)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """The tests in interpreted_masked.py, while those of this file run."""
    with interpreted("interpreted_masked.py") as process:
        yield process


def call(case: Case, dtype: torch.dtype, learned: bool) -> None:
    tensors = case.tensors(dtype, learned)
    output = getattr(masked_triton, case.name)(*tensors, *case.options)
    backward = getattr(masked_triton, f"{case.name}_backward")
    backward(output, *tensors[:3], *case.options, [True, True, learned, True])


@cache
def launches() -> frozenset[Launch]:
    """For layers of usual sizes: all dtypes and masks for one, and every other way through the launchers."""
    with recorded() as found:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for learned in (False, True):
                call(CONVS[0], dtype, learned)
        for dtype in (torch.float32, torch.bfloat16):
            call(LINEAR, dtype, True)
            call(CONVS[1], dtype, False)
        large = masked_triton.TUNING._replace(least_pixels=1 << 30, narrow=0)
        with mock.patch.object(masked_triton, "TUNING", large):  # no pieces, offsets in int64
            call(CONVS[0], torch.bfloat16, True)
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        call(LINEAR, torch.float32, False)
        matmul.fp32_precision = before
        call(Case((1, 512), (1024, 512)), torch.bfloat16, False)
    return frozenset(found)


def test_launches_are_all_there():
    for name in ("convolve", "correlate"):
        for key, values in (("WIDE", (False, True)), ("PRECISION", ("ieee", "tf32")), ("ROWS", (64, 128))):
            found = {x.constant(key) for x in launches() if x.kernel.fn.__name__ == name}
            assert found >= set(values), (name, key)


def multiplies_on_tensor_cores(launch: Launch) -> bool:
    types = dict(launch.types)
    return "*fp32" not in (types.get("source"), types.get("input")) or launch.constant("PRECISION") == "tf32"


@pytest.mark.parametrize("capability", (80, 90, 100))
def test_all_launches_compile(capability: int, tmp_path: Path):
    """To tensor cores, and loads ahead of them. A register or two may be spilled: for sm_100, ptxas prefers
    that to one program less on a multiprocessor."""
    for launch in launches():
        compiled = launch.compile(capability)
        ptx = compiled.asm["ptx"]
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        if launch.constant("ROWS") < 64:  # of a warp group
            instruction = "mma.sync"
        assert (instruction in ptx) == multiplies_on_tensor_cores(launch), launch
        assert "cp.async" in ptx, launch
        spilled = [op for op in disassembled(compiled, tmp_path) if op.startswith(("LDL", "STL"))]
        assert len(spilled) <= 2, launch


def test_in_the_interpreter(interpreter: subprocess.Popen[str]):
    """Against float64: tests/interpreted_masked.py."""
    assert_passes(interpreter)
