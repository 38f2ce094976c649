"""The benchmark of budgets: cells, their speeds, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cpu.budget import cells, page, speeds, step
from drive.experiments.data.dataset import Dataset


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, iterations and levels of one network; two turns a measurement."""
    macs = (0.2, 0.1)
    changed = {
        "ITERATIONS": 2, "WARMUP": 1, "EPOCHS": 2, "BATCH": 16, "TRAINED": 32, "HELD_OUT": 16, "TESTED": 16,
        "NETWORKS": ("cnn4",), "MACS": macs, "ALPHAS": {"alpha 0": 0.0, "alpha 1": 1.0},
        "LEVELS": {"dense": (1.0,), "alpha 0": macs, "alpha 1": macs, "uniform": (0.1,)},
    }  # fmt: skip
    for module in (cells, speeds, page):
        for name, value in changed.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    for module in (speeds, page):
        monkeypatch.setattr(module, "UNTRAINED", "mlp")
        monkeypatch.setattr(module, "UNTRAINED_BATCH", 16)
    monkeypatch.setattr("drive.sparse.measure.MODEL_SECONDS", 0.0)
    monkeypatch.setattr("drive.sparse.measure.SECONDS", 0.0)
    monkeypatch.setattr("drive.sparse.measure._LEAST", 2)
    generator = torch.Generator().manual_seed(0)
    shown, tested = (torch.randint(256, (n, 3, 32, 32), generator=generator).byte() for n in (64, 16))
    data = Dataset(shown, torch.arange(64) % 10, tested, torch.arange(16) % 10, classes=10, augment=True)
    monkeypatch.setattr(cells, "load", lambda *_: data)


@pytest.mark.slow
def test_cells_speeds_page(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, folder = torch.get_num_threads(), tmp_path / "runs"
    try:
        monkeypatch.setattr(sys, "argv", ["cells", "--data-dir", "", "--out", str(folder), "--seeds", "0,1"])
        cells.main()
        found = [json.loads(path.read_text()) for path in folder.glob("cnn4-*.json")]
        assert len(found) == 2 * 6
        for cell in found:
            if cell["way"].startswith("alpha"):
                assert 0.9 * cell["level"] < cell["macs"] <= cell["level"]
            assert 0 <= cell["accuracy"] <= 1 and 0 <= cell["held out"] <= 1
        monkeypatch.setattr(cells, "run", None)
        cells.main()  # nothing is left to do
        monkeypatch.setattr(sys, "argv", ["speeds", "--data-dir", "", "--out", str(folder)])
        speeds.main()
        monkeypatch.setattr(step, "NETWORKS", {"resnet18": step.NETWORKS["resnet18"]})
        monkeypatch.setattr(sys, "argv", ["step", "--rounds", "1", "--out", str(folder)])
        step.main()
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(sys, "argv", ["page", str(folder), str(tmp_path / "budget.md")])
    page.main()
    text = (tmp_path / "budget.md").read_text()
    assert text.count("| alpha 1 |") == 2 + 1 + 1 + 1 and "## cnn4" in text and "nan" not in text
    assert text.count("| resnet18 | 11.7 M |") == 2
    assert (tmp_path / "budget.png").stat().st_size > 1000
    kept = json.loads((tmp_path / "budget.json").read_text())
    assert len(kept["cells"]) == 12
    assert [row["way"] for row in kept["speeds"]["mlp"]] == ["alpha 0", "alpha 1", "uniform"]


def test_accuracy_at_a_speed_lies_between_its_neighbours() -> None:
    points = [(8.0, 0.6), (2.0, 0.8), (16.0, 0.1)]
    assert page.at(4.0, points) == pytest.approx(0.7)
    assert page.at(32.0, points) is None and page.at(1.0, points) is None
