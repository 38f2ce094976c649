"""`make gpu-table1`: rows of Table 1 on the GPU that is here, a few minutes a call.

Builds the package as `make gpu` does, then goes on with the cells that the last call left. On a machine that
starts bare each time, `--last` names the folder that came back from the call before. Of that,
`cells.tar.gz` suffices: all finished cells, some hundred kilobytes. With the checkpoint of the cell in hand,
`cells/*/training.pt`, that one goes on where it was, too. Needs no network: `--data` names CIFAR-10's
archive.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import time
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu.build import LIBRARY
from benchmarks.gpu.full import stages
from benchmarks.gpu.stages import Stage, device, environment, run

OVERTIME = 45  # seconds for the epoch in hand when the budget ends, and for the page
PACKED = "cells.tar.gz"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "cifar10.tar.gz")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-table1", metavar="DIR")
    parser.add_argument("--last", type=Path, metavar="DIR", help="the --out of the call before, if another")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rows", default="cifar10-alexnet")
    parser.add_argument("--methods", default="snip,synflow,drive")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    found = device("gpu-table1")
    if "name" not in found:
        print("table1.py: no CUDA device")
        return 0
    if not options.data.exists():
        raise SystemExit(f"table1.py: --data must be CIFAR-10's archive or folder, got {options.data}")
    if options.last and not options.last.is_dir():
        raise SystemExit(f"table1.py: --last must be the folder of the call before, got {options.last}")
    out, data = options.out.resolve(), options.data.resolve()
    if options.last and options.last.resolve() != out:
        take_over(options.last, out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{found['name']}, torch {found['torch']}; results in {out}", flush=True)

    env = environment(found["arch"])
    if not list(LIBRARY.glob("drive_kernels/_C*.so")):
        LIBRARY.mkdir(parents=True, exist_ok=True)
        build = next(stage for stage in stages(out) if stage.name == "build")
        outcome = run(build, build.seconds, out / "stages.log", env)
        print(f"build: {outcome.result}, {outcome.seconds:.0f} s", flush=True)

    def command(seconds: float) -> list[str]:
        return [
            sys.executable, "-m", "drive", "table1", "--rows", options.rows, "--methods", options.methods,
            "--seeds", str(options.seeds), "--device", "cuda", "--precision", options.precision,
            "--data-dir", str(data), "--budget", f"{(seconds - OVERTIME) / 60:.2f}", "--pause",
            "--out", str(out),
        ]  # fmt: skip

    seconds = max(OVERTIME + 1.0, deadline - time.monotonic())
    outcome = run(Stage("table1", seconds, command), seconds, out / "stages.log", env)
    pack(out)
    print(f"table1: {outcome.result}, {outcome.seconds:.0f} s", *outcome.output, sep="\n")
    return int(outcome.bad)


def pack(out: Path) -> None:
    """All that a later call must know of the cells, checkpoints left out, in one file."""
    files = [path for path in sorted(out.glob("cells/**/*")) if path.suffix in (".json", ".csv", ".txt")]
    partial = out / f".{PACKED}.partial"
    with tarfile.open(partial, "w:gz") as archive:
        for path in files:
            archive.add(path, path.relative_to(out))
    partial.replace(out / PACKED)


def take_over(last: Path, out: Path) -> None:
    """Begin with what the last call left."""
    shutil.copytree(last, out, dirs_exist_ok=True)
    if (out / PACKED).exists():
        with tarfile.open(out / PACKED) as archive:
            archive.extractall(out, filter="data")


if __name__ == "__main__":
    sys.exit(main())
