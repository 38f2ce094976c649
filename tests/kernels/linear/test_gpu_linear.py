"""packed_linear, block_linear and the layers on them against plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from linear_cases import BLOCKS, PACKED, BlockCase, PackedCase, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from drive.sparse import BlockLinear, PackedLinear, SemiStructuredLinear, gpu, measure
from drive.sparse.convert import _choose
from drive.targets.structures import structure
from drive_kernels.linear import block, packed

ops = torch.ops.drive
FLOAT64 = torch.float64

# ---- The ops ----


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_linear(case: PackedCase):
    assert_close(ops.packed_linear(*case.arguments()), case.expected())


@pytest.mark.parametrize("shape", ((64, 64), (65, 130), (1, 1), (0, 3), (3, 0)))
@pytest.mark.parametrize("density", (0.0, 0.4, 1.0))
def test_packing_loses_nothing(shape: tuple[int, int], density: float):
    weight, mask = torch.randn(shape), torch.rand(shape) < density
    bitmap, start, values = packed.pack(weight, mask)
    assert torch.equal(packed.dense_weight(bitmap, values, shape), weight.masked_fill(~mask, 0))
    assert values.numel() == start[-1] == mask.sum()
    assert bitmap.numel() * 8 == -(-shape[0] // 64) * -(-shape[1] // 64) * 64 * 64


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block_linear(case: BlockCase):
    assert_close(ops.block_linear(*case.arguments()), case.expected())
    for mine, theirs in zip(
        ops.block_linear_backward(*case.backward_arguments()), case.expected_gradients(), strict=True
    ):
        assert_close(mine, theirs)


@pytest.mark.parametrize("size", block.BLOCKS)
def test_pattern_of_blocks(size: int):
    case = BlockCase(1, 192, 128, size, 0.5)
    pattern = block.pattern_of(case.mask(), size)
    row_start, column, row, column_start, row_of = pattern
    assert torch.equal(block.mask_of(pattern, size), case.mask())
    assert row.equal(torch.repeat_interleave(torch.arange(192 // size), row_start.diff()))
    columns = torch.repeat_interleave(torch.arange(128 // size), column_start.diff())
    pairs = set(zip(row.tolist(), column.tolist(), strict=True))
    assert pairs == set(zip(row_of.tolist(), columns.tolist(), strict=True))


def test_block_of():
    units = torch.tensor([[True, False], [False, True]])
    for size in block.BLOCKS:
        mask = structure(f"{size}x{size}").expand(units, 1)
        assert block.block_of(mask) == size
    mask[0, 0] = False
    assert block.block_of(mask) is None
    assert block.block_of(torch.ones(48, 96, dtype=torch.bool)) == 16
    assert block.block_of(torch.ones(40, 96, dtype=torch.bool)) is None


def test_opcheck():
    for case in (PackedCase(3, 70, 66, 0.5), PackedCase(0, 5, 7, 0.5, biased=False)):
        torch.library.opcheck(ops.packed_linear.default, case.arguments())
    for case in (
        BlockCase(3, 32, 64, 16, 0.5, FLOAT64),
        BlockCase(0, 32, 64, 32, 0.5, FLOAT64, biased=False),
    ):
        input, weight, pattern, bias, size = case.arguments()
        leaves = [t if t is None else t.requires_grad_() for t in (input, weight, bias)]
        torch.library.opcheck(ops.block_linear.default, (*leaves[:2], pattern, leaves[2], size))
        torch.library.opcheck(ops.block_linear_backward.default, case.backward_arguments())


def test_gradcheck():
    input, weight, pattern, bias, size = BlockCase(3, 32, 48, 16, 0.5, FLOAT64).arguments()
    leaves = [t.requires_grad_() for t in (input.unsqueeze(0), weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.block_linear(x, w, pattern, b, size), leaves, fast_mode=True
    )


PACKED_CASE, BLOCK_CASE = PackedCase(3, 70, 66, 0.5), BlockCase(3, 32, 64, 16, 0.5)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    (
        (0, torch.ones(3, 65), r"input must have shape \[..., 66\], got \[3, 65\]"),
        (1, torch.ones(2, 2, 8, 64), "bitmap must be torch.uint8, got torch.float32"),
        (1, torch.ones(1, 2, 8, 64), r"bitmap must have shape \[2, 2, 8, 64\], got \[1, 2, 8, 64\]"),
        (2, torch.ones(4).long(), r"start must have shape \[5\], got \[4\]"),
        (3, torch.ones(9).half(), "values must be torch.float32, got torch.float16"),
        (3, torch.ones(9, device="meta"), "values must be on cpu, got meta"),
        (4, torch.ones(7), r"bias must have shape \[70\], got \[7\]"),
        (4, torch.ones(140)[::2], r"bias must be contiguous, got strides \[2\]"),
        (5, [70], r"shape must be \[outputs, inputs\], got \[70\]"),
    ),
)
def test_packed_linear_refuses(index: int, value: Any, message: str):
    arguments = PACKED_CASE.arguments()
    arguments[index] = value
    with pytest.raises((TypeError, ValueError), match=f"drive::packed_linear: {message}"):
        packed.reference(*arguments)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    (
        (0, torch.ones(3, 65), r"input must have shape \[..., 64\], got \[3, 65\]"),
        (1, torch.ones(33, 64), r"weight must have a shape of whole blocks of 16, got \[33, 64\]"),
        (1, torch.ones(32, 64).half(), "weight must be torch.float32, got torch.float16"),
        (2, [torch.ones(1)], "pattern must be the five tensors of pattern_of, got 1"),
        (2, [torch.ones(2)] * 5, r"pattern\[0\] must have shape \[3\], got \[2\]"),
        (3, torch.ones(7), r"bias must have shape \[32\], got \[7\]"),
        (4, 8, "block must be 16, 32 or 64, got 8"),
    ),
)
def test_block_linear_refuses(index: int, value: Any, message: str):
    arguments = BLOCK_CASE.arguments()
    arguments[index] = value
    with pytest.raises((TypeError, ValueError), match=f"drive::block_linear: {message}"):
        block.reference(*arguments)


def test_packing_refuses():
    mask = torch.ones(32, 64, dtype=torch.bool)
    mask[0, 0] = False
    for call, message in (
        (lambda: packed.pack(torch.ones(3, 4), torch.ones(3, 4)), "mask must be bool, got torch.float32"),
        (lambda: packed.pack(torch.ones(3, 4), torch.ones(4, 3).bool()), r"mask must have shape \[3, 4\]"),
        (
            lambda: packed.pack(torch.ones(3), torch.ones(3).bool()),
            r"weight must have shape \[outputs, inputs\]",
        ),
        (lambda: block.pattern_of(torch.ones(3, 4), 16), "mask must be bool, got torch.float32"),
        (lambda: block.pattern_of(torch.ones(3, 4).bool(), 16), r"whole blocks of 16, got \[3, 4\]"),
        (lambda: block.pattern_of(mask, 16), "mask must be of whole blocks of 16, got some in part"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


# ---- The layers, on the CPU ----


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_reason_against_device", lambda weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)


def mask_for(kind: type[nn.Module], rows: int = 64, columns: int = 128) -> Tensor:
    torch.manual_seed(0)
    if kind is BlockLinear:
        return structure("32x32").expand(torch.rand(rows // 32, columns // 32) < 0.5, 1)
    if kind is SemiStructuredLinear:
        return torch.tensor([True, False, False, True]).repeat(rows, columns // 4)
    return torch.rand(rows, columns) < 0.5


KINDS = tuple(gpu.KINDS.values())


def layer_of(kind: type[nn.Module]) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer whose pruned weights are not 0, its mask, an input."""
    torch.manual_seed(1)
    layer = nn.Linear(128, 64)
    dtype = torch.bfloat16 if kind is SemiStructuredLinear else torch.float32
    return layer.to(dtype), mask_for(kind), torch.randn(2, 3, 128).to(dtype)


def masked(layer: nn.Linear, mask: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight * mask, layer.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: Any, anywhere: None):
    """Outputs and gradients of the masked layer, before and after weights and masks have changed."""
    layer, mask, x = layer_of(kind)
    ours = kind.from_dense(layer, mask)
    assert ours.weight is layer.weight and ours.bias is layer.bias
    assert list(ours.state_dict()) == list(layer.state_dict())
    close = {"rtol": 1.6e-2, "atol": 1e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for changed in (lambda: None, lambda: layer.weight.mul_(2), lambda: mask[:32].zero_()):
        with torch.no_grad():
            changed()
            torch.testing.assert_close(ours(x), masked(layer, mask, x), **close)
        found, expected = (
            torch.autograd.grad(f(x).float().square().sum(), layer.parameters())
            for f in (ours, lambda x: masked(layer, mask, x))
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=close["rtol"], atol=10 * close["atol"])
        assert not found[0][~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_what_is_packed(kind: Any, anywhere: None):
    layer, mask, x = layer_of(kind)
    ours = kind.from_dense(layer, mask)
    with torch.no_grad():
        ours(x)
        kept = ours._kept._made
        ours(x)
        assert ours._kept._made is kept
        copied = copy.deepcopy(ours)
        assert copied._kept._made is None and copied.mask is not mask
        copied.weight.zero_()
        assert torch.equal(copied(x), layer.bias.expand(2, 3, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compile(kind: Any, anywhere: None):
    layer, mask, x = layer_of(kind)
    ours = kind.from_dense(layer, mask)
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), ours(x))
            layer.weight.mul_(2)


def test_a_mask_that_falls_apart(anywhere: None):
    layer, mask, x = layer_of(BlockLinear)
    ours = BlockLinear.from_dense(layer, mask)
    mask.logical_and_(torch.rand(mask.shape) < 0.5)
    with pytest.raises(ValueError, match="BlockLinear: mask must be of whole blocks of 16, 32 or 64"):
        ours(x)


def test_reasons_against(anywhere: None):
    layer = nn.Linear(128, 64)
    unstructured, blocks, two_of_four = map(mask_for, KINDS)
    assert gpu.candidates(layer, unstructured, training=False).keys() == {"packed"}
    assert gpu.candidates(layer, blocks, training=False).keys() == {"packed", "blocks"}
    assert gpu.candidates(layer, blocks, training=True).keys() == {"blocks"}
    assert gpu.candidates(layer.half(), two_of_four, training=False).keys() == {"packed", "2:4"}
    assert not gpu.candidates(nn.Conv2d(4, 4, 1), torch.ones(4, 4, 1, 1).bool(), training=False)
    assert "more than two of four" in str(SemiStructuredLinear.reason_against(layer, blocks))
    small = nn.Linear(96, 64).half()
    assert "multiples of 32 and 64" in str(
        SemiStructuredLinear.reason_against(small, torch.zeros(64, 96).bool())
    )
    assert PackedLinear.reason_against(nn.Linear(3, 4).double(), torch.ones(4, 3)) == "torch.float64 weights"


@pytest.mark.parametrize("kind", KINDS)
def test_layers_refuse(kind: Any):
    layer, mask, _ = layer_of(kind)
    message = f"{kind.__name__}: layer must be one that it covers, got a weight on cpu"
    with pytest.raises(ValueError, match=message):
        kind.from_dense(layer, mask)
    with pytest.raises(ValueError, match=f"{kind.__name__}: mask must have shape"):
        kind.from_dense(layer, mask.t())


def test_convert_takes_the_fastest(anywhere: None, monkeypatch: pytest.MonkeyPatch):
    """As on CUDA, where these are the candidates."""
    layer, mask, _ = layer_of(BlockLinear)
    module = __import__("sys").modules["drive.sparse.convert"]
    monkeypatch.setattr(
        module, "_candidates", lambda layer, mask, _, training: (gpu.candidates(layer, mask, training), "")
    )
    for seconds, chosen in (
        ({"dense": 2.0, "packed": 1.5, "blocks": 1.0}, "blocks"),
        ({"dense": 2.0, "packed": 1.0, "blocks": 1.5}, "packed"),
        ({"dense": 1.0, "packed": 0.99, "blocks": 1.5}, "dense"),
    ):
        monkeypatch.setattr(measure, "layer_times", lambda *_, seconds=seconds: seconds)
        costs = measure.Costs(False, training=False)
        choice, found = _choose("fc", layer, mask, torch.Size((3, 128)), costs)
        assert (choice.chosen, choice.seconds) == (chosen, seconds)
        assert type(found) is gpu.KINDS.get(chosen, type(None))
    monkeypatch.undo()
