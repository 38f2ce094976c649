"""The race of sparse inference: what it measures, what it skips, who takes part, and the page of it."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import ROOT
from benchmarks.cpu.engine import masks, race, report, rows
from benchmarks.cpu.engine.rows import DEEPSPARSE, MEASURED, Cell, Row, Rows, read
from benchmarks.cpu.engine.served import served
from drive.experiments.bench import rivals
from drive.experiments.bench.rivals import CHANNELS_LAST, CONTIGUOUS, OURS, Run
from drive.experiments.bench.turns import Spread, in_turns

SHAPE = (3, 8, 8)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Networks of two layers, no plan, of the dense rivals torch alone, and a call a turn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "version", lambda measured: "abc1234")
    monkeypatch.setattr(rows, "DISTURBED", 1e9)
    monkeypatch.setattr(race, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(race, "MASKS", tmp_path / "masks")
    monkeypatch.setattr(race, "in_turns", lambda bursts, rounds: in_turns(bursts, 2, 0.0))
    monkeypatch.setattr(
        race, "DENSE", {n: rivals.DENSE[n] for n in (CONTIGUOUS, CHANNELS_LAST)} | {"nobody": nobody}
    )
    monkeypatch.setattr(rivals, "ours", lambda model, masks, example: rivals.contiguous(model, example))
    for module in (race, masks):
        monkeypatch.setattr(module, "build", lambda name: (tiny(), SHAPE))


def nobody(model: nn.Module, example: torch.Tensor) -> Run:
    raise ImportError("nobody is here")


def run(*options: str) -> list[Row]:
    race.main(["tiny", "--batches", "2", "--out", "rows.jsonl", *options])
    return read(Path("rows.jsonl"))


def test_race(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = run("--sparsities", "0.5", "0.9")
    assert first.cell == Cell("tiny", 2, 0.5, masks.UNIFORM)
    assert {row.cell for row in others} == {
        Cell("tiny", 2, s, kind) for s in (0.5, 0.9) for kind in masks.KINDS
    } - {first.cell}
    assert first.seconds.keys() == {OURS, CONTIGUOUS, CHANNELS_LAST}
    assert first.absent == {"nobody": "nobody is here"}
    best = min(first.seconds.keys() - {OURS}, key=lambda name: first.seconds[name].median)
    assert all(row.seconds.keys() == {OURS, best} for row in others)
    assert all(row.differences[OURS] < 1e-6 and row.commit == "abc1234" for row in [first, *others])
    assert [row.left for row in others if row.cell.masks == masks.UNIFORM] == pytest.approx([0.1], abs=0.01)
    assert all(row.left <= 1 - row.cell.sparsity for row in others if row.cell.masks == masks.WORK)
    shown = capsys.readouterr().out
    assert shown.startswith("6 cells, about ") and "6 of 6 cells" in shown


def test_goes_on(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run("--sparsities", "0.5", "--masks", masks.UNIFORM)
    both = run("--sparsities", "0.5", "0.9", "--masks", masks.UNIFORM)
    assert both[0] == before[0] and len(both) == 2
    monkeypatch.setattr(rows, "DISTURBED", -1.0)
    assert run("--sparsities", "0.9", "--masks", masks.UNIFORM)[1] != both[1]
    monkeypatch.setattr(rows, "DISTURBED", 1e9)
    monkeypatch.setattr(rows, "version", lambda measured: "def5678")
    assert [row.commit for row in run("--sparsities", "0.9", "--masks", masks.UNIFORM)] == [
        "abc1234",
        "def5678",
    ]


def test_masks_are_kept(quick: None, tmp_path: Path) -> None:
    model, found = masks.sparse_network("tiny", masks.COUNT, 0.9, tmp_path)
    assert found.sparsity() == pytest.approx(0.9, abs=1e-3)
    assert torch.equal(model[4].weight != 0, found["4.weight"])
    (path,) = tmp_path.glob("tiny*")
    before = path.stat().st_mtime_ns
    _, again = masks.sparse_network("tiny", masks.COUNT, 0.9, tmp_path)
    assert path.stat().st_mtime_ns == before
    assert all(torch.equal(again[name], mask) for name, mask in found.items())


SERVER = f"""#!{sys.executable}
import runpy, sys, types, numpy, onnxruntime
assert sys.argv[1] == "-I"

class Engine:
    def __init__(self, model, batch_size, num_cores):
        assert batch_size == 2 and num_cores >= 1
        print("a banner")
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(self, inputs, val_inp=True):
        return self.session.run(None, {{self.session.get_inputs()[0].name: inputs[0]}})

sys.modules["deepsparse"] = types.SimpleNamespace(Engine=Engine, __version__="0.0")
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_deepsparse_takes_part_from_its_own_process(quick: None, tmp_path: Path) -> None:
    """ONNX Runtime in its place."""
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module)
    python = program(tmp_path / "python", SERVER)
    (row,) = run("--sparsities", "0.5", "--masks", masks.UNIFORM, "--deepsparse", str(python))
    assert row.seconds[DEEPSPARSE].median > 0 and row.differences[DEEPSPARSE] < 1e-5
    assert row.versions["deepsparse"] == "0.0" and row.over_deepsparse() > 0


def test_deepsparse_that_cannot_start(quick: None, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    python = program(tmp_path / "python", "#!/bin/sh\necho no engine >&2\n")
    (row,) = run("--sparsities", "0.5", "--masks", masks.UNIFORM, "--deepsparse", str(python))
    assert row.absent[DEEPSPARSE] == "DeepSparse must answer, got its end: no engine"
    with (
        pytest.raises(RuntimeError, match="no engine"),
        served(python, tiny().eval(), torch.zeros(1, *SHAPE)),
    ):
        pass


def test_a_version_is_of_code_that_there_is() -> None:
    """git is silent about a path that has moved."""
    assert all((ROOT / path).exists() for path in MEASURED)


def row(sparsity: float, seconds: dict[str, float]) -> Row:
    return Row(
        Cell("resnet50", 1, sparsity, masks.UNIFORM), 1 - sparsity,
        {name: Spread(s, s * 0.9, s * 1.1) for name, s in seconds.items()},
        {OURS: 1e-7}, {}, "a processor", 2, {"torch": "3.0"}, "2026-12-01", "abc1234",
    )  # fmt: skip


def test_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [
        row(0.9, {OURS: 0.01, CONTIGUOUS: 0.1, CHANNELS_LAST: 0.08, DEEPSPARSE: 0.02}),
        row(0.95, {OURS: 0.005, CHANNELS_LAST: 0.1}),
    ]
    wrong = replace(found[1], cell=Cell("resnet50", 16, 0.8, masks.WORK), differences={OURS: 0.5},
                    absent={"OpenVINO": "no module"})  # fmt: skip
    source = tmp_path / "rows.jsonl"
    file = Rows(source)
    for each in found:
        file.add(each)
    report.main([str(source), str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "a processor, 2 threads; torch 3.0; 2026-12-01, commit abc1234\n" in page
    assert "| 1 | 90% | uniform | 10.0% | 100 | 80 | - | - | 20 | 10 | 8.00 | 2.00 |" in page
    assert "| 1 | 95% | uniform | 5.0% | 100 | 80 | - | - | - | 5 | 20.00 | - |" in page
    assert "none differs by more than 1e-07 of the largest" in page
    assert "quartiles are within 10.0% of it" in page and "; 0 of 2 rows have more" in page
    assert "![milliseconds of a call](page.png)" in page
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    other = report.page([found[1], wrong], "")
    assert "largest entry: ours by 5e-01 (resnet50, batch 16, 80%, DRIVE by multiply-adds)" in other
    assert "- OpenVINO did not run in 1 cells: no module." in other and "![" not in other
    assert not report.picture([found[1]], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    assert json.loads(source.read_text().splitlines()[0])["seconds"]["ours"]["median"] == 0.01


def test_pictured_networks_are_raced() -> None:
    assert list(report.NETWORKS) == list(race.BATCHES)
    assert report.PICTURED.batch in race.BATCHES[report.PICTURED.network]
    assert np.isin(report.PICTURED.sparsity, race.SPARSITIES)
