"""The GPU benchmark and `make gpu`, as far as they go without a GPU."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ugly import sample_inputs

from drive.cli import main
from drive.workload import Case, Inputs
from drive_kernels.prune import reference

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_prune_gpu as gpu_bench  # noqa: E402
import bench_sparse_gpu  # noqa: E402
import cub_topk  # noqa: E402
import gpu  # noqa: E402
import gpu_providers  # noqa: E402
import gpu_report  # noqa: E402
import gpu_table1  # noqa: E402
from gpu_providers import COMPILED, CUB, GRAPH, PROVIDERS, PYTORCH, TRITON, YARDSTICK, Provider  # noqa: E402

TINY = [(40, 30), (7,), (16, 8, 3, 3)]
CASE = Case("1M", torch.float32, 0.9, old_masks=False)
HARD = Case("1M", torch.float32, 0.9, old_masks=False, scores="equal")


def measured(case: Case, **options: object) -> dict[str, gpu_report.Row]:
    inputs = Inputs(TINY, case.dtype, scores=case.scores)
    rows = gpu_bench.measure(inputs, case, gpu_bench.CpuMeter(), **{"rounds": 3, "seconds": 1.0, **options})
    return {row.provider: row for row in rows}


def test_plan():
    cases = gpu_bench.plan(list(gpu_bench.SIZES))
    assert len(set(cases)) == len(cases)
    first = [(case.size, case.dtype) for case in cases if not case.old_masks][:4]
    assert first == [(size, dtype) for size in ("138M", "1B") for dtype in (torch.float32, torch.bfloat16)]
    assert all(case.size == "11M" for case in gpu_bench.plan(["11M"]))


def test_sizes():
    entries = {name: sum(map(torch.Size.numel, map(torch.Size, s))) for name, s in gpu_bench.SIZES.items()}
    for name, expected in {"1M": 1e6, "11M": 11e6, "138M": 138e6, "1B": 1e9, "4B": 4e9}.items():
        assert abs(entries[name] / expected - 1) < 0.05
    assert torch.Size(gpu_bench.SIZES["4B"][0]).numel() > 2**31


@pytest.mark.parametrize("old_masks", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_provider(dtype: torch.dtype, old_masks: bool):
    rows = measured(Case("1M", dtype, 0.9, old_masks))
    assert list(rows) == [provider.name for provider in PROVIDERS]
    assert {name for name, row in rows.items() if row.note} == {GRAPH, TRITON, CUB}
    assert rows[COMPILED].checked == "equal to the reference"
    assert all(
        row.runs == 3 and row.fastest <= row.seconds <= row.slowest for row in rows.values() if not row.note
    )


def test_kth_by_sort_is_the_references():
    for step in sample_inputs():
        ours, theirs = step.clone(), step.clone()
        reference(*ours.args(), kth_largest=gpu_providers.kth_by_sort)
        reference(*theirs.args())
        assert all(map(torch.equal, ours.masks, theirs.masks))


def failing(error: Exception) -> Provider:
    def prepare(inputs: Inputs, case: Case) -> gpu_bench.Step:
        raise error

    return Provider("topk", prepare)


@pytest.mark.parametrize(
    ("error", "shown"),
    (
        (torch.OutOfMemoryError("no"), "OOM"),
        (RuntimeError("too long\nat x"), "-"),
        (ImportError("no nvcc"), "-"),
    ),
)
def test_a_failing_rival_takes_no_one_down(monkeypatch, error: Exception, shown: str):
    monkeypatch.setattr(gpu_bench, "PROVIDERS", (failing(error), *PROVIDERS))
    inputs = Inputs(TINY, CASE.dtype)
    rows = gpu_bench.measure(inputs, CASE, gpu_bench.CpuMeter(), rounds=1, seconds=1.0)
    assert gpu_report.shown(rows[0]) == shown and rows[0].runs == 0
    assert "\n" not in rows[0].note
    assert all(row.runs for row in rows[1:] if row.provider not in (GRAPH, TRITON, CUB))


def test_slow_providers_run_less_often():
    assert measured(CASE, rounds=5, seconds=1e-9)["sort"].runs == 1


def test_wrong_masks_are_not_timed(monkeypatch):
    def wrong(weights, grads, mask_grads, masks, fresh, prune, min_keep):
        return reference(weights, grads, mask_grads, masks, fresh, prune + 1, min_keep)

    monkeypatch.setattr(gpu_bench, "implementation", lambda name, device: wrong)
    row = measured(CASE)[COMPILED]
    assert gpu_report.shown(row) == gpu_report.WRONG and row.runs == 0


def test_checked_by_the_definition_where_the_reference_fails(monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("drive.workload.reference", fails)
    assert measured(CASE)[COMPILED].checked == "by the definition"


def test_files(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setitem(gpu_bench.SIZES, "1M", TINY)
    arguments = ["x", "--device", "cpu", "--sizes", "1M", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_bench.main()
    with (tmp_path / "prune.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = gpu_bench.plan(["1M"])
    assert len(rows) == len(cases) * len(PROVIDERS)
    assert float(rows[0]["ratio_to_mul"]) == 1 and rows[0]["date"]
    assert (tmp_path / "prune.png").read_bytes().startswith(b"\x89PNG")
    tables = gpu.benchmark_tables(tmp_path / "prune.md")
    assert tables.count("| 1M, float32, 90 %, old masks |") == 2
    assert all(f"| {name}, ms" in tables for name in (*PYTORCH, CUB, "CUDA", "Triton"))
    assert tables.strip() in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "0"])
    gpu_bench.main()
    assert (tmp_path / "prune.md").read_text().count("no time was left") == len(cases)


def test_hard_scores_are_compared_with_normal_ones():
    cases = {case: measured(case) for case in (CASE, HARD)}
    ratio = gpu_report.our_cells(cases[HARD], cases)[gpu_report.OUR_COLUMNS.index("ours / normal scores")]
    expected = cases[HARD][COMPILED].seconds / cases[CASE][COMPILED].seconds
    assert float(ratio) == pytest.approx(expected, abs=0.01)
    assert cases[CASE][YARDSTICK].gigabytes == 2359 * 12 / 1e9


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cub_compiles(tmp_path: Path):
    assert cub_topk.build(tmp_path, "sm_90").exists()


def test_table_of_sparse_layers():
    case = bench_sparse_gpu.Case(16, 0.95, torch.bfloat16)
    fast = bench_sparse_gpu.Row(
        case, {"dense": 2e-5, "packed": 1e-5, "blocks": 4e-5}, {"masked": "no such op", "2:4": "50 % only"}
    )
    wrong = bench_sparse_gpu.Row(
        case, {"dense": 2e-5, "masked": 3e-5}, {"packed": "WRONG by 1", "blocks": "x", "2:4": "50 % only"}
    )
    table = bench_sparse_gpu.report([fast, wrong])
    assert "| rows, sparsity, dtype | dense, ms | packed | blocks | masked | 2:4 |" in table
    assert "| 16, 95%, bfloat16 | 0.02 | 0.01 (2.00) | 0.04 (0.50) | - | - |" in table
    assert "| 16, 95%, bfloat16 | 0.02 | WRONG | - | 0.03 (0.67) | - |" in table
    assert table.count("- 2:4: 50 % only") == 1 and "- masked: no such op" in table


def test_sparse_layers_are_measured(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr("drive.sparse.gpu._reason_against_device", lambda weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    monkeypatch.setattr(bench_sparse_gpu, "ROWS", (3,))
    arguments = ["x", "--device", "cpu", "--size", "64", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_sparse_gpu.main()
    written = (tmp_path / "sparse.md").read_text()
    assert written.count("\n| 3, ") == 10 and "date" in written and "WRONG" not in written
    assert "| 3, 98%, float32 |" in capsys.readouterr().out

    monkeypatch.setitem(bench_sparse_gpu.TOLERANCE, torch.float32, -1.0)
    with pytest.raises(SystemExit, match="wrong outputs in 5 of 10 cases"):
        bench_sparse_gpu.main()


def outcome(tmp_path: Path, monkeypatch, script: str, seconds: float = 30) -> gpu.Outcome:
    monkeypatch.setattr(gpu, "LIBRARY", tmp_path)
    stage = gpu.Stage("stage", seconds, lambda _: [sys.executable, "-c", script])
    return gpu.run(stage, seconds, tmp_path / "stages.log", dict(os.environ))


def test_stage_outcomes(tmp_path: Path, monkeypatch):
    good = outcome(tmp_path, monkeypatch, "print('one'); print('two')")
    assert (good.result, good.output, good.bad) == ("ok", ("one", "two"), False)
    failed = outcome(tmp_path, monkeypatch, "raise SystemExit('broken')")
    assert (failed.result, failed.last, failed.bad) == ("failed", "broken", True)
    late = outcome(
        tmp_path, monkeypatch, "import time; print('begun', flush=True); time.sleep(60)", seconds=1
    )
    assert (late.result, late.last, late.bad) == ("timed out", "begun", True)
    refused = outcome(tmp_path, monkeypatch, "raise SystemExit('Error: Device not supported')")
    assert not refused.bad and refused.result == "not here: Device not supported"
    log = (tmp_path / "stages.log").read_text()
    assert log.count("===== stage") == 4 and "two" in log and "begun" in log
    table = gpu.report([good, late, gpu.Outcome("loop", "no script")])
    assert "| stage | timed out | 1 | begun |" in table and "| loop | no script | 0 |  |" in table


def test_without_a_gpu(tmp_path: Path):
    """Every stage says so, nothing is built or written, and it is no failure."""
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    assert said == [[stage.name, "no CUDA device"] for stage in gpu.stages(out)]
    assert not out.exists()


def test_table1_goes_on_from_what_came_back(tmp_path: Path) -> None:
    first, back, second = tmp_path / "first", tmp_path / "back", tmp_path / "second"
    files = {"cells/a/result.json": "{}", "cells/a/log.csv": "epoch", "cells/cifar10.json": "{}"}
    for name, text in {**files, "cells/b/training.pt": "large"}.items():
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_text(text)
    gpu_table1.pack(first)
    back.mkdir()
    shutil.copy(first / gpu_table1.PACKED, back)  # not all that is in a folder can be carried everywhere
    gpu_table1.take_over(back, second)
    found = {str(p.relative_to(second)): p.read_text() for p in second.glob("cells/**/*") if p.is_file()}
    assert found == files


def test_table1_gives_a_command_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "cifar10.tar.gz"
    archive.touch()
    commands: list[list[str]] = []

    def run(stage: gpu.Stage, seconds: float, *_: object) -> gpu.Outcome:
        commands.append(stage.command(seconds))
        return gpu.Outcome(stage.name, "ok")

    monkeypatch.setattr(gpu_table1, "run", run)
    monkeypatch.setattr(gpu_table1, "LIBRARY", tmp_path / "lib")
    monkeypatch.setattr(gpu_table1, "device", lambda: {"name": "a GPU", "torch": "2", "arch": "9.0"})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu_table1.py", "--data", str(archive), "--out", str(out)])
    assert gpu_table1.main() == 0
    build, (_, module, name, *options) = commands
    assert "build" in build and (module, name) == ("-m", "drive")
    minutes = options.index("--budget") + 1
    assert 6 < float(options[minutes]) < 8
    options[minutes], options[options.index("--device") + 1] = "1e-9", "cpu"
    assert main(options) == 0
    assert "## alexnet on cifar10" in (out / "table1.md").read_text()
    assert (out / gpu_table1.PACKED).exists()
