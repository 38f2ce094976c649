"""Where the kernels of one step spend their time, by the GPU's counters: a table, from Nsight Compute.

python -m benchmarks.gpu.step.ncu

A first step of 138 M entries to 90 %, in float32 and in bfloat16. ncu runs each kernel of ours several times,
on the same inputs; clocks are left as they are.
"""

from __future__ import annotations

import csv
import subprocess
import sys

import torch

from benchmarks import pages
from benchmarks.gpu.stages import script, tool
from benchmarks.gpu.step.measure import SIZES
from benchmarks.gpu.step.rows import NAN, name_of
from drive.experiments.bench.workload import Case, Inputs, implementation

KERNELS = "regex:drive.*(survey|apply)"  # of mangled names, so that no other library's match
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"  # warps that wait so, an issue
STALLS = (
    "long_scoreboard", "short_scoreboard", "lg_throttle", "mio_throttle", "math_pipe_throttle", "barrier",
    "membar", "wait", "branch_resolving", "no_instruction",
)  # fmt: skip
TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
SHARES = {
    "DRAM, %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue, %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy, %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
COLUMNS = ["dtype", "kernel", "us", "GB/s", *SHARES, "most stalled by (warps an issue)"]


def step(dtype: torch.dtype) -> None:
    """What is profiled."""
    case = Case("138M", dtype, 0.9, old_masks=False)
    inputs = Inputs(SIZES[case.size], dtype, "cuda")
    inputs.run(implementation("compiled"), case)
    torch.cuda.synchronize()


def command(dtype: torch.dtype) -> list[str]:
    metrics = [TIME, READ, WRITTEN, *SHARES.values(), *map(STALL.format, STALLS)]
    return [
        str(tool("ncu")), "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--kernel-name-base", "mangled", "--kernel-name", KERNELS, "--metrics", ",".join(metrics),
        *script("step.ncu", name_of(dtype)),
    ]  # fmt: skip


def parse(output: str) -> list[dict[str, str]]:
    """ncu's table, a line per launch, out of all that it and the program print; without the line of units."""
    return list(csv.DictReader(line for line in output.splitlines() if line.startswith('"')))[1:]


def cells(dtype: torch.dtype, line: dict[str, str]) -> list[str]:
    def value(name: str) -> float:
        text = line.get(name, "").replace(",", "")
        return NAN if text in ("", "n/a") else float(text)  # not all GPUs count everything

    seconds = value(TIME) * 1e-9
    stalls = sorted(((value(STALL.format(name)), name) for name in STALLS), reverse=True)[:3]
    return [
        name_of(dtype),
        line["Kernel Name"],
        f"{seconds * 1e6:.1f}",
        f"{(value(READ) + value(WRITTEN)) / seconds / 1e9:.0f}",
        *(f"{value(name):.0f}" for name in SHARES.values()),
        ", ".join(f"{name} {warps:.2f}" for warps, name in stalls),
    ]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    if sys.argv[1:]:
        step(getattr(torch, sys.argv[1]))
        return
    print(", ".join(f"{k} {v}" for k, v in pages.facts("cuda").items()), end="\n\n")
    print(pages.markdown(COLUMNS, []), flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        run = subprocess.run(
            command(dtype), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        lines = parse(run.stdout)
        if run.returncode or not lines:
            raise SystemExit(f"{run.stdout}\nncu: no kernel was profiled")
        for line in lines:
            print(f"| {' | '.join(cells(dtype, line))} |", flush=True)


if __name__ == "__main__":
    main()
