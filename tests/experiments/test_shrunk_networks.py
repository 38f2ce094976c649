"""Networks that are shrunk: `drive compare --structure channels`, `--prior`, `drive train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn

import drive
from drive.experiments.cli.app import main
from drive.experiments.cli.options import prune_defaults
from drive.experiments.data import sources
from drive.experiments.paper.cell import Cell
from drive.experiments.paper.goal import Goal
from drive.experiments.paper.trainer import CellRun
from drive.experiments.paper.variants import Variant
from drive.experiments.training.compute import Compute
from drive.experiments.training.footprint import measured
from drive.experiments.training.networks import Network
from drive.experiments.training.recipe import Recipe

pytest.importorskip("torch_pruning")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="reports come with figures")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--epochs", "3", "--limit-train", "128", "--batch-size", "32", "--warmup-epochs", "1"]
TINY += ["--iterations", "3", "--seeds", "2"]
SECONDS = "seconds", "joules"


def cell(method: str, **options: Any) -> Cell:
    variant = Variant(method, method, rounds=3 if method in ("early_crop", "imp") else 0, **options)
    goal = Goal(0.9) if variant.prior else Goal(0.5)
    return Cell("digits", "small_cnn", variant, goal, 0, Recipe(3, 0.1, 32), Compute())


def run(some: Cell, folder: Path, **options: Any) -> dict[str, Any]:
    with Progress(disable=True) as progress:
        return CellRun(some, folder, sources.load("digits").limited(128), progress, **options).run()


def numbers(found: Any) -> Any:
    """Without what a clock has measured."""
    if not isinstance(found, dict):
        return found
    return {name: numbers(value) for name, value in found.items() if not name.endswith(SECONDS)}


@pytest.mark.parametrize("method", ["early_crop", "snip", "imp"])
def test_a_cell_is_shrunk_before_it_is_trained(method: str, tmp_path: Path):
    some = cell(method, structure="channels")
    result = run(some, tmp_path, keep_network=True)
    assert result["nodes_left"] == 0.5 and 0 < result["parameters_left"] < 0.5
    assert result["footprint"]["bytes"] > 0
    small = drive.rebuild(
        Network("small_cnn", 10, 1, 8).build(),
        tmp_path / some.name / "small.safetensors",
        torch.zeros(1, 1, 8, 8),
    )
    left = sum(parameter.numel() for parameter in small.parameters())
    whole = sum(parameter.numel() for parameter in Network("small_cnn", 10, 1, 8).build().parameters())
    assert left / whole == result["parameters_left"]


@pytest.mark.parametrize("method", ["early_crop", "drive"])
def test_entries_are_pruned_on_top_of_channels_to_a_share_of_all(method: str, tmp_path: Path):
    result = run(cell(method, prior=0.5), tmp_path)
    weights = drive.masks.prunable(Network("small_cnn", 10, 1, 8).build())
    total = sum(weight.numel() for weight in weights.values())
    assert sum(result["kept"].values()) == pytest.approx(0.1 * total, abs=1)
    assert result["nodes_left"] == 0.5 and result["macs_left"] < result["parameters_left"]


@pytest.mark.parametrize("options", [{"structure": "channels"}, {"prior": 0.5}])
def test_killed_anywhere_and_run_again(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    some = cell("early_crop", **options)
    expected = numbers(run(some, tmp_path / "whole", keep_network=True))
    monkeypatch.setattr("drive.experiments.paper.work.SAVE_EVERY", 0.0)
    real_save, folder = torch.save, tmp_path / "broken"
    for saves in (1, 1, 1):  # it goes on from each

        def save(*arguments: Any, count: list[int] = [saves]) -> None:  # noqa: B006
            count[0] -= 1
            if count[0] < 0:
                raise KeyboardInterrupt
            real_save(*arguments)

        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(some, folder, keep_network=True)
        monkeypatch.setattr(torch, "save", real_save)
    assert numbers(run(some, folder, keep_network=True)) == expected
    files = [root / some.name / "small.safetensors" for root in (tmp_path / "whole", folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    words = ["--structure", "channels", "--methods", "snip,random", "--sparsities", "0.5,0.8"]
    assert main(["compare", *TINY, *words, "--out", str(folder)]) == 0
    assert "parameters left; memory" in capsys.readouterr().out.replace("\n", " ")
    report = json.loads((folder / "report.json").read_text())
    assert [row["nodes_left"] for row in report["pruned"]] == pytest.approx([0.5, 0.2] * 2, abs=0.01)
    assert report["dense"]["parameters_left"] == 1.0
    assert all(row["step_bytes"] < report["dense"]["step_bytes"] for row in report["pruned"])
    assert "seconds" not in json.dumps(report)
    page = (folder / "tables.md").read_text()
    assert "| channels pruned | 50 % | 80 % |" in page and "Parameters left; memory" in page
    assert (folder / "small.safetensors").exists() and not (folder / "checkpoint.pt").exists()
    assert main(["compare", "--resume", "--out", str(folder)]) == 0


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words, message in (
        ("compare --prior 0.5 --structure channels", "--prior must be a share below 1, without --structure"),
        ("compare --prior 1", "--prior must be a share below 1"),
        ("compare --structure rows", "--structure must be one of unstructured, channels"),
        ("train --structure channels", "--structure must come with --sparsity or --macs"),
        ("train --method snip", "--method must come with --sparsity or --macs, got snip alone"),
        ("train --sparsity 0.5 --macs 0.5", "--macs must be left out with --sparsity, got both"),
        ("train --sparsity 1", "--sparsity must be a fraction in [0, 1)"),
    ):
        assert main([*words.split(), "--out", str(tmp_path / "none")]) == 2, words
        assert message in " ".join(capsys.readouterr().err.split()), words
    assert prune_defaults({})["structure"] == "unstructured"


@pytest.mark.parametrize("method", ["early_crop", "snip"])
def test_train_shrinks_at_first_and_resumes(method: str, tmp_path: Path):
    words = [
        "train",
        "--method",
        method,
        "--structure",
        "channels",
        "--sparsity",
        "0.5",
        "--limit-train",
        "128",
    ]
    for folder, epochs in (("whole", 3), ("again", 3)):
        assert main([*words, "--epochs", str(epochs), "--out", str(tmp_path / folder)]) == 0
    whole, again = tmp_path / "whole", tmp_path / "again"
    small = (whole / "small.safetensors").read_bytes()
    assert small == (again / "small.safetensors").read_bytes()
    for name in ("report.json", "small.safetensors"):
        (again / name).unlink()
    assert main(["train", "--resume", "--out", str(again)]) == 0
    assert (again / "small.safetensors").read_bytes() == small
    report = json.loads((whole / "report.json").read_text())
    assert 0.5 < report["sparsity"] < 1 and 0 < report["macs_left"] < 0.6


def test_a_footprint_is_counted():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs, labels = torch.randn(5, 8), torch.arange(5) % 3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measured(model, inputs, labels, Recipe(2, 0.1, 5))
    entries = 8 * 4 + 4 + 4 * 3 + 3
    assert (found.weights, found.gradients, found.state) == (4 * entries,) * 3  # momentum
    # the inputs, what ReLU gives (for its own gradient and the next layer), log_softmax's outputs, the labels
    # and the sum of the labels' weights
    assert (
        found.activations >= 4 * (5 * 8 + 5 * 4 + 5 * 3)
        and found.activations <= 4 * (5 * 8 + 5 * 4 + 5 * 3) + 48
    )
    assert found.seconds > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
