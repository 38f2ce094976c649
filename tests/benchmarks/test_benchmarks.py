"""`pytest benchmarks/ --benchmark-only` and the page that is made of it, on small tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT, table

# variants of each benchmark, by groups
STORY = {
    "test_step": (1, ["fused_drive_prune", "torch.mul", "reference, topk", "reference, kthvalue",
                      "global_unstructured"]),
    "test_iterations": (1, ["no pruning", "drive.prune", "drive.reference"]),
    "test_layer": (4, ["dense", "masked", "sparse"]),
    "test_training_step": (1, ["no pruning", "fused_drive_prune", "drive.reference"]),
    "test_optimizer_step": (2, ["weights free", "masks held"]),
}  # fmt: skip


def run(path: Path, **environment: str) -> Path:
    options = ["--benchmark-only", "--size", "tiny", "--benchmark-json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *options],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the CPU."""
    return run(tmp_path_factory.mktemp("benchmarks") / "bench.json", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_runs_on_a_gpu(tmp_path: Path):
    run(tmp_path / "bench.json")


def test_everything_is_timed(written: Path):
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for benchmark in json.loads(written.read_text())["benchmarks"]:
        groups.setdefault((benchmark["name"].partition("[")[0], benchmark["group"]), []).append(benchmark)
        facts = {"device", "torch", "drive", "python", "threads", "date", "commit", "entries"}
        assert facts <= benchmark["extra_info"].keys()
        assert benchmark["params"]["size"] == "tiny" and benchmark["stats"]["median"] > 0
    assert {name: sum(n == name for n, _ in groups) for name in STORY} == {
        n: c for n, (c, _) in STORY.items()
    }
    for (name, _), members in groups.items():
        assert [member["param"].rpartition("-")[2] for member in members] == STORY[name][1]


def test_page(written: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table.py", str(written), str(tmp_path / "bench.md")])
    table.main()
    text = (tmp_path / "bench.md").read_text()
    found = json.loads(written.read_text())["benchmarks"]
    assert text.count("\n## ") == len({benchmark["group"] for benchmark in found}) == 9
    medians = {benchmark["name"]: benchmark["stats"]["median"] for benchmark in found}
    ratio = medians["test_step[tiny-torch.mul]"] / medians["test_step[tiny-fused_drive_prune]"]
    (row,) = (line for line in text.splitlines() if line.startswith("| torch.mul |"))
    assert row.endswith(f"| {ratio:.3g} |")
