"""Dense Linear layers in a library's own layout: what F.linear computes, in inference."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from drive.sparse.laid_out import KINDS, MklLinear, OneDnnLinear

LAID_OUT = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def laid_out(kind: type[nn.Linear], layer: nn.Linear, rows: int = 4) -> nn.Linear:
    if why := kind.reason_against(layer):
        pytest.skip(why)
    return kind.from_dense(layer, rows)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    ((OneDnnLinear, torch.float32), (OneDnnLinear, torch.bfloat16), (MklLinear, torch.float32)),
)
@pytest.mark.parametrize("shape", ((33,), (0, 33), (1, 33), (4, 33), (2, 2, 33), (129, 33)))
@pytest.mark.parametrize("bias", (False, True))
def test_laid_out_linear_of_any_rows(
    kind: type[nn.Linear], shape: tuple[int, ...], bias: bool, dtype: torch.dtype
):
    """Made for 4 rows; `wide` and the transposed input are not contiguous."""
    layer = nn.Linear(33, 17, bias, dtype=dtype)
    ours, x = laid_out(kind, layer), torch.randn(shape, dtype=dtype)
    wide = torch.randn(*shape[:-1], 35, dtype=dtype)[..., 1:34]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    with torch.no_grad():
        for input in (x, wide, x.transpose(0, -1).contiguous().transpose(0, -1)):
            torch.testing.assert_close(ours(input), layer(input), rtol=tolerance, atol=tolerance)


@LAID_OUT
def test_laid_out_linear_follows_its_weight(kind: type[nn.Linear]):
    layer = nn.Linear(33, 17)
    ours, x = laid_out(kind, layer), torch.randn(4, 33)
    assert ours.weight is layer.weight and list(ours.state_dict()) == list(layer.state_dict())
    with torch.no_grad():
        before = ours(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(ours(x), 2 * before, rtol=1e-5, atol=1e-5)
        copied = copy.deepcopy(ours)
        layer.weight.zero_()
        torch.testing.assert_close(copied(x), 2 * before, rtol=1e-5, atol=1e-5)
        copied.load_state_dict(layer.state_dict())
        torch.testing.assert_close(copied(x), layer.bias.expand(4, -1))


@LAID_OUT
def test_laid_out_linear_is_for_plain_inference(kind: type[nn.Linear]):
    """Everything else is, to the bit and to the message, what the dense layer does."""
    layer = nn.Linear(33, 17)
    ours, x = laid_out(kind, layer), torch.randn(4, 33)
    ours(x).square().sum().backward()
    found, layer.weight.grad = layer.weight.grad, None
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, found)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), layer(x))
    with torch.no_grad():
        assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(x), layer(x))
        for wrong in (torch.randn(4, 32), torch.tensor(1.0), x.double()):
            with pytest.raises(RuntimeError) as expected:
                layer(wrong)
            with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
                ours(wrong)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-5)


@LAID_OUT
def test_laid_out_linear_refuses(kind: type[nn.Linear]):
    for wrong in ({"dtype": torch.float64}, {"device": "meta"}):
        with pytest.raises(ValueError, match=f"{kind.__name__}: layer must be one that it covers, got"):
            kind.from_dense(nn.Linear(3, 4, **wrong), 1)
