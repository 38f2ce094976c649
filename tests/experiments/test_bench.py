"""The benchmark's own parts, on tensors of a few thousand entries."""

from __future__ import annotations

import json

import pytest
import torch

from drive.experiments.bench import step as bench
from drive.experiments.bench.workload import (
    SCORES,
    Case,
    Inputs,
    prove,
    resnet18_shapes,
    validate,
    vgg16_shapes,
)
from drive.experiments.cli import app as cli
from drive_kernels.prune.op import reference

prune_ = torch.ops.drive.prune_

TINY = [(40, 30), (7,), (16, 8, 3, 3)]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "11M", TINY)


def test_real_shapes():
    def entries(shapes):
        return sum(torch.Size(shape).numel() for shape in shapes)

    assert entries(resnet18_shapes()) == 11_164_352
    assert entries(vgg16_shapes()) == 138_344_128
    assert 295e6 < entries(bench.SIZES["300M"]) < 305e6


@pytest.mark.parametrize("case", bench.cases(["11M"], [torch.float32, torch.bfloat16], [0.9]))
def test_rows_are_complete(case):
    inputs = Inputs(TINY, case.dtype)
    inputs.begin(case)
    validate(inputs, case, prune_)
    row = bench.measure(inputs, case, rounds=2)
    assert row.entries == 2359
    assert list(row.seconds) == list(row.memory) == list(bench.PROVIDERS)
    assert all(seconds > 0 for seconds in row.seconds.values())
    assert len(bench.cells(row)) == len(bench.columns())
    assert json.dumps(row.as_dict())


def test_old_masks_are_of_half_the_sparsity():
    case = Case("11M", torch.float32, 0.9, old_masks=True)
    inputs = Inputs(TINY, case.dtype)
    inputs.begin(case)
    inputs.mask.zero_(), inputs.weight.fill_(1)
    inputs.fresh()
    assert torch.equal(inputs.mask, inputs.weight != 0)
    assert inputs.entries - inputs.mask.sum() == round(0.45 * inputs.entries)


def flip(masks):
    masks[0][0, 0] = ~masks[0][0, 0]


def swap(masks):
    """A survivor for an entry that is pruned: the count stays right."""
    kept, pruned = masks[0].nonzero()[0], (~masks[0]).nonzero()[0]
    masks[0][tuple(kept)], masks[0][tuple(pruned)] = False, True


def swap_ties(masks):
    """Of two equal scores the later one survives."""
    masks[0][0, 0], masks[2][15, 7, 2, 2] = False, True


def wrong(damage):
    """An implementation that gets one thing wrong, and sets its weights accordingly."""

    def op(weights, grads, mask_grads, masks, *rest):
        before = [weight.clone() for weight in weights]
        outputs = reference(weights, grads, mask_grads, masks, *rest)
        damage(masks)
        for weight, start, mask in zip(weights, before, masks, strict=True):
            weight.copy_(start.masked_fill(~mask, 0))
        return outputs

    return op


def changes_a_weight(weights, *rest):
    outputs = reference(weights, *rest)
    weights[0].flatten()[weights[0].abs().argmax()] *= 2
    return outputs


@pytest.mark.parametrize("check", (validate, prove))
@pytest.mark.parametrize(
    ("scores", "op"),
    (
        ("normal", wrong(flip)),
        ("normal", wrong(swap)),
        ("equal", wrong(swap_ties)),
        ("normal", changes_a_weight),
    ),
)
def test_checks_notice(check, scores, op):
    case = Case("11M", torch.float32, 0.5, old_masks=False, scores=scores)
    inputs = Inputs(TINY, case.dtype, scores=scores)
    check(inputs, case, prune_)
    with pytest.raises(AssertionError, match="masks"):
        check(inputs, case, op)


@pytest.mark.parametrize("old_masks", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scores", SCORES)
def test_proof_accepts_the_reference(monkeypatch, scores, dtype, old_masks):
    monkeypatch.setattr("drive.experiments.bench.workload.CHUNK", 100)
    inputs = Inputs(TINY, dtype, scores=scores)
    for sparsity in (0.0, 0.3, 0.5, 0.9, 0.9999):
        case = Case("11M", dtype, sparsity, old_masks, scores)
        inputs.begin(case)
        prove(inputs, case, reference)


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["bench", "--rounds", "1", "--out", str(out)]) == 0
    assert "kthvalue" in capsys.readouterr().out
    rows = json.loads((out / "bench.json").read_text())
    assert [row["old_masks"] for row in rows] == [False, False, True]
    assert [row["replaces"] for row in rows] == [False, True, False]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses(capsys):
    assert cli.main(["bench", "--size", "1T"]) == 2
    assert "--size must be one of 11M, 138M, 300M, got '1T'" in capsys.readouterr().err
