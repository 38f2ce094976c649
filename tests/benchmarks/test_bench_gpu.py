"""The benchmarks of GPU kernels, as far as they go without a GPU."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from ugly import sample_inputs

from benchmarks import pages
from benchmarks.gpu import full, sparse
from benchmarks.gpu.step import cub_topk, goals, measure, ncu, speed
from benchmarks.gpu.step.providers import (
    COMPILED,
    CUB,
    GRAPH,
    OURS,
    PROVIDERS,
    PYTORCH,
    RIVALS,
    TRITON,
    YARDSTICK,
    Provider,
    kth_by_sort,
)
from benchmarks.gpu.step.report import OUR_COLUMNS, Report, our_cells, shown
from benchmarks.gpu.step.rows import WRONG, Row, by_case
from drive.experiments.bench.workload import Case, Inputs
from drive_kernels.prune.op import reference

TINY = [(40, 30), (7,), (16, 8, 3, 3)]
CASE = Case("1M", torch.float32, 0.9, old_masks=False)
HARD = Case("1M", torch.float32, 0.9, old_masks=False, scores="equal")


def measured(case: Case, **options: object) -> dict[str, Row]:
    inputs, job = Inputs(TINY, case.dtype, scores=case.scores), measure.Job(case)
    rows = measure.measure(inputs, job, measure.CpuMeter(), **{"rounds": 3, "seconds": 1.0, **options})
    return {row.provider: row for row in rows}


def test_plan():
    jobs = measure.plan(list(measure.SIZES))
    assert len(set(jobs)) == len(jobs)
    assert all(job.case.size == "11M" for job in measure.plan(["11M"]))
    huge = [job for job in jobs if job.case.size == "4B"]
    rivals = [job for job in huge if job.providers == RIVALS]
    assert jobs[-len(rivals) :] == rivals, "what may lose the device comes last"
    assert {job.case for job in huge if job.providers == OURS} == {job.case for job in rivals}
    assert all(job.providers == PROVIDERS for job in jobs if job not in huge)


def test_the_telling_cases_decide_every_goal():
    """So many they are, and each of them is needed for some goal."""

    def verdicts(jobs: list[measure.Job]) -> list[str]:
        rows = [
            Row(job.case, provider.name, 1, 1, runs=1, seconds=1.0, checked="equal")
            for job in jobs
            for provider in job.providers
        ]
        return [line[-1] for line in goals.lines(by_case(rows))]

    telling = measure.plan(list(measure.SIZES))[:8]
    assert tuple(job.case for job in telling) == measure.TELLING
    assert "not measured" not in verdicts(telling)
    assert {job.case.scores for job in telling} == {"normal", "equal", "one bucket"}
    for size in ("138M", "1B", "11M"):
        assert "not measured" in verdicts([job for job in telling if job.case.size != size])


@pytest.mark.parametrize(
    ("seconds", "verdicts"),
    (
        (
            {YARDSTICK: 1.0, COMPILED: 1.5, "sort": 20.0, "topk": 15.1},
            {"1B, float32: ours / torch.mul": "met"},
        ),
        ({YARDSTICK: 1.0, COMPILED: 1.7}, {"1B, float32: ours / torch.mul": "MISSED"}),
        ({COMPILED: 1.5, "sort": 20.0, "topk": 15.1}, {"1B, float32: best of PyTorch / ours": "met"}),
        ({COMPILED: 1.5, "sort": 20.0, "topk": 14.9}, {"1B, float32: best of PyTorch / ours": "MISSED"}),
    ),
)
def test_goals(seconds: dict[str, float], verdicts: dict[str, str]):
    case = Case("1B", torch.float32, 0.9, old_masks=False)
    rows = [Row(case, name, 1, 1, runs=1, seconds=s, checked="x") for name, s in seconds.items()]
    found = {line[0]: line[-1] for line in goals.lines(by_case(rows))}
    assert verdicts.items() <= found.items()
    assert found["11M, float32: ours / torch.mul"] == "not measured"
    wrong = [replace(row, checked="", note=WRONG) for row in rows]
    assert goals.lines(by_case(wrong))[0][-1] == "MISSED"


def test_sizes():
    entries = {name: sum(map(torch.Size.numel, map(torch.Size, s))) for name, s in measure.SIZES.items()}
    for name, expected in {"1M": 1e6, "11M": 11e6, "138M": 138e6, "1B": 1e9, "4B": 4e9}.items():
        assert abs(entries[name] / expected - 1) < 0.05
    assert torch.Size(measure.SIZES["4B"][0]).numel() > 2**31


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
        reference(*ours.args(), kth_largest=kth_by_sort)
        reference(*theirs.args())
        assert all(map(torch.equal, ours.masks, theirs.masks))


def failing(error: Exception) -> Provider:
    def prepare(inputs: Inputs, case: Case) -> measure.Step:
        raise error

    return Provider("topk", prepare)


@pytest.mark.parametrize(
    ("error", "expected"),
    (
        (torch.OutOfMemoryError("no"), "OOM"),
        (RuntimeError("too long\nat x"), "-"),
        (ImportError("no nvcc"), "-"),
    ),
)
def test_a_failing_rival_takes_no_one_down(monkeypatch, error: Exception, expected: str):
    inputs, job = Inputs(TINY, CASE.dtype), measure.Job(CASE, (failing(error), *PROVIDERS))
    rows = measure.measure(inputs, job, measure.CpuMeter(), rounds=1, seconds=1.0)
    assert shown(rows[0]) == expected and rows[0].runs == 0
    assert "\n" not in rows[0].note
    assert all(row.runs for row in rows[1:] if row.provider not in (GRAPH, TRITON, CUB))


@pytest.mark.parametrize("ours", (False, True))
def test_a_lost_device_leaves_what_was_measured(monkeypatch, tmp_path: Path, ours: bool):
    """A rival ends the run, which is no failure; one of ours is one."""
    broken = failing(RuntimeError("an illegal memory access"))
    jobs = [measure.Job(CASE), measure.Job(replace(CASE, old_masks=True), (broken,))]
    monkeypatch.setitem(measure.SIZES, "1M", TINY)
    monkeypatch.setattr(measure, "plan", lambda sizes: jobs)
    monkeypatch.setattr(measure, "OURS", (*OURS, broken) if ours else OURS)
    lost = mock.Mock(side_effect=RuntimeError("an illegal memory access"))
    monkeypatch.setattr(measure, "synchronize", lambda inputs: lost() if inputs.old is not None else None)
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) if ours else nullcontext():
        measure.main()
    written = (tmp_path / "prune.md").read_text()
    assert "1M, float32, 90 %, old masks: topk lost the device: an illegal memory access" in written
    assert written.count("| 1M, float32, 90 % |") == 2


def test_slow_providers_run_less_often():
    assert measured(CASE, rounds=5, seconds=1e-9)["sort"].runs == 1


def test_wrong_masks_are_not_timed(monkeypatch):
    def wrong(weights, grads, mask_grads, masks, fresh, prune, min_keep):
        return reference(weights, grads, mask_grads, masks, fresh, prune + 1, min_keep)

    monkeypatch.setattr(measure, "implementation", lambda name, device: wrong)
    row = measured(CASE)[COMPILED]
    assert shown(row) == WRONG and row.runs == 0


@pytest.mark.parametrize(("entries", "calls"), ((2**31, 1), (2000, 0)))
def test_checked_by_the_definition_where_the_reference_fails(monkeypatch, entries: int, calls: int):
    """For lack of memory; with too many entries it is not even asked, as it might lose the device."""
    fails = mock.Mock(side_effect=torch.OutOfMemoryError("no"))
    monkeypatch.setattr("drive.experiments.bench.workload.reference", fails)
    monkeypatch.setattr(measure, "INDEXED", entries)
    assert measured(CASE)[COMPILED].checked == "by the definition" and fails.call_count == calls


def test_files(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setitem(measure.SIZES, "1M", TINY)
    arguments = ["x", "--device", "cpu", "--sizes", "1M", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    measure.main()
    with (tmp_path / "prune.csv").open() as file:
        rows = list(csv.DictReader(file))
    jobs = measure.plan(["1M"])
    assert len(rows) == len(jobs) * len(PROVIDERS)
    assert float(rows[0]["ratio_to_mul"]) == 1 and rows[0]["date"] and float(rows[1]["host_us"]) > 0
    assert (tmp_path / "prune.png").read_bytes().startswith(b"\x89PNG")
    tables = full.benchmark_tables(tmp_path / "prune.md")
    assert tables.count("| 1M, float32, 90 %, old masks |") == 2
    assert all(f"| {name}, ms" in tables for name in (*PYTORCH, CUB, "CUDA", "Triton"))
    assert tables.strip() in capsys.readouterr().out

    # what is there is not measured again, but of another commit everything is
    table = (tmp_path / "prune.md").read_text()
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "0"])
    measure.main()
    assert (tmp_path / "prune.md").read_text() == table
    report = Report(tmp_path, pages.facts("cpu"), 2, 0.6)
    assert [row.case for row in report.rows] == [job.case for job in jobs for _ in PROVIDERS]
    assert all(report.has(job.case, job.providers) for job in jobs)
    for row, line in zip(report.rows, rows, strict=True):
        assert (row.provider, str(row.runs), row.note) == (line["provider"], line["runs"], line["note"])
        assert not row.runs or row.seconds * 1e3 == pytest.approx(float(line["median_ms"]))
    monkeypatch.setenv("COMMIT", "another")
    measure.main()
    assert (tmp_path / "prune.md").read_text().count("no time was left") == len(jobs)


def test_hard_scores_are_compared_with_normal_ones():
    cases = {case: measured(case) for case in (CASE, HARD)}
    ratio = our_cells(cases[HARD], cases)[OUR_COLUMNS.index("ours / normal scores")]
    expected = cases[HARD][COMPILED].seconds / cases[CASE][COMPILED].seconds
    assert float(ratio) == pytest.approx(expected, abs=0.01)
    assert cases[CASE][YARDSTICK].gigabytes == 2359 * 12 / 1e9


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cub_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = cub_topk.build(tmp_path, "sm_90")
    assert built.exists()
    runs = mock.Mock(wraps=subprocess.run)
    monkeypatch.setattr(subprocess, "run", runs)
    assert cub_topk.build(tmp_path, "sm_90") == built
    for _ in range(2):  # of which the second does not ask the compiler
        with pytest.raises(ImportError, match="does not compile: nvcc"):
            cub_topk.build(tmp_path, "sm_1")
    assert sum("-shared" in call.args[0] for call in runs.call_args_list) == 1


def test_smoke_prints_as_it_goes(monkeypatch, capsys):
    for size in ("1M", "11M"):
        monkeypatch.setitem(measure.SIZES, size, TINY)
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--sizes", "1M", "11M", "--rounds", "1"])
    speed.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "equal to the reference" in line] == [
        f"| {size}, {dtype}, 90 %" for size in ("11M", "1M") for dtype in ("float32", "bfloat16")
    ]
    assert any(line.startswith("| 11M, float32: ours / torch.mul | <= 2.5 |") for line in lines)
    default = {job.case.size for job in speed.jobs(["138M", "1B"])}
    assert default == {"138M", "1B"} and len(speed.jobs(["138M", "1B"])) == 4


COUNTERS = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","CC",{names}
"","","","",{units}
"0","7","survey","9.0",{values}
"1","7","apply_list","9.0",{others}
==PROF== Disconnected
"""


def test_counters_become_a_table():
    names = [
        ncu.TIME, ncu.READ, ncu.WRITTEN, *ncu.SHARES.values(),
        *map(ncu.STALL.format, ncu.STALLS[:3]),
    ]  # fmt: skip
    tables = [names, ["x"] * 10, ["400,000", "1.2e9", "4e7", "81.5", "12", "n/a", "56", "7.5", "0", "9"]]
    quoted = [",".join(f'"{cell}"' for cell in cells) for cells in (*tables, tables[-1])]
    output = COUNTERS.format(**dict(zip(("names", "units", "values", "others"), quoted, strict=True)))
    lines = ncu.parse(output)
    assert [line["Kernel Name"] for line in lines] == ["survey", "apply_list"]
    assert ncu.cells(torch.bfloat16, lines[0]) == [
        "bfloat16", "survey", "400.0", "3100", "82", "12", "nan", "56",
        "lg_throttle 9.00, long_scoreboard 7.50, short_scoreboard 0.00",
    ]  # fmt: skip
    assert ncu.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def test_table_of_sparse_layers():
    case = sparse.Case(16, 0.95, torch.bfloat16)
    fast = sparse.Row(
        case, {"dense": 2e-5, "packed": 1e-5, "blocks": 4e-5}, {"masked": "no such op", "2:4": "50 % only"}
    )
    wrong = sparse.Row(
        case, {"dense": 2e-5, "masked": 3e-5}, {"packed": "WRONG by 1", "blocks": "x", "2:4": "50 % only"}
    )
    table = sparse.report([fast, wrong])
    assert "| rows, sparsity, dtype | dense, ms | packed | blocks | masked | 2:4 |" in table
    assert "| 16, 95%, bfloat16 | 0.02 | 0.01 (2.00) | 0.04 (0.50) | - | - |" in table
    assert "| 16, 95%, bfloat16 | 0.02 | WRONG | - | 0.03 (0.67) | - |" in table
    assert table.count("- 2:4: 50 % only") == 1 and "- masked: no such op" in table


def test_sparse_layers_are_measured(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr("drive.sparse.gpu._reason_against_device", lambda weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    monkeypatch.setattr(sparse, "ROWS", (3,))
    arguments = ["x", "--device", "cpu", "--size", "64", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    sparse.main()
    written = (tmp_path / "sparse.md").read_text()
    assert written.count("\n| 3, ") == 10 and "date" in written and "WRONG" not in written
    assert "| 3, 98%, float32 |" in capsys.readouterr().out

    monkeypatch.setitem(sparse.TOLERANCE, torch.float32, -1.0)
    with pytest.raises(SystemExit, match="wrong outputs in 5 of 10 cases"):
        sparse.main()
