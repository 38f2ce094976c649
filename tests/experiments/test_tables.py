"""Tables of many cells: killed, paused, scaled, shared - and the same numbers in the end."""

import csv
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress

import drive
from drive.experiments.data import sources as data
from drive.experiments.data.dataset import seed_of
from drive.experiments.paper import tables
from drive.experiments.paper import trainer as cell_run
from drive.experiments.paper.grids import POWERS, Grid, Key, ablated, ablation, compared
from drive.experiments.paper.published import METHODS, ROWS
from drive.experiments.paper.queue import Experiment, Outcome
from drive.experiments.paper.trainer import CellRun
from drive.experiments.paper.work import RESULT
from drive.experiments.runs.locks import locked
from drive.experiments.runs.stored import read_stamped
from drive.experiments.training import loop as train
from drive.experiments.training.compute import Compute

pytest.importorskip("matplotlib", reason="tables come with figures")

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["imp", "snip", "drive"]


def grid(**options: object) -> Grid:
    settings = {"seeds": 2, "scale": 0.07, "sparsities": (0.9,), **options}
    return compared(Grid([ROWS["cifar10-mlp"]], **settings), NAMES)


def experiment(folder: Path, grid: Grid, images: Path) -> Experiment:
    return Experiment(folder, grid.cells, lambda name: data.load(name, str(images)))


def run(experiment: Experiment, **options: object) -> Outcome:
    with Progress(disable=True) as progress:
        return experiment.run(progress, **options)


def accuracies(grid: Grid, outcome: Outcome) -> dict[Key, list[float]]:
    return {key: tables.Numbers(grid, outcome).accuracies(key) for key in grid.groups}


def untimed(outcome: Outcome) -> list[dict[str, object]]:
    return [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in outcome.results.values()]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Outcome, Path]:
    """An uninterrupted run."""
    planned, folder = grid(), tmp_path_factory.mktemp("whole")
    return planned, run(experiment(folder, planned, images)), folder


def test_every_cell_is_a_folder_of_its_own(whole: tuple[Grid, Outcome, Path]) -> None:
    planned, outcome, folder = whole
    assert len(outcome.results) == len(planned.cells) == 2 * (1 + 3) and not outcome.failures
    for cell, result in outcome.results.items():
        inside = folder / "cells" / cell.name
        assert read_stamped(inside / "result.json", RESULT, "") == result
        assert json.loads((inside / "config.json").read_text())["recipe"]["epochs"] == 4
        epochs = list(csv.DictReader((inside / "log.csv").open()))
        assert [epoch["epoch"] for epoch in epochs] == ["1", "2", "3", "4"]
        assert float(epochs[-1]["accuracy"]) == result["correct"] / result["tested"]
        assert float(epochs[0]["lr"]) == pytest.approx(0.005) and float(epochs[-1]["lr"]) < 0.02
        total = result["warmup_seconds"] + result["train_seconds"]
        assert sum(float(epoch["seconds"]) for epoch in epochs) == pytest.approx(total)
        assert not list(inside.glob("*.pt")) and result["scale"] == 0.07


def test_cells_of_one_seed_share_their_warm_up(whole: tuple[Grid, Outcome, Path]) -> None:
    _, outcome, folder = whole
    assert len(list((folder / "cells").glob("*-warmup-*"))) == 2  # seeds
    for seed in range(2):
        same = {
            result["warmup_seconds"] for cell, result in outcome.results.items()
            if cell.seed == seed and cell.variant.method in ("drive", "dense")
        }  # fmt: skip
        assert len(same) == 1 and same.pop() > 0


@pytest.mark.parametrize("seed", range(2))
def test_killed_in_the_middle_of_a_write(
    whole: tuple[Grid, Outcome, Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Everything is saved at every opportunity, and the process dies at random ones."""
    planned, expected, _ = whole
    monkeypatch.setattr("drive.experiments.paper.work.SAVE_EVERY", 0.0)
    moments, real = random.Random(seed), os.replace

    def replace_or_die(source: object, target: object) -> None:
        if moments.random() < 0.05:
            raise KeyboardInterrupt
        real(source, target)

    kills = 0
    monkeypatch.setattr(os, "replace", replace_or_die)
    while (outcome := run(experiment(tmp_path, planned, images))).interrupted:
        kills += 1
    assert kills > 1 and untimed(outcome) == untimed(expected)


def test_nothing_is_begun_after_the_budget(images: Path, tmp_path: Path) -> None:
    planned = grid()
    outcome = run(experiment(tmp_path, planned, images), deadline=time.monotonic())
    assert outcome.open == planned.cells and not outcome.results
    page = tables.against_paper("Table 1", planned, NAMES, outcome)
    assert "Not pruned: -." in page and "| drive | - | - |" in page


def test_paused_at_the_end_of_every_epoch(
    whole: tuple[Grid, Outcome, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call begins every cell, whose time is over then."""
    _, expected, _ = whole
    planned, deadline = grid(seeds=1), time.monotonic() + 1e6
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + 2e6)
    for module in (train, cell_run):
        monkeypatch.setattr(module, "time", late)
    calls, outcome = 0, Outcome(open=planned.cells)
    while outcome.open:
        calls += 1
        outcome = run(experiment(tmp_path, planned, images), deadline=deadline, pause=True)
        assert len(list(tmp_path.glob("cells/*/training.pt"))) <= 1 + len(outcome.open)
    assert calls == 1 + 4  # a network is pruned, then trained for 4 epochs
    found = [result for result in untimed(expected) if result["seed"] == 0]
    assert untimed(outcome) == found


def test_scaled_cells_say_so(whole: tuple[Grid, Outcome, Path]) -> None:
    planned, outcome, _ = whole
    page = tables.against_paper("Table 1", planned, NAMES, outcome)
    assert "**\\* Scaled: 7 % of the epochs" in page and ", 21 training images." in page
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| {name}" for name in NAMES))]
    assert len(rows) == 3 and all(row.count(" *") == 1 for row in rows)
    assert "IMP prunes " in page


def test_full_cells_stand_beside_the_published_numbers() -> None:
    row = ROWS["cifar10-alexnet"]
    planned = compared(Grid([row], seeds=2, scale=1), METHODS)
    found = Outcome()
    for cell in planned.cells:
        if cell.seed == 0 or cell.variant.name != "snip":
            found.results[cell] = {
                "correct": 8000 + 100 * cell.seed, "tested": 10_000, "train_images": 50_000,
                "warmup_seconds": 5.0, "round_seconds": 215.0 if cell.variant.name == "imp" else 0.0,
                "prune_seconds": 5.0, "train_seconds": 50.0, "made_with": {"torch": "2.0", "gpu": "one"},
            }  # fmt: skip
            if cell.variant.name == "drive" and cell.goal.gone > 0.9:
                found.results[cell]["macs_left"] = 0.25 + 0.1 * cell.seed
    page = tables.against_paper("Table 1", planned, METHODS, found)
    assert "*" not in page and "Scaled" not in page and "Made with torch 2.0, gpu one; float32." in page
    assert "Not pruned: 80.50 ± 0.71 (84.20, -3.70)." in page
    assert "| drive | 80.50 ± 0.71 (86.97, -6.47) | 80.50 ± 0.71 (87.21, -6.71) |" in page
    assert "| snip | 80.00 [1 of 2 seeds] (83.09, -3.09) |" in page
    assert "| - / 30.0 / 30.0 / 30.0 | 10.0 (220) |" in page and "| - | 225.0 (24,000) |" in page
    assert "IMP prunes 22.5 times as long as DRIVE (published: 109.1)." in page


def test_what_changes_the_result_changes_the_cell() -> None:
    def names(**options: object) -> set[str]:
        return {cell.name for cell in grid(**options).cells}

    first = names()
    gpu = names(compute=Compute("cuda"))
    assert names(compute=Compute("cuda:1")) == gpu  # its number does not matter
    for other in (gpu, names(scale=0.08), names(compute=Compute(precision="bfloat16"))):
        assert not first & other
    assert first < names(seeds=3)


def test_the_page_says_how_it_was_computed() -> None:
    assert Compute().arithmetic == "float32"
    fast = Compute(precision="bfloat16", channels_last=True, compile=True, sparse_ops=True, devices=2)
    assert fast.arithmetic == "bfloat16, channels_last, torch.compile, sparse ops, 2 devices"


def test_another_process_is_left_to_its_cell(images: Path, tmp_path: Path) -> None:
    planned = grid(seeds=1)
    busy = planned.cells[2]
    folder = tmp_path / "cells" / busy.name
    folder.mkdir(parents=True)
    with locked(folder) as mine:
        assert mine
        assert run(experiment(tmp_path, planned, images)).open == [busy]
    assert not run(experiment(tmp_path, planned, images)).open


def test_who_made_the_warm_up_does_not_matter(images: Path, tmp_path: Path) -> None:
    """With BatchNorm, which would see a difference in mode or statistics."""
    row = replace(ROWS["cifar10-mlp"], model="small_cnn")
    planned = compared(Grid([row], 1, 0.07, (0.9,)), ["drive"])
    shared = run(experiment(tmp_path / "shared", planned, images))  # the dense network's cell made it
    own = planned.cells[1:]
    alone = run(Experiment(tmp_path / "alone", own, lambda name: data.load(name, str(images))))
    assert untimed(alone) == untimed(shared)[1:]
    weights = [
        torch.load(next((tmp_path / name).glob("cells/*warmup*/training.pt")), weights_only=True)["model"]
        for name in ("shared", "alone")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_levels_of_imp_are_those_of_one_call(images: Path, tmp_path: Path) -> None:
    """Each level can be resumed from, and the last ends where `drive.prune` would."""
    planned = grid(seeds=1, scale=0.15, sparsities=(0.9,))
    cell = next(cell for cell in planned.cells if cell.variant.name == "imp")
    assert (cell.variant.iterations, cell.variant.rounds) == (3, 2)
    with Progress(disable=True) as progress:
        work = CellRun(cell, tmp_path, data.load("cifar10", str(images)), progress, keep_network=True)
        work.run()
    saved = drive.Masks.load(tmp_path / cell.name / "masks.safetensors")

    recipe = replace(cell.recipe, epochs=2)

    def train_round(model: torch.nn.Module, masks: drive.Masks | None, number: int) -> None:
        train.train(model, work.batches, recipe, epochs=range(2 * number, 2 * number + 2), masks=masks)

    torch.manual_seed(seed_of(0, "initialisation"))
    stream = work.batches.endless("prune", lambda: None)
    masks = drive.prune(
        work.network.build(), stream, F.cross_entropy, method="imp", sparsity=0.9, iterations=3,
        train=train_round,
        progress=False,
    )  # fmt: skip
    assert all(torch.equal(saved[name], mask) for name, mask in masks.items())


def test_ablation(images: Path, tmp_path: Path) -> None:
    planned = ablated(Grid([ROWS["cifar10-mlp"]], seeds=1, scale=0.07, sparsities=(0.9,)))
    assert {cell.variant.warmup for cell in planned.cells} == {0, 1, 2}  # 5 and 10 leave none of 4 epochs
    assert len(planned.cells) == 1 + 3 + 3 * 3 + len(POWERS) - 1
    outcome = run(experiment(tmp_path, planned, images))
    found = {key.variant: values for key, values in accuracies(planned, outcome).items()}
    kept = {cell.variant.name: result["kept"] for cell, result in outcome.results.items()}
    # DRIVE's whole score ranks as |theta G| does: docs/method.md
    for one, other in (
        ("iterative SNIP", "DRIVE 0 warm-up 100 iterations"),
        ("warm-up, one-shot SNIP", "DRIVE 1 warm-up 1 iterations"),
        ("without connection sensitivity", "DRIVE 1 warm-up 100 iterations"),
    ):
        assert found[one] == found[other] and kept[one] == kept[other], one
    page = tables.ablation_page(planned, outcome)
    assert page.count("| 10 | - | - | - |") == 1
    assert all(f"| {name} |" in page for name in POWERS if not name.startswith("p "))
    assert page.count(" *") >= 20


def test_every_variant_has_its_own_name() -> None:
    names = [variant.name for variant in ablation(5)]
    assert len(names) == len(set(names)) == 3 + 15 + 7


@pytest.mark.parametrize(
    "compute", [Compute(precision="bfloat16"), Compute(channels_last=True), Compute(compile=True)]
)
def test_ways_to_compute(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: Compute
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)  # it takes its time
    planned = compared(Grid([ROWS["cifar10-cnn4"]], 1, 0.07, (0.9,), compute), ["snip"])
    outcome = run(experiment(tmp_path, planned, images))
    assert not outcome.failures and bool(compiled) == compute.compile
    assert all(result["final_loss"] < 2 for result in outcome.results.values())
