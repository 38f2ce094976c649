"""`drive prune`: killed anywhere, resumed, the same report byte for byte."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import environment
from rich.progress import Progress
from torch import nn

import drive
from drive.experiments.data.dataset import Dataset
from drive.experiments.data.sources import load
from drive.experiments.paper import report
from drive.experiments.paper import trainer as cell_run
from drive.experiments.paper.compare import Comparison, Config
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.locks import LOCK
from drive.experiments.training import loop as train
from drive.experiments.training.networks import Network

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="drive prune draws figures")

QUICK = ["--epochs", "6", "--warmup-epochs", "2", "--iterations", "20", "--seeds", "2"]
QUICK += ["--sparsities", "0.9,0.98"]
pytestmark = pytest.mark.usefixtures("one_thread")


def start(folder: Path, *options: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "drive", "prune", "--out", str(folder), *options]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[bytes]") -> None:
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint.decode()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(folder, *QUICK))
    return folder


@pytest.fixture
def digits() -> Dataset:
    return load("digits").limited(256)


def config(**options: object) -> Config:
    settings = {
        "data": "digits", "data_dir": None, "limit_train": 256, "model": "small_cnn",
        "methods": ["drive", "snip", "magnitude"], "sparsities": [0.9, 0.98], "macs": [],
        "alpha": None, "structure": "unstructured", "prior": 0.0, "seeds": 1, "epochs": 3,
        "warmup_epochs": 1, "iterations": 3, "batch_size": 64, "lr": 0.1, "sparse_ops": False,
        "device": "cpu", "threads": 1,
    }  # fmt: skip
    return Config(**{**settings, **options})


def run(comparison: Comparison) -> list[dict[str, object]]:
    with Progress(disable=True) as progress:
        return comparison.run(progress)


def numbers(results: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{k: v for k, v in result.items() if not k.endswith("seconds")} for result in results]


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(uninterrupted: Path, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed of the moments:", seed)  # shown when the test fails
    moments = random.Random(seed)
    folder, options = tmp_path / "run", QUICK
    for finished in sorted(moments.sample(range(1, 12), 3)):  # of 14 networks
        process = start(folder, *options)
        while len(list(folder.glob("cells/*/result.json"))) < finished:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        options = ["--resume"]
    finish(start(folder, "--resume"))
    assert (folder / "report.json").read_bytes() == (uninterrupted / "report.json").read_bytes()
    masks = [drive.Masks.load(f / "masks.safetensors") for f in (folder, uninterrupted)]
    assert all(torch.equal(masks[0][name], mask) for name, mask in masks[1].items())


def test_artefacts(uninterrupted: Path) -> None:
    found = {path.name for path in uninterrupted.iterdir()}
    figures = {"accuracy.png", "layers.png", "time.png"}
    files = {
        "config.json", "report.json", "timing.json", "tables.md", "checkpoint.pt", "masks.safetensors",
    }  # fmt: skip
    assert found == {"cells", LOCK} | figures | files
    assert all((uninterrupted / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    written = (uninterrupted / "report.json").read_text()
    assert "seconds" not in written
    assert "DRIVE" in json.loads(written)["verdict"]


def test_checkpoint_and_masks_are_of_one_sparse_network(uninterrupted: Path) -> None:
    checkpoint = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    model = Network(**checkpoint["network"]).build()
    model.load_state_dict(checkpoint["model"])
    masks = drive.Masks.load(uninterrupted / "masks.safetensors")
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.98 * total)
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_every_cell_has_exactly_the_sparsity_asked_for(uninterrupted: Path) -> None:
    sizes = json.loads((uninterrupted / "report.json").read_text())["prunable"]
    cells = [json.loads(p.read_text()) for p in uninterrupted.glob("cells/*/result.json")]
    assert len(cells) == 2 * (1 + 3 * 2)
    for cell in cells:
        if cell["method"] != "dense":
            pruned = sum(sizes.values()) - sum(cell["kept"].values())
            assert pruned == round(cell["sparsity"] * sum(sizes.values()))


def test_cells_do_not_depend_on_what_ran_before(digits: Dataset, tmp_path: Path) -> None:
    folders = [tmp_path / "all", tmp_path / "alone"]
    for folder in folders:
        folder.mkdir()
    together = numbers(run(Comparison(config(), digits, folders[0])))
    torch.rand(17)
    alone = numbers(run(Comparison(config(methods=["snip"], sparsities=[0.98]), digits, folders[1])))
    assert [
        cell for cell in together if (cell["method"], cell["sparsity"]) in (("dense", 0.0), ("snip", 0.98))
    ] == alone


def test_a_cell_resumes_inside_its_training(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_folder, folder = tmp_path / "whole", tmp_path / "broken"
    for path in (expected_folder, folder):
        path.mkdir()
    expected = numbers(run(Comparison(config(), digits, expected_folder)))

    monkeypatch.setattr("drive.experiments.paper.work.SAVE_EVERY", 0.0)
    real_save = torch.save
    saves = iter(range(5))  # warm-up 1, dense 2, drive: as it is pruned, its first epoch

    def save(*arguments: object) -> None:
        if next(saves, None) is None:
            raise KeyboardInterrupt
        real_save(*arguments)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(Comparison(config(), digits, folder))
    monkeypatch.setattr(torch, "save", real_save)
    assert list(folder.glob("cells/*-drive-*/training.pt"))  # stopped in the middle of this one
    assert numbers(run(Comparison(config(), digits, folder))) == expected
    left = [p.parent.name for p in folder.glob("cells/*/*.pt") if p.name != "checkpoint.pt"]
    assert len(left) == 1 and left[0].startswith("digits-small_cnn-warmup-seed0")


def test_other_data_cannot_join_a_run(digits: Dataset, tmp_path: Path) -> None:
    few = config(methods=["snip"], sparsities=[0.9])
    run(Comparison(few, digits, tmp_path))
    more = config(methods=["snip"], sparsities=[0.9, 0.95])
    with pytest.raises(InputError, match="--data must be what"):
        run(Comparison(more, digits.limited(255), tmp_path))


@pytest.mark.parametrize(("drive_right", "word"), [(90, "beats"), (80, "equals"), (70, "does not beat")])
def test_verdict_says_it_plainly(digits: Dataset, tmp_path: Path, drive_right: int, word: str) -> None:
    settings = config(sparsities=[0.98], seeds=2)
    made = Comparison(settings, digits, tmp_path)
    kept = {
        f"{name}.weight": 1
        for name, module in made.network.build().named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    results = [
        {
            "seed": cell.seed, "method": cell.variant.name, **cell.goal.as_dict(), "kept": kept,
            "tested": 100, "correct": drive_right if cell.variant.name == "drive" else 80,
            "empty": [], "disconnected": [],
        }
        for cell in made.cells
    ]  # fmt: skip
    summary = report.summarise(made, results)
    assert summary["verdict"] == (
        f"At 98 % pruned DRIVE {word} SNIP in the mean of 2 seeds: "
        f"{drive_right:.2f} % against 80.00 % test accuracy."
    )


def test_layers_that_collapse_are_drawn(digits: Dataset, tmp_path: Path) -> None:
    made = Comparison(config(), digits, tmp_path)
    summary = report.summarise(made, run(made))
    summary["pruned"][0]["density"]["fc1.weight"] = 0.0
    report.draw_layers(summary, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def every_method(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[dict[str, object]]]:
    settings = config(methods=drive.methods.names(), sparsities=[0.9], epochs=4, limit_train=192)
    experiment = Comparison(settings, load("digits").limited(192), tmp_path_factory.mktemp("every"))
    return experiment, run(experiment)


def test_every_method_prunes_and_trains(every_method) -> None:
    experiment, results = every_method
    assert [r["method"] for r in results] == ["dense", *drive.methods.names()]
    total = sum(w.numel() for w in drive.targets.prunable(experiment.network.build()).values())
    for result in results[1:]:
        assert sum(result["kept"].values()) == total - round(0.9 * total), result["method"]
        assert result["final_loss"] < 2.2 and result["train_seconds"] > 0 and result["prune_seconds"] > 0
        assert result["empty"] == result["disconnected"] == []


def test_training_methods_are_charged_for_their_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IMP trains 11 levels at 90 %, and once more: seconds of training, not of pruning."""
    now, one_epoch = 0, train._one_epoch

    def of_a_second(*arguments: object) -> float:  # and nothing else takes time
        nonlocal now
        now += 1
        return one_epoch(*arguments)

    monkeypatch.setattr(train, "_one_epoch", of_a_second)
    for module in (train, cell_run):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    settings = config(methods=["random", "imp"], sparsities=[0.9], epochs=4, limit_train=192)
    experiment = Comparison(settings, load("digits").limited(192), tmp_path)
    results = run(experiment)
    found = {r["method"]: r for r in results}
    assert (found["random"]["round_seconds"], found["random"]["train_seconds"]) == (0, 4)
    assert (found["imp"]["round_seconds"], found["imp"]["train_seconds"]) == (11 * 4, 4)
    assert found["random"]["prune_seconds"] == found["imp"]["prune_seconds"] == 0
    times = {row["method"]: row for row in report.timings(experiment.config, results)}
    assert times["imp"]["train_seconds"] == 11 * 4 + 4


def test_tables_say_what_the_report_says(every_method) -> None:
    experiment, results = every_method
    summary, times = report.summarise(experiment, results), report.timings(experiment.config, results)
    page = report.markdown(summary, times)
    for row in summary["pruned"]:
        assert f"| {row['method']} | {100 * row['mean']:.2f} |" in page
    assert page.count("0 + 0 |") == len(drive.methods.names())


def test_a_collapsed_network_is_reported(digits: Dataset, tmp_path: Path) -> None:
    experiment = Comparison(config(methods=["random"], sparsities=[0.9999]), digits, tmp_path)
    results = run(experiment)
    assert results[1]["empty"] or results[1]["disconnected"]
    page = report.markdown(report.summarise(experiment, results), report.timings(experiment.config, results))
    assert "0 + 0 |" not in page


def test_a_training_method_that_was_interrupted_gives_the_same(digits: Dataset, tmp_path: Path) -> None:
    settings = config(methods=["gradual", "rigl"], sparsities=[0.9], epochs=4)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = numbers(run(Comparison(settings, digits, tmp_path / "a")))
    broken = Comparison(settings, digits, tmp_path / "b")
    calls = 0

    def interrupted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return train(*args, **options)

    train, cell_run.train = cell_run.train, interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    finally:
        cell_run.train = train
    assert numbers(run(Comparison(settings, digits, tmp_path / "b"))) == whole
