"""PackedLinear, BlockLinear and SemiStructuredLinear on the CPU: what they compute, keep, refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from linear_layers import KINDS, layer_of, mask_for, masked
from torch import nn

from drive.sparse import BlockLinear, PackedLinear, SemiStructuredLinear, gpu, measure
from drive.sparse.convert import _choose


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_reason_against_device", lambda weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)


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
