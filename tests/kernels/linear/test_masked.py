"""The masked ops against convolutions and products in float64; their modules. `-k triton` is for a device."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ugly import laid_out, moved

from drive.sparse import MaskedConv2d, MaskedLinear
from drive_kernels.linear import masked

ops = torch.ops.drive
# One rounding of a float32 sum, whose order is free.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 1e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
}
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


@dataclass(frozen=True)
class Case:
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: str = "contiguous"
    density: float = 0.5

    @property
    def name(self) -> str:
        return "masked_conv2d" if len(self.weight) == 4 else "masked_linear"

    @property
    def options(self) -> tuple[Any, ...]:
        given = self.stride, self.padding, self.dilation, self.groups
        return given if len(self.weight) == 4 else ()

    def tensors(self, dtype: torch.dtype, learned: bool, device: str = "cpu") -> list[Tensor]:
        """input, weight, mask, bias"""
        generator = torch.Generator().manual_seed(0)
        input, weight, mask = (
            torch.randn(shape, generator=generator) for shape in (self.input, self.weight, self.weight)
        )
        mask = mask.to(dtype) if learned else torch.rand(mask.shape, generator=generator) < self.density
        bias = torch.randn(2 * self.weight[0], generator=generator)
        found = [laid_out(t, self.layout) for t in (input.to(dtype), weight.to(dtype), mask)]
        return [moved(t, device) for t in (*found, bias.to(dtype)[::2])]


CASES = (
    Case((33, 40), (20, 40)),
    Case((1, 7), (5, 7)),
    Case((2, 3, 70), (65, 70), layout="sliced"),
    Case((17,), (3, 17)),
    Case((0, 4), (3, 4)),
    Case((5, 18), (33, 18), density=0.0),
    Case((2, 6, 5, 4), (8, 3, 3, 2), (2, 1), (1, 2), (1, 2), groups=2),
    Case((3, 5, 4, 4), (4, 5, 3, 3), padding=(1, 1), layout="channels_last"),
    Case((2, 17, 5, 5), (18, 17, 1, 1), stride=(2, 2)),
    Case((2, 3, 4, 5), (6, 1, 2, 2), padding=(1, 1), groups=3),
    Case((1, 2, 9, 9), (3, 2, 2, 3), (3, 2), (4, 0), (2, 3), layout="sliced"),
    Case((2, 3, 6, 5), (4, 3, 2, 2), layout="transposed"),
    Case((0, 3, 5, 5), (4, 3, 3, 3)),
    Case((2, 3, 5, 5), (4, 3, 3, 3), density=0.0),
)


def assert_right(
    where: Any,
    case: Case,
    dtype: torch.dtype,
    learned: bool,
    device: str = "cpu",
    tolerances: dict[torch.dtype, dict[str, float]] = TOLERANCE,
) -> None:
    """The op and its backward, found there by their names."""
    tensors = case.tensors(dtype, learned, device)
    input, weight, mask, bias = (t.cpu() for t in tensors)
    product = weight * mask if learned else weight.masked_fill(~mask, 0)
    leaves = [t.double().requires_grad_() for t in (input, product, bias)]
    output = (F.conv2d if case.options else F.linear)(*leaves, *case.options)
    generator = torch.Generator().manual_seed(1)
    grad = laid_out(torch.randn(output.shape, generator=generator).to(dtype), case.layout)
    to_input, to_product, to_bias = torch.autograd.grad(output, leaves, grad.double())
    gradients = to_input, to_product * mask, to_product * weight.double(), to_bias

    tolerance = tolerances[dtype]
    found = getattr(where, case.name)(*tensors, *case.options)
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), output.detach(), **tolerance)
    backward = getattr(where, f"{case.name}_backward")
    for needed in (
        [True, True, learned, True],
        [False, learned, False, False],
        [False, False, learned, False],
    ):
        found = backward(moved(grad, device), *tensors[:3], *case.options, needed)
        for is_needed, mine, right, like in zip(needed, found, gradients, tensors, strict=True):
            if not is_needed:
                assert mine.shape == (0,)
                continue
            assert mine.dtype == like.dtype
            torch.testing.assert_close(mine.cpu().double(), right, **tolerance)


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


def layers(kind: str) -> tuple[nn.Module, type[MaskedConv2d] | type[MaskedLinear], Tensor]:
    if kind == "linear":
        return nn.Linear(6, 5), MaskedLinear, torch.randn(4, 6)
    return nn.Conv2d(6, 4, 3, padding=kind, groups=2), MaskedConv2d, torch.randn(3, 6, 7, 8)


@pytest.mark.parametrize("kind", ("linear", "same", "valid"))
def test_module(kind: str):
    dense, masked_kind, x = layers(kind)
    mask = torch.rand(dense.weight.shape) < 0.5
    ours = masked_kind.from_dense(dense, mask)
    assert ours.state_dict().keys() == dense.state_dict().keys()
    assert [n for n, _ in dense.named_buffers()] == [] and ours.weight is dense.weight
    with torch.no_grad():
        reference = copy.deepcopy(dense)
        reference.weight.mul_(mask)
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours(x[0]), reference(x[0]))
    copied = copy.deepcopy(ours)
    copied.mask.zero_()
    torch.testing.assert_close(ours(x), reference(x))

    before = dense.weight.detach().clone()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(dense.weight != before, mask), "the surviving weights move, and no others"


@pytest.mark.parametrize("kind", ("linear", "same"))
def test_learned_mask(kind: str):
    dense, masked_kind, x = layers(kind)
    start = torch.rand(dense.weight.shape)
    ours = masked_kind.from_dense(dense, start, learn_mask=True)
    assert ours.state_dict().keys() == {*dense.state_dict(), "mask"}
    ours(x).square().sum().backward()
    mask = ours.mask.detach().clone().requires_grad_()
    weights = {"weight": dense.weight.detach() * mask, "bias": dense.bias.detach()}
    torch.func.functional_call(dense, weights, (x,)).square().sum().backward()
    torch.testing.assert_close(ours.mask.grad, mask.grad)
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    assert not torch.equal(ours.mask, start)
    assert masked_kind.from_dense(dense, start > 0.5, learn_mask=True).mask.dtype == torch.float32


def test_module_refuses():
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"MaskedConv2d: layer must be .*, got padding_mode 'reflect'"):
        MaskedConv2d.from_dense(nn.Conv2d(3, 4, 1, padding_mode="reflect"), mask)
    with pytest.raises(ValueError, match=r"MaskedLinear: mask must have shape \(4, 3\), got"):
        MaskedLinear.from_dense(nn.Linear(3, 4), mask)
    with pytest.raises(TypeError, match="mask must be torch.bool or torch.float32, got torch.int32"):
        MaskedConv2d.from_dense(nn.Conv2d(3, 4, 1), mask.int())


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("kind", ("linear", "same"))
def test_compiles_into_one_graph(kind: str, backend: str):
    dense, masked_kind, x = layers(kind)
    ours = masked_kind.from_dense(dense, torch.rand(dense.weight.shape), learn_mask=True)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), ours(x))
    compiled(x).sum().backward()
    assert ours.mask.grad.abs().sum() > 0


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
    """Triton serves CUDA where it is installed, and is not imported before."""
    script = f"""
{"import sys" if there else NO_TRITON}
import torch, drive_kernels
print(drive_kernels.implementations["drive::masked_linear"]["cuda"]["Triton kernel"])
print(torch._C._dispatch_has_kernel_for_dispatch_key("drive::masked_conv2d_backward", "CUDA"))
print("triton" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = ["None", "True", "False"] if there else ["Triton is not installed", "False", "False"]
    assert run.stdout.split("\n")[:3] == expected
