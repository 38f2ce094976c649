"""`drive table1` and its like: what they refuse, and what is left where a cell fails or all is killed."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import environment

from drive.experiments.cli.app import main
from drive.experiments.paper.grids import Grid
from drive.experiments.paper.pages import PAGES, Page
from drive.experiments.paper.queue import IMAGES
from drive.experiments.paper.trainer import CellRun
from drive.experiments.runs.stored import write_stamped
from drive.experiments.training.compute import Compute

pytest.importorskip("matplotlib", reason="tables come with figures")

pytestmark = pytest.mark.usefixtures("one_thread")
# 4 epochs, of which 1 warms up, on 20 images; IMP in 1 level
TINY = ["--rows", "cifar10-mlp", "--scale", "0.07", "--seeds", "1", "--sparsities", "0.9"]
TINY += ["--methods", "imp,snip,drive"]


def test_killed_and_run_again_from_the_command_line(images: Path, tmp_path: Path) -> None:
    commands = [
        ["table1", *TINY, "--data-dir", str(images), "--out", str(tmp_path / name)]
        for name in ("killed", "whole")
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "drive", *commands[0]],
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob("killed/cells/*/result.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [main(command) for command in commands] == [0, 0]
    pages = [(tmp_path / folder / "table1.md").read_text() for folder in ("killed", "whole")]
    # without the seconds, each row's last cell, and their ratio
    shown = [[line.rpartition("|")[0].rpartition("|")[0] for line in page.splitlines()] for page in pages]
    assert shown[0] == shown[1] and "| drive | " in "\n".join(shown[0])


def failing(method: str) -> Callable[[CellRun], dict[str, object]]:
    real = CellRun.run

    def run(self: CellRun) -> dict[str, object]:
        if self.cell.variant.method == method:
            raise RuntimeError("CUDA out of memory\nand much more")
        return real(self)

    return run


def test_a_cell_that_fails_stops_no_other(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["table1", *TINY, "--data-dir", str(images), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(CellRun, "run", failing("snip"))
        assert main(command) == 1
    page = (tmp_path / "table1.md").read_text()
    assert "| snip | failed | - |" in page and "| drive | -" not in page
    assert "- mlp on cifar10, snip to 90 %, seed 0: CUDA out of memory\n" in page
    assert "4 of 4 cells" not in capsys.readouterr().out
    (note,) = tmp_path.glob("cells/*snip*/failure.txt")
    assert "Traceback" in note.read_text()

    monkeypatch.setattr(CellRun, "run", failing("drive"))  # which is finished, and not run again
    assert main(command) == 0
    assert "failed" not in (tmp_path / "table1.md").read_text()
    assert "4 of 4 cells are finished, 0 failed" in capsys.readouterr().out
    assert not note.exists()


def test_bad_data_are_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["table2", "--data-dir", str(tmp_path / "nothing"), "--out", str(tmp_path)]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(
        "drive table2: --data-dir must be a folder with train/<class>/*"
    )


def test_other_images_cannot_join(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table1", *TINY, "--data-dir", str(images), "--out", str(tmp_path), "--budget", "1e-9"]) == 0
    (tmp_path / "cells").mkdir(exist_ok=True)
    write_stamped(tmp_path / "cells/cifar10.json", IMAGES, {"fingerprint": "another"})
    assert main(["table1", *TINY, "--data-dir", str(images), "--out", str(tmp_path)]) == 2
    assert "--data must be what" in capsys.readouterr().err


def test_figures_take_the_cells_that_tables_made(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, "--data-dir", str(images), "--out", str(tmp_path)]
    assert main(["table1", *options]) == 0
    monkeypatch.setattr(CellRun, "run", lambda self: pytest.fail("trained again"))
    for page in ("figure5", "figure6"):
        assert main([page, *options]) == 0
        assert (tmp_path / f"{page}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({page}.png)" in (tmp_path / f"{page}.md").read_text()
        assert all(result["scale"] == 0.07 for result in json.loads((tmp_path / f"{page}.json").read_text()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scale 0", "--scale must be in (0, 1], got '0'"),
        ("--scale 1.5", "--scale must be in (0, 1], got '1.5'"),
        ("--scale 0.01 --rows cifar10-mlp", "--scale must leave epochs after the dense warm-up, got 0.01"),
        ("--budget 0", "--budget must be a finite number > 0, got '0'"),
        ("--rows lenet", "--rows must be distinct names out of cifar10-alexnet, "),
        ("--methods rigl", "--methods must be distinct names out of drive, "),
        ("--precision float16", "--precision must be one of float32, bfloat16, got 'float16'"),
        ("--momentum -1", "--momentum must be a finite number >= 0, got '-1'"),
        ("--seeds 0", "--seeds must be an integer in [1, 10000], got '0'"),
        ("--out /dev/null/run", "--out must be a writable folder, got /dev/null/run (Not a directory)"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    assert main(["table1", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"drive table1: {message}")


def test_flags_change_what_is_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned: list[Grid] = []
    monkeypatch.setattr(Page, "write", lambda self, out, grid, *rest: planned.append(grid) or "")
    options = ["--momentum", "0.8", "--weight-decay", "0", "--padding", "2", "--no-flip", "--budget", "1e-9"]
    options += ["--precision", "bfloat16", "--channels-last", "--compile", "--sparse-ops", "--devices", "2"]
    assert main(["table1", *options, "--out", str(tmp_path)]) == 0
    recipe = planned[0].cells[0].recipe
    assert (recipe.momentum, recipe.weight_decay, recipe.padding, recipe.flip) == (0.8, 0, 2, False)
    assert planned[0].compute == Compute("cpu", "bfloat16", True, True, True, devices=2)
    assert len(planned[0].cells) == 7 * 3 * (1 + 4 * 4) and math.isclose(recipe.lr, 1e-4)


@pytest.mark.parametrize("page", PAGES)
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], page: str) -> None:
    assert main([page, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples" in shown and f"drive {page} " in shown
