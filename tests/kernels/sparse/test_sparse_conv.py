"""drive::sparse_conv2d against dense PyTorch: whatever the shape, the strides, what is not finite."""

from __future__ import annotations

import pytest
import torch
from sparse_cases import CONVS, TOLERANCE, Conv, assert_conv_right, assert_ends_of_rows, leaves
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.sparse.pattern import index_of, pattern_of

ops = torch.ops.drive


@pytest.mark.parametrize("blocks", (False, True))
@pytest.mark.parametrize("density", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv2d(conv: Conv, dtype: torch.dtype, density: float, blocks: bool):
    assert_conv_right(conv, dtype, density, blocks)


def test_conv2d_of_many_channels_works_in_pieces():
    """The input does not fit the cache: pieces of a few rows, some of them shorter."""
    assert_conv_right(Conv(18, 700, 5, 19, 21), torch.float32, 0.05, blocks=True)
    assert_conv_right(Conv(18, 5, 700, 19, 21, stride=(2, 2)), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 900, 5, 40, 32), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 5, 900, 40, 32), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 1500, 5, 40, 31), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 5, 1500, 40, 31, kernel=(5, 5)), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(1, 900, 5, 61, 63, stride=(2, 2)), torch.float32, 0.05, blocks=False)


@pytest.mark.parametrize("size", ((16, 7, 7), (1, 7, 7), (1, 7, 16)), ids=("images", "padded", "rows"))
@pytest.mark.parametrize("stride", ((1, 1), (2, 1)))
def test_what_is_not_finite_stays_where_it_belongs(size: tuple[int, int, int], stride: tuple[int, int]):
    """Lanes that go on beyond a row or a plane compute nothing that counts."""
    batch, height, width = size
    conv = Conv(batch, 4, 3, height, width, stride=stride)
    x, weight, _, mask = conv.inputs(torch.float32, 1.0)
    pattern = pattern_of(mask)
    for spoilt, of in ((2, "input"), (1, "grad")):
        x_, values = leaves(x, weight.flatten())
        with torch.no_grad():
            x_[:, spoilt if of == "input" else []] = torch.nan
        found = ops.sparse_conv2d(x_, values, pattern, None, *conv.options)
        grad = torch.ones_like(found)
        grad[:, spoilt if of == "grad" else []] = torch.nan
        found.backward(grad)
        expected = torch.zeros(conv.shape, dtype=torch.bool)
        expected[(slice(None), spoilt) if of == "input" else spoilt] = True
        assert torch.equal(values.grad.isnan().view(conv.shape), expected)
        assert found.isnan().all() if of == "input" else found.isfinite().all()
        assert x_.grad.isfinite().all() if of == "input" else x_.grad.isnan().all()


@pytest.mark.parametrize("width", (7, 16, 32, 144))
def test_rows_see_nothing_beyond_their_ends(width: int):
    assert_ends_of_rows(width)


def strided(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return torch.stack([t, t], -1)[..., 0]


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "every other"))
def test_strided_input_and_gradient(layout: str):
    conv = Conv(17, 6, 5, 7, 9)
    x, weight, bias, mask = conv.inputs(torch.float64, 0.4)
    pattern, index = pattern_of(mask), index_of(mask)
    expected = F.conv2d(x, weight, bias, 1, 1)
    given, values, offset = leaves(x, weight.flatten()[index], bias)
    found = ops.sparse_conv2d(strided(given, layout), values, pattern, offset, *conv.options)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float64])
    grad = torch.randn_like(expected)
    (plain,) = torch.autograd.grad(found, values, grad, retain_graph=True)
    (other,) = torch.autograd.grad(found, values, strided(grad, layout))
    torch.testing.assert_close(other, plain, **TOLERANCE[torch.float64])


def test_residual_and_relu():
    conv = Conv(17, 4, 6, 8, 8)
    x, weight, bias, mask = conv.inputs(torch.float64, 0.4)
    residual = torch.randn(17, 6, 8, 8, dtype=torch.float64)
    theirs = leaves(x, weight, bias, residual)
    expected = (F.conv2d(*theirs[:3], 1, 1) + theirs[3]).relu()
    index = index_of(mask)
    ours = leaves(x, weight.flatten()[index], bias, residual)
    found = ops.from_blocks(
        ops.sparse_conv2d(
            ops.to_blocks(ours[0]), ours[1], pattern_of(mask), ours[2], *conv.options,
            ops.to_blocks(ours[3]), True,
        ),
        17,
    )  # fmt: skip
    grad = torch.randn_like(expected)
    expected.backward(grad)
    found.backward(grad)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float64])
    for mine, other in zip((ours[0], ours[2], ours[3]), (theirs[0], theirs[2], theirs[3]), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **TOLERANCE[torch.float64])
    torch.testing.assert_close(ours[1].grad, theirs[1].grad.flatten()[index], **TOLERANCE[torch.float64])


def good() -> dict[str, object]:
    x, weight, bias, mask = Conv(2, 4, 6, 5, 5).inputs(torch.float32, 0.5)
    return {
        "input": x, "values": weight[mask], "pattern": pattern_of(mask), "bias": bias,
        "shape": [6, 4, 3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    (
        ({"input": torch.ones(2, 3, 5, 5)}, ValueError, "input must have 4 channels, got 3"),
        (
            {"input": torch.ones(2, 4, 5)},
            ValueError,
            r"input must be \[N, C, H, W\] or blocked .*, got \[2, 4, 5\]",
        ),
        ({"input": torch.ones(2, 4, 5, 5).int()}, TypeError, "input must be floating-point, got Int"),
        ({"values": torch.ones(3)}, ValueError, r"pattern\[1\] must be contiguous with 3 entries"),
        ({"values": torch.ones(3).double()}, TypeError, "values must be Float, as input is, got Double"),
        ({"pattern": []}, ValueError, "pattern must be 5 tensors, got 0"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[6\], got \[5\]"),
        ({"stride": [0, 1]}, ValueError, "must be > 0"),
        ({"groups": 4}, ValueError, "groups must divide 6 output channels, got 4"),
        ({"padding": [0, 0], "dilation": [3, 3]}, ValueError, "no smaller than the kernel"),
    ),
)
def test_conv2d_refuses(changed: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ops.sparse_conv2d(*{**good(), **changed}.values())


def test_compiles_into_one_graph():
    arguments = good()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, values: Tensor) -> Tensor:
        given = {**arguments, "input": ops.to_blocks(x), "values": values}
        return ops.from_blocks(ops.sparse_conv2d(*given.values()), x.shape[0]).relu()

    x, values = leaves(arguments["input"], arguments["values"])
    found = run(x, values)
    found.sum().backward()
    expected = ops.sparse_conv2d(*arguments.values()).relu()
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])
    assert values.grad.abs().sum() > 0
