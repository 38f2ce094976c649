"""What `make gpu`, `make gpu-smoke` and `make gpu-table1` run, and what they say of it, without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.gpu import full, smoke, stages, table1
from benchmarks.gpu.stages import Outcome, Stage
from drive.experiments.cli.app import main


def outcome(tmp_path: Path, monkeypatch, script: str, seconds: float = 30, told: bool = False) -> Outcome:
    monkeypatch.setattr(stages, "LIBRARY", tmp_path)
    stage = Stage("stage", seconds, lambda _: [sys.executable, "-c", script], told=told)
    return stages.run(stage, seconds, tmp_path / "stages.log", dict(os.environ))


def test_stage_outcomes(tmp_path: Path, monkeypatch, capsys):
    good = outcome(tmp_path, monkeypatch, "print('one'); print('two')")
    assert (good.result, good.output, good.bad) == ("ok", ("one", "two"), False)
    failed = outcome(tmp_path, monkeypatch, "raise SystemExit('broken')")
    assert (failed.result, failed.last, failed.bad) == ("failed", "broken", True)
    late = outcome(
        tmp_path, monkeypatch, "import time; print('begun', flush=True); time.sleep(60)", seconds=1
    )
    assert (late.result, late.last, late.bad) == ("timed out", "begun", True)
    for words in ("Device not supported", "ERR_NVGPUCTRPERM"):
        refused = outcome(tmp_path, monkeypatch, f"raise SystemExit('Error: {words}')")
        assert not refused.bad and refused.result == f"not here: {words}"
    log = (tmp_path / "stages.log").read_text()
    assert log.count("===== stage") == 5 and "two" in log and "begun" in log
    assert "two" not in capsys.readouterr().out
    told = outcome(tmp_path, monkeypatch, "print('| a | b |')\nprint('\\n| c |\\n')", told=True)
    assert "| a | b |\n\n| c |" in capsys.readouterr().out and told.last == "| c |"
    table = stages.report([good, late, told, Outcome("loop", "no script")])
    assert "| stage | timed out | 1 | begun |" in table and "| loop | no script | 0 |  |" in table
    assert "stage:\n\n| a | b |\n\n| c |" in table


@pytest.mark.parametrize(("script", "plan"), (("full", full.stages(Path())), ("smoke", smoke.stages())))
def test_without_a_gpu(tmp_path: Path, script: str, plan: list[Stage]):
    """Every stage says so, nothing is built or written, and it is no failure."""
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.gpu.{script}", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    assert said == [[stage.name, "no CUDA device"] for stage in plan]
    assert not out.exists()


def test_table1_goes_on_from_what_came_back(tmp_path: Path) -> None:
    first, back, second = tmp_path / "first", tmp_path / "back", tmp_path / "second"
    files = {"cells/a/result.json": "{}", "cells/a/log.csv": "epoch", "cells/cifar10.json": "{}"}
    for name, text in {**files, "cells/b/training.pt": "large"}.items():
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_text(text)
    table1.pack(first)
    back.mkdir()
    shutil.copy(first / table1.PACKED, back)  # not all that is in a folder can be carried everywhere
    table1.take_over(back, second)
    found = {str(p.relative_to(second)): p.read_text() for p in second.glob("cells/**/*") if p.is_file()}
    assert found == files


def test_table1_gives_a_command_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "cifar10.tar.gz"
    archive.touch()
    commands: list[list[str]] = []

    def run(stage: Stage, seconds: float, *_: object) -> Outcome:
        commands.append(stage.command(seconds))
        return Outcome(stage.name, "ok")

    monkeypatch.setattr(table1, "run", run)
    monkeypatch.setattr(table1, "LIBRARY", tmp_path / "lib")
    monkeypatch.setattr(table1, "device", lambda _: {"name": "a GPU", "torch": "2", "arch": "9.0"})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["table1.py", "--data", str(archive), "--out", str(out)])
    assert table1.main() == 0
    build, (_, module, name, *options) = commands
    assert build[-1] == "benchmarks.gpu.build" and (module, name) == ("-m", "drive")
    minutes = options.index("--budget") + 1
    assert 6 < float(options[minutes]) < 8
    options[minutes], options[options.index("--device") + 1] = "1e-9", "cpu"
    assert main(options) == 0
    assert "## alexnet on cifar10" in (out / "table1.md").read_text()
    assert (out / table1.PACKED).exists()
