"""The masked ops in Triton without a GPU: interpreted, compiled ahead of time, disassembled. test_masked.py
runs them on a device."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import EACH_CAPABILITY, Launch, assert_passes, expect, expect_known_spills, interpreted
from triton_launches import CONVS
from triton_launches import masked as launches

from drive_kernels.linear import masked_triton


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """The tests in helpers/interpreted/masked.py, while those of this file run."""
    with interpreted("masked.py") as process:
        yield process


def test_launches_are_all_there():
    for name in ("convolve", "correlate"):
        for key, values in (("WIDE", (False, True)), ("PRECISION", ("ieee", "tf32")), ("ROWS", (64, 128))):
            found = {x.constant(key) for x in launches() if x.kernel.fn.__name__ == name}
            assert found >= set(values), (name, key)


def multiplies_on_tensor_cores(launch: Launch) -> bool:
    types = dict(launch.types)
    return "*fp32" not in (types.get("source"), types.get("input")) or launch.constant("PRECISION") == "tf32"


@EACH_CAPABILITY
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
            rounds = masked_triton.ROUNDS and capability == 100 and launch.name == "linear.convolve"
            left_to_reference = rounds and "*u8" in dict(launch.types).values()
            assert ("mma" in ptx) == left_to_reference, f"{launch}: products of float32 are rounded"
        expect("cp.async" in ptx, f"{launch}: no loads ahead")
    expect_known_spills(launches(), capability)


@pytest.mark.parametrize("major", (9, 10))
@pytest.mark.parametrize("learned", (False, True))
def test_what_triton_rounds_is_left_to_the_reference(
    learned: bool, major: int, monkeypatch: pytest.MonkeyPatch
):
    """On a device that is not here, with a Triton before 3.8."""
    _, _, mask, _ = CONVS[0].tensors(torch.float32, learned)
    input = mock.Mock(dtype=torch.float32, is_cuda=True)
    monkeypatch.setattr(masked_triton, "ROUNDS", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert masked_triton._left_to_reference(input, mask) == (major == 10 and not learned)


def test_in_the_interpreter(interpreter: subprocess.Popen[str]):
    """Against float64: helpers/interpreted/masked.py."""
    assert_passes(interpreter)
