"""The masked ops against convolutions and products in float64. `-k triton` is for a device."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from masked_cases import CASES, TOLERANCE, Case, assert_right

from drive_kernels.linear import masked

ops = torch.ops.drive
# Of up to 12,544 products.
LONG_SUMS = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-3},
}
# The reference rounds half floats on its way, too, where values are larger than in the end.
ON_THE_WAY = {
    **TOLERANCE,
    torch.float16: {"rtol": 2**-9, "atol": 2**-6},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-3},
}


@pytest.mark.parametrize("learned", (False, True))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case, dtype: torch.dtype, learned: bool):
    assert_right(ops, case, dtype, learned, tolerances=ON_THE_WAY)


@pytest.mark.gpu
@pytest.mark.parametrize("learned", (False, True))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_on_the_device(case: Case, dtype: torch.dtype, learned: bool):
    """The dispatcher's choice: float64 is left to PyTorch."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drive::{case.name}", "CUDA")
    assert_right(ops, case, dtype, learned, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("wide", (False, True))
def test_triton_large_on_the_device(wide: bool, monkeypatch: pytest.MonkeyPatch):
    """Many tiles, and pieces of the gradients to weight and mask."""
    from drive_kernels.linear import masked_triton

    if wide:
        monkeypatch.setattr(masked_triton, "TUNING", masked_triton.TUNING._replace(narrow=0))
    for case in (
        Case((1000, 520), (390, 520)),
        Case((16, 72, 28, 28), (136, 72, 3, 3), padding=(1, 1), layout="channels_last"),
    ):
        for dtype in LONG_SUMS:
            assert_right(ops, case, dtype, True, "cuda", LONG_SUMS)


@pytest.mark.parametrize("learned", (False, True))
@pytest.mark.parametrize("case", (CASES[2], CASES[6], CASES[7]), ids=str)
def test_gradcheck(case: Case, learned: bool):
    tensors = case.tensors(torch.float64, learned)
    leaves = [t.requires_grad_(t.is_floating_point()) for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *t: getattr(ops, case.name)(*t, *case.options), leaves, fast_mode=True
    )


@pytest.mark.parametrize("learned", (False, True))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, learned: bool):
    tensors = case.tensors(torch.float32, learned)
    leaves = [t.requires_grad_(t.is_floating_point()) for t in tensors]
    grad = torch.randn_like(getattr(ops, case.name)(*tensors, *case.options))
    torch.library.opcheck(getattr(ops, case.name).default, (*leaves, *case.options))
    arguments = grad, *(t.detach() for t in leaves[:3]), *case.options, [True, True, learned, True]
    torch.library.opcheck(getattr(ops, f"{case.name}_backward").default, arguments)


def test_layouts():
    case = CASES[7]
    input, weight, mask, bias = case.tensors(torch.float32, True)
    output = ops.masked_conv2d(input, weight, mask, bias, *case.options)
    found = ops.masked_conv2d_backward(output, input, weight, mask, *case.options, [True] * 4)
    for tensor in (output, *found[:3]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_what_is_pruned_may_be_anything():
    weight, mask = torch.tensor([[torch.nan, 2.0]]), torch.tensor([[False, True]])
    assert ops.masked_linear(torch.ones(1, 2), weight, mask, None) == 2


def test_meta_tensors():
    case = CASES[6]
    tensors = case.tensors(torch.bfloat16, False)
    output = ops.masked_conv2d(*(t.to("meta") for t in tensors), *case.options)
    assert (output.shape, output.dtype) == (ops.masked_conv2d(*tensors, *case.options).shape, torch.bfloat16)


def good() -> dict[str, Any]:
    input, weight, mask, bias = Case((2, 4, 5, 5), (6, 2, 3, 3)).tensors(torch.float32, False)
    return {
        "input": input, "weight": weight, "mask": mask, "bias": bias,
        "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    (
        ({"input": torch.ones(2, 3, 5, 5)}, ValueError, r"input must be \[N, 4, H, W\], got \[2, 3, 5, 5\]"),
        ({"input": torch.ones(2, 4, 5, 5).int()}, TypeError, "input must be float32, .* got torch.int32"),
        (
            {"input": torch.ones(2, 4, 5, 2)},
            ValueError,
            r"no smaller than the kernel, \[3, 3\], got \[5, 2\]",
        ),
        ({"weight": torch.ones(6, 2, 3)}, ValueError, r"mask must have shape \[6, 2, 3\], got"),
        (
            {"weight": torch.ones(6, 2, 3, 3).double()},
            TypeError,
            "weight must be torch.float32, as input is, got",
        ),
        ({"mask": torch.ones(6, 2, 3, 3).int()}, TypeError, "mask must be torch.bool or torch.float32, got"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[6\], got \[5\]"),
        (
            {"bias": torch.ones(6).half()},
            TypeError,
            "bias must be torch.float32, as input is, got torch.float16",
        ),
        ({"stride": [0, 1]}, ValueError, r"stride must be two numbers >= 1, got \[0, 1\]"),
        ({"padding": [1]}, ValueError, r"padding must be two numbers >= 0, got \[1\]"),
        ({"groups": 4}, ValueError, "groups must divide 6 output channels, got 4"),
    ),
)
def test_conv2d_refuses(changed: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=f"drive::masked_conv2d: .*{message}"):
        ops.masked_conv2d(*{**good(), **changed}.values())


def test_linear_refuses():
    weight, mask = torch.ones(3, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"drive::masked_linear: input must be \[..., 4\], got \[2, 5\]"):
        ops.masked_linear(torch.ones(2, 5), weight, mask, None)
    with pytest.raises(
        ValueError, match=r"masked_linear_backward: grad must have shape \[2, 3\], got \[2, 4\]"
    ):
        ops.masked_linear_backward(torch.ones(2, 4), torch.ones(2, 4), weight, mask, [True] * 4)
    with pytest.raises(ValueError, match="mask must be on cpu, as input is, got meta"):
        masked.linear_size(torch.ones(2, 4), weight, mask.to("meta"))


NO_TRITON = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""


@pytest.mark.parametrize("there", (False, True))
def test_registration(there: bool):
    """Triton serves CUDA where it is installed, and is not imported before; else the reference does."""
    script = f"""
{"import sys" if there else NO_TRITON}
import torch, drive_kernels
print(drive_kernels.implementations["drive::masked_linear"]["cuda"]["Triton kernel"])
print(torch._C._dispatch_has_kernel_for_dispatch_key("drive::masked_conv2d_backward", "CUDA"))
print("triton" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = ["None", "True", "False"] if there else ["Triton is not installed", "True", "False"]
    assert run.stdout.split("\n")[:3] == expected
