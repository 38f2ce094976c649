"""The Triton kernels of packed_linear and block_linear: without a GPU as far as they go, and on one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from linear_cases import BlockCase, PackedCase, assert_close
from linear_layers import KINDS, layer_of, masked
from torch import nn

from drive.sparse import convert, report
from drive_kernels.linear import block

triton = pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import (  # noqa: E402
    EACH_CAPABILITY,
    Launch,
    assert_passes,
    expect,
    expect_known_spills,
    interpreted,
)
from triton_launches import linear as launches  # noqa: E402

from drive_kernels.linear import packed_triton  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """The tests in helpers/interpreted/linear.py, while those of this file run."""
    with interpreted("linear.py") as process:
        yield process


def name_of(launch: Launch) -> str:
    return str(launch.kernel.fn.__name__)


def test_launches_are_all_there():
    assert {name_of(launch) for launch in launches()} == {"multiply", "multiply_few", "add_up", "sample"}


MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@EACH_CAPABILITY
def test_all_launches_compile(capability: int):
    """Products of matrices are left to tensor cores, and no registers are spilled."""
    for launch in launches():
        ptx = launch.compile(capability).asm["ptx"]
        if name_of(launch) in ("multiply", "sample"):
            # the newer instructions take 64 or 128 rows at once: where there are fewer, the older one serves
            found = MATRIX[capability] in ptx or "mma.sync" in ptx
            expect(found, f"{launch}: not on tensor cores")
        if name_of(launch) == "multiply" and launch.constant("BLOCK") is None:
            expect(MATRIX[capability] in ptx, f"{launch}: no {MATRIX[capability]}")
    expect_known_spills(launches(), capability)


def test_in_the_interpreter(interpreter: subprocess.Popen[str]):
    """Against float64: helpers/interpreted/linear.py."""
    assert_passes(interpreter)


def test_registered_for_cuda():
    for name in ("packed_linear", "block_linear", "block_linear_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drive::{name}", "CUDA")


ops = torch.ops.drive

# ---- On a device ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", packed_triton.DTYPES)
@pytest.mark.parametrize("rows", (1, 3, 16, 100))
def test_triton_on_the_device(rows: int, dtype: torch.dtype):
    for shape in ((1024, 1024), (70, 130)):
        for density in (0.0, 0.1, 1.0):
            case = PackedCase(rows, *shape, density, dtype, device="cuda")
            found = ops.packed_linear(*case.arguments())
            assert_close(found, case.expected())
            assert torch.equal(found, ops.packed_linear(*case.arguments())), "sums in another order"
    for size in block.BLOCKS:
        case = BlockCase(rows, 256, 512, size, 0.5, dtype, device="cuda")
        assert_close(ops.block_linear(*case.arguments()), case.expected())
        found = ops.block_linear_backward(*case.backward_arguments())
        for mine, theirs in zip(found, case.expected_gradients(), strict=True):
            assert_close(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_triton_layers_on_the_device(kind: Any):
    layer, mask, x = layer_of(kind)
    layer, mask, x = layer.cuda(), mask.cuda(), x.cuda()
    ours = kind.from_dense(layer, mask)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), masked(layer, mask, x), rtol=1.6e-2, atol=1e-2)


@pytest.mark.gpu
def test_triton_convert_on_the_device():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).cuda().eval()
    masks = {f"{i}.weight": torch.rand_like(model[i].weight) < 0.1 for i in (0, 2)}
    for i in (0, 2):
        model[i].weight.data.mul_(masks[f"{i}.weight"])
    x = torch.randn(1, 512, device="cuda")
    ours = convert(model, masks, x)
    assert {"dense", "packed"} == report(ours).choices[0].seconds.keys()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match="convert: deterministic must be False for a model on CUDA, got True"
    ):
        convert(model, masks, x, deterministic=True)
