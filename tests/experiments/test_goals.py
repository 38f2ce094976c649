"""Networks that are pruned to a share of their multiply-adds, and tables that say how much is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

import drive
from drive.experiments.cli.app import main
from drive.experiments.cli.options import compare_defaults, prune_defaults
from drive.experiments.data import sources
from drive.experiments.paper import report
from drive.experiments.paper.cell import Cell
from drive.experiments.paper.compare import Config
from drive.experiments.paper.goal import Goal
from drive.experiments.paper.trainer import CellRun
from drive.experiments.paper.variants import Variant
from drive.experiments.training import macs
from drive.experiments.training.compute import Compute
from drive.experiments.training.networks import Network
from drive.experiments.training.recipe import Recipe

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="reports come with figures")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--epochs", "3", "--limit-train", "128", "--batch-size", "32", "--warmup-epochs", "1"]
TINY += ["--iterations", "3", "--seeds", "2"]


def cell(goal: Goal, variant: Variant | None = None) -> Cell:
    recipe = Recipe(2, 0.1, 32)
    return Cell("digits", "small_cnn", variant or Variant("snip", "snip"), goal, 0, recipe, Compute())


def test_names_of_goals():
    assert (Goal(0.9).title, Goal(macs=0.05, alpha=0.5).title) == ("90 %", "5 % of the multiply-adds")
    assert cell(Goal(macs=0.05, alpha=0.5)).title.endswith("snip to 5 % of the multiply-adds, seed 0")
    names = {cell(goal).name for goal in (Goal(0.9), Goal(macs=0.1, alpha=1.0), Goal(macs=0.1, alpha=0.5))}
    assert len(names) == 3 and any("-macs0.1-" in name for name in names)
    assert cell(Goal(0.9)).as_dict()["sparsity"] == 0.9 and "macs" not in cell(Goal(0.9)).as_dict()


def test_steps_to_a_goal():
    assert [goal.sparsity for goal in Goal(0.75).steps(2)] == [0.5, 0.75]
    steps = Goal(macs=0.25, alpha=0.5).steps(2)
    assert steps == [Goal(macs=0.5, alpha=0.5), Goal(macs=0.25, alpha=0.5)]
    assert Goal(0.9).steps(1) == [Goal(0.9)]


@pytest.mark.parametrize(
    "variant", (Variant("imp", "imp", iterations=3, rounds=1), Variant("gradual", "gradual", iterations=2))
)
def test_methods_that_train_reach_a_budget(variant: Variant, tmp_path: Path):
    data = sources.load("digits").limited(64)
    goal = Goal(macs=0.2, alpha=1.0)
    with Progress(disable=True) as progress:
        result = CellRun(cell(goal, variant), tmp_path, data, progress).run()
    assert 0.19 < result["macs_left"] <= 0.2 and (result["macs"], result["alpha"]) == (0.2, 1.0)
    assert "sparsity" not in result


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    options = ["--macs", "0.05,0.2", "--alpha", "0.5", "--out", str(folder)]
    assert main(["prune", *TINY, "--methods", "drive,snip", *options]) == 0
    found = json.loads((folder / "report.json").read_text())
    goals = [(row["macs"], row["alpha"]) for row in found["pruned"]]
    assert goals == [(0.2, 0.5), (0.05, 0.5)] * 2
    assert all(row["macs"] - 0.02 < row["macs_left"] <= row["macs"] for row in found["pruned"])
    assert found["verdict"].startswith("At 5 % of the multiply-adds left DRIVE ")
    page = (folder / "tables.md").read_text()
    assert page.count("| multiply-adds left | 20 % | 5 % | multiply-adds left in % |") == 3
    assert page.count(" | 20.0 / 5.0 |") == 3 * 2
    images = torch.zeros(1, 1, 8, 8)
    masks = drive.Masks.load(folder / "masks.safetensors")  # of the sparsest
    assert macs.macs_left(Network("small_cnn", 10, 1, 8).build(), masks, images) <= 0.05
    assert all((folder / name).stat().st_size > 10_000 for name in ("accuracy.png", "layers.png", "time.png"))
    capsys.readouterr()
    assert main(["prune", "--resume", *options]) == 0
    assert main(["prune", "--resume", "--macs", "0.3", "--out", str(folder)]) == 2
    assert "--macs must be [0.2, 0.05] as in " in capsys.readouterr().err


def test_what_is_asked_for_by_default():
    budget = compare_defaults({"macs": [0.1]})
    assert set(drive.methods.names()) - set(budget["methods"]) == {"rigl"}
    assert (budget["sparsities"], budget["macs"], budget["alpha"]) == ([], [0.1], drive.plan.DEFAULT_ALPHA)
    zeros = prune_defaults({})
    assert (zeros["sparsities"], zeros["macs"], zeros["alpha"]) == ([0.9, 0.95, 0.98, 0.993], [], None)
    assert Config(**zeros).goals[-1] == Goal(0.993)


def test_tables_fit_into_a_terminal():
    config = prune_defaults({"methods": ["drive", "early_crop"], "seeds": 3})
    rows = [
        {
            "method": method, "sparsity": sparsity, "mean": 0.9917, "std": 0.0028, "empty": [[]],
            "disconnected": [[]], "prune_seconds": 10.5, "macs_left": None if method == "drive" else 0.125,
        }
        for method in config["methods"] for sparsity in config["sparsities"]
    ]  # fmt: skip
    console = Console(width=80)
    with console.capture() as captured:
        for table in report.tables({"config": config, "dense": rows[0], "pruned": rows}, rows):
            console.print(table)
    lines = captured.get().splitlines()
    assert len([line for line in lines if "drive" in line]) == 3
    assert sum(line.count("99.17 ± 0.28") for line in lines) == 8 + 1
    assert sum(line.count(" 12.5 ") for line in lines) == 4


def test_of_older_results_it_is_not_known():
    assert macs.cell([[{"correct": 1}], [{}]]) == "-"
    assert macs.cell([[{"macs_left": 0.5}, {"macs_left": 0.25}], [{}]]) == "37.5 / -"
