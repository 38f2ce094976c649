"""`drive pipeline`: what it trains, that a kill changes no bit, what its page says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

from drive.experiments.cli.app import main
from drive.experiments.data import sources
from drive.experiments.paper.queue import Outcome
from drive.experiments.pipeline import page
from drive.experiments.pipeline.cell import PipelineCell
from drive.experiments.pipeline.grid import Key, Numbers, PipelineGrid
from drive.experiments.pipeline.rows import ALL, ROWS, MaskOptions, Stages
from drive.experiments.pipeline.stages import stable_rank
from drive.experiments.pipeline.trainer import PipelineRun
from drive.experiments.runs.inputs import InputError
from drive.experiments.training import loop
from drive.experiments.training.compute import Compute
from drive.experiments.training.recipe import Recipe

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="pages come with figures")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["pipeline", "--scale", "0.1", "--seeds", "1", "--sparsities", "0.9", "--limit-train", "256"]


def test_names_of_stages():
    assert [stages.name for stages in ALL][:3] == ["none", "skips", "smooth"] and len(set(ALL)) == 16
    assert Stages.named("init+mask") == Stages(init=True, mask=True) and Stages.named("all") == ALL[-1]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TINY, "--baselines", "snip,rigl", "--skips", "off", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "pipeline.md").read_text()
    assert "11 of 11 cells are finished, 0 failed" in printed
    for label in ("none", "mask", "init+mask", "init+mask+smooth", "snip", "rigl"):
        assert f"| {label} |" in text
    assert text.count("| multiply-adds left in % |") == 2 and text.count(" | 10.0 |") == 10  # an MLP's layers
    assert "SNIP, GraSP and SynFlow score in eval mode" in text and "*The learned mask matters most*" in text
    for figure in ("pipeline-digits-mlp-accuracy.png", "pipeline-digits-mlp-layers.png"):
        assert f"({figure})" in text and (tmp_path / figure).stat().st_size > 1000
    results = json.loads((tmp_path / "pipeline.json").read_text())
    stages = [r for r in results if "correct_pruned" in r]
    assert len(stages) == 8 and all(sum(r["kept"].values()) == 5020 for r in stages)
    before = next((tmp_path / "cells").glob("*mask-before*"))
    header, *rows = (before / "layers.csv").read_text().splitlines()
    assert header == "epoch,layer,density,penalty,rank" and len(rows) == 2 * 3
    assert main(command) == 0, "nothing is trained again"
    assert (tmp_path / "pipeline.md").read_text() == text


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    switches = ["--init", "off", "--smooth", "off", "--skips", "off", "--mask", "on", "--baselines", "rigl"]
    assert main([*TINY, *switches, "--tensorboard", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "cells").glob("*mask-before*/tensorboard")
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert {"density/1.weight", "penalty/1.weight", "rank/5.weight", "loss"} <= set(tags)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stages", ("all", "mask"))
@pytest.mark.parametrize("steps", (5, 13, 21, 29))  # 8 an epoch, 2 epochs before pruning and 2 after
def test_killed_anywhere_and_run_again(
    stages: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sources.load("digits").limited(256)
    cell = PipelineCell(
        "digits", "mlp", Stages.named(stages), MaskOptions("sample"), 0.95, 0, Recipe(2, 0.05, 32), Compute()
    )
    monkeypatch.setattr("drive.experiments.paper.work.SAVE_EVERY", 0.0)

    def run(folder: str) -> PipelineRun:
        return PipelineRun(cell, tmp_path / folder, data, Progress(disable=True), keep_network=True)

    whole = run("whole").run()
    left, real = iter(range(steps)), loop._one_epoch

    def dying(*arguments: object) -> float:
        *others, on_step = arguments

        def step() -> None:
            if next(left, None) is None:
                raise Killed
            on_step()  # type: ignore[operator]

        return real(*others, step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_one_epoch", dying)
        with pytest.raises(Killed):
            run("killed").run()
    again = run("killed").run()
    timeless = {name for name in whole if "seconds" not in name}
    assert {name: again[name] for name in timeless} == {name: whole[name] for name in timeless}
    states = [torch.load(tmp_path / f / cell.name / "checkpoint.pt")["model"] for f in ("whole", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_ends_is_an_ordinary_network(tmp_path: Path) -> None:
    data = sources.load("digits").limited(128)
    cell = PipelineCell(
        "digits", "small_cnn", Stages.named("all"), MaskOptions(), 0.9, 0, Recipe(2, 0.05, 32), Compute()
    )
    work = PipelineRun(cell, tmp_path, data, Progress(disable=True), keep_network=True)
    work.run()
    saved = torch.load(work.folder / "checkpoint.pt")["model"]
    fresh = work.network.build()
    assert list(saved) == list(fresh.state_dict())
    fresh.load_state_dict(saved)


def numbers(accuracies: dict[str, float], row: str = "digits-mlp") -> Numbers:
    """Of one seed at 1 % kept, as if trained."""
    grid = PipelineGrid([ROWS[row]], 1, MaskOptions(), "," in "".join(accuracies), Compute())
    results = {}
    for label, accuracy in accuracies.items():
        (cell,) = grid.groups[Key(row, label, 0.01)]
        made = {"torch": "2", "cpu": "x"}
        results[cell] = {
            "seed": 0,
            "correct": accuracy * 10,
            "correct_pruned": 0,
            "tested": 1000,
            "made_with": made,
        }
    return Numbers(grid, Outcome(results))


@pytest.mark.parametrize(
    ("accuracies", "words"),
    (
        ({"none": 50, "mask": 80, "init": 60}, "matters most*: reproduced"),
        ({"none": 50, "mask": 60, "init": 80}, "matters most*: contradicted"),
        ({"none": 50, "mask": 60, "init": 60}, "matters most*: neither way"),
        (
            {"none": 50, "mask": 80, "init": 60, "init+mask": 30},
            "60.0 %: reproduced (the mask 80.0, with ZerO 30.0)",
        ),
        (
            {"none": 50, "mask": 80, "init": 60, "init+mask": 79},
            "60.0 %: contradicted (the mask 80.0, with ZerO 79.0)",
        ),
    ),
)
def test_findings(accuracies: dict[str, float], words: str) -> None:
    assert words in "\n".join(page.findings(numbers(accuracies)))


def test_which_wins() -> None:
    found = page.findings(numbers({"none": 50, "mask": 80, "drive": 90, "rigl": 60}))
    words = "*Which wins*, mlp on digits at 1 % kept: drive 90.0, the pipeline (mask) 80.0, rigl 60.0."
    assert any(words in line for line in found)


def test_findings_by_ways_to_learn_the_mask() -> None:
    way = "sample, through theta m"
    found = page.findings(numbers({"none": 50, "init": 60, way: 80, f"ZerO, {way}": 20}))
    assert any(f"reproduced ({way} 80.0, with ZerO 20.0)" in line for line in found)


def test_stable_rank() -> None:
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(1.5)
    assert stable_rank(torch.outer(torch.ones(4), torch.arange(6.0)).view(4, 2, 3)) == pytest.approx(1)
    assert stable_rank(torch.zeros(3, 3)) == 0


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()


def write_mnist(folder: Path, write: Callable[[Path, bytes], object]) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for part, some in (("train", images[:4]), ("t10k", images[4:])):
        write(folder / f"{part}-images-idx3-ubyte", idx(some))
        write(folder / f"{part}-labels-idx1-ubyte", idx(np.arange(len(some), dtype=np.uint8)))
    return images


@pytest.mark.parametrize("zipped", (False, True))
@pytest.mark.parametrize("below", ("", "raw", "MNIST/raw"))
def test_mnist_in_its_own_files(tmp_path: Path, zipped: bool, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)

    def write(path: Path, data: bytes) -> None:
        path.with_name(path.name + ".gz" * zipped).write_bytes(gzip.compress(data) if zipped else data)

    images = write_mnist(folder, write)
    data = sources.load("mnist", str(tmp_path))
    assert torch.equal(data.train_x[:, 0], torch.from_numpy(images[:4])) and data.train_x.shape[1] == 1
    assert torch.equal(data.test_y, torch.tensor([0, 1])) and data.classes == 4


def test_mnist_that_is_cut_off_or_not_whole(tmp_path: Path) -> None:
    write_mnist(tmp_path, Path.write_bytes)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte, which is none or cut off"):
        sources.load("mnist", str(tmp_path))
    path.unlink()
    with pytest.raises(InputError, match=r"must hold t10k-images-idx3-ubyte \(or t10k"):
        sources.load("mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ("--rows vgg", "--rows"),
        ("--init maybe", "--init"),
        ("--rows mnist-mlp --out runs", "--data-dir must be given with --data mnist"),
    ),
)
def test_bad_options(
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("drive pipeline: ") and message in line
