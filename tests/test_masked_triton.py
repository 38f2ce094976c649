"""The masked ops in Triton without a GPU: interpreted, compiled ahead of time, disassembled. test_masked.py
runs them on a device."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import CAPABILITIES, Launch, assert_passes, expect, expect_known_spills, interpreted
from triton_launches import masked as launches


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """The tests in interpreted_masked.py, while those of this file run."""
    with interpreted("interpreted_masked.py") as process:
        yield process


def test_launches_are_all_there():
    for name in ("convolve", "correlate"):
        for key, values in (("WIDE", (False, True)), ("PRECISION", ("ieee", "tf32")), ("ROWS", (64, 128))):
            found = {x.constant(key) for x in launches() if x.kernel.fn.__name__ == name}
            assert found >= set(values), (name, key)


def multiplies_on_tensor_cores(launch: Launch) -> bool:
    types = dict(launch.types)
    return "*fp32" not in (types.get("source"), types.get("input")) or launch.constant("PRECISION") == "tf32"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_launches_compile(capability: int):
    """To tensor cores, and loads ahead of them."""
    for launch in launches():
        ptx = launch.compile(capability).asm["ptx"]
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        if launch.constant("ROWS") < 64:  # of a warp group
            instruction = "mma.sync"
        if multiplies_on_tensor_cores(launch):
            expect(instruction in ptx, f"{launch}: no {instruction}")
        else:
            assert "mma" not in ptx, f"{launch}: products of float32 are rounded"
        expect("cp.async" in ptx, f"{launch}: no loads ahead")
    expect_known_spills(launches(), capability)


def test_in_the_interpreter(interpreter: subprocess.Popen[str]):
    """Against float64: tests/interpreted_masked.py."""
    assert_passes(interpreter)
