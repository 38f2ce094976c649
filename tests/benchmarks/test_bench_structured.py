"""The page of smaller networks, by its command, which goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cpu import structured

pytest.importorskip("torch_pruning")


def test_runs_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = "--seeds 2 --sparsities 0.5 --epochs 2 --warmup-epochs 1 --limit-train 96"
    monkeypatch.setattr(structured, "RUNS", {"digits": tiny, "cnn4": tiny})
    monkeypatch.setattr(structured, "METHODS", "early_crop,random")
    page, out = tmp_path / "structured.md", str(tmp_path / "runs")
    structured.main(["--data-dir", "", "--out", out, "--runs", "digits", str(page)])
    text = page.read_text()
    assert "## small_cnn on digits" in text and text.count("| early_crop | ") == 4
    assert (tmp_path / "structured-digits.png").stat().st_size > 1000
    monkeypatch.setattr(structured, "drive", None)  # nothing is left to run
    structured.main(["--data-dir", "", "--out", out, "--runs", "digits", str(page)])
    assert page.read_text() == text
