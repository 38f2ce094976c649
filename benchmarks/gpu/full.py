"""`make gpu`: builds for the GPU that is here, with the torch that is here, checks and measures.

Each stage gets its limit of seconds, or what the ones before have left: so they come in the order of what
they tell, and the first minutes have the figures that matter most. The results folder gets what they write,
their output in stages.log, and in stages.md how they went. Without a GPU each stage says so, and nothing is
written.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu.stages import (
    Outcome,
    Stage,
    clear,
    device,
    environment,
    go_through,
    report,
    results,
    run,
    script,
    tell,
    tool,
    without_device,
)

WRITTEN = ("stages.log", "stages.md", "prune.csv", "prune.md", "prune.png", "sparse.md", "loop.md")


def stages(out: Path) -> list[Stage]:
    """What the others need; whether the masks are right; the figures that the goals are about; the rest."""
    tests = [
        str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()
    ]
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=-v", "-rs", "-m", "gpu", *tests]

    def measure(name: str, *arguments: str) -> partial[list[str]]:
        def command(seconds: float) -> list[str]:
            # begins no case in its last seconds
            return script(name, "--out", out, "--minutes", f"{max(0, seconds - 15) / 60:.2f}", *arguments)

        return partial(command)

    def sanitize(check: str) -> Stage:
        sanitizer = tool("compute-sanitizer")
        # without the caching allocator every tensor is an allocation of its own, with ends to be watched
        watch = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", str(sanitizer), f"--tool={check}"]
        ours = [
            "--error-exitcode=9",
            "--kernel-name=kernel_substring=drive",
        ]  # all of ours, none of PyTorch's
        command = [*watch, *ours, *script("step.parity", "compiled")]
        return Stage(check, 45, lambda _: command, "" if sanitizer else "no compute-sanitizer")

    return [
        Stage("build", 140, lambda _: script("build")),
        Stage("kernels", 60, lambda _: script("kernels")),
        Stage("parity", 40, lambda _: script("step.parity", "compiled", "triton")),
        Stage("telling", 90, measure("step.measure", "--telling")),
        Stage("exactness", 135, lambda _: [*pytest, "-k", "parity and not triton"]),
        Stage("tests", 60, lambda _: [*pytest, "-k", "not parity and not triton"]),
        Stage("counters", 45, lambda _: script("step.ncu"), "" if tool("ncu") else "no ncu", told=True),
        *map(sanitize, ("memcheck", "racecheck")),
        Stage("triton", 90, lambda _: [*pytest, "-k", "triton"]),
        *map(sanitize, ("synccheck", "initcheck")),
        Stage("loop", 60, lambda _: script("loop", "--out", out)),
        Stage("sparse", 60, measure("sparse")),
        Stage("info", 30, lambda _: [sys.executable, "-m", "drive", "info"]),
        Stage("benchmark", 600, measure("step.measure")),
    ]


def benchmark_tables(path: Path) -> str:
    """The tables of prune.md without what explains them."""
    lines = path.read_text().splitlines() if path.exists() else []
    return "\n".join(line for line in lines if line.startswith(("| ", "- ")) or not line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: docs/results/<GPU>")
    parser.add_argument("--minutes", type=float, default=9, help="for all stages")
    options = parser.parse_args()
    found = device("gpu")
    if "name" not in found:
        return without_device(stages(Path()))
    out = (options.out or results(found)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in WRITTEN:
        (out / old).unlink(missing_ok=True)
    clear()
    print(f"{found['name']}, torch {found['torch']}; results in {out}", flush=True)
    outcomes: list[Outcome] = []
    perform = partial(run, log=out / "stages.log", env=environment(found["arch"]))
    for outcome in go_through(stages(out), 60 * options.minutes, perform):
        outcomes.append(outcome)
        tell(outcome)
        (out / "stages.md").write_text(report(outcomes))
    print(report(outcomes), benchmark_tables(out / "prune.md"), sep="\n")
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
