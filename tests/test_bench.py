"""The benchmark's own parts, on tensors of a few thousand entries."""

from __future__ import annotations

import json

import pytest
import torch

from drive import bench, cli

TINY = [(40, 30), (7,), (16, 8, 3, 3)]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "11M", TINY)


def test_real_shapes():
    def entries(shapes):
        return sum(torch.Size(shape).numel() for shape in shapes)

    assert entries(bench.resnet18_shapes()) == 11_164_352
    assert entries(bench.vgg16_shapes()) == 138_344_128
    assert 295e6 < entries(bench.SIZES["300M"]) < 305e6


@pytest.mark.parametrize("case", bench.cases(["11M"], [torch.float32, torch.bfloat16], [0.5, 0.9]))
def test_rows_are_complete(case):
    inputs = bench.Inputs(TINY, case.dtype)
    bench.validate(inputs, case)
    row = bench.measure(inputs, case, rounds=2)
    assert row.entries == 2359
    assert list(row.seconds) == list(row.memory) == list(bench.PROVIDERS)
    assert all(seconds > 0 for seconds in row.seconds.values())
    assert len(bench.cells(row)) == len(bench.columns())
    assert json.dumps(row.as_dict())


def test_validation_notices_a_wrong_mask(monkeypatch):
    case = bench.cases(["11M"], [torch.float32], [0.5])[0]
    inputs = bench.Inputs(TINY, case.dtype)
    monkeypatch.setattr(
        bench, "drive_prune", lambda *a, **k: bench.fused_drive_prune(*a, **{**k, "sparsity": 0.4})
    )
    with pytest.raises(AssertionError, match="masks differ from the reference's"):
        bench.validate(inputs, case)


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["bench", "--rounds", "1", "--out", str(out)]) == 0
    assert "kthvalue" in capsys.readouterr().out
    rows = json.loads((out / "bench.json").read_text())
    assert [row["old_masks"] for row in rows] == [False, True]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses(capsys):
    assert cli.main(["bench", "--size", "1T"]) == 2
    assert "--size must be one of 11M, 138M, 300M, got '1T'" in capsys.readouterr().err
