"""`make gpu-smoke`: in three minutes, whether the kernels of drive::prune_ work on this GPU, and how fast.

Builds what `make gpu` then finds built, without the CPU's sparse layers, compares small steps with the
CPU's, and times four first steps: step/speed.py. All output goes to smoke.md as it comes; at the end that is
the report. Without a GPU each stage says so, and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

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
    without_device,
)

SECONDS = 170  # for all stages; the rest of three minutes is for Python


def stages() -> list[Stage]:
    return [
        Stage("build", 105, lambda _: script("build")),
        Stage("parity", 30, lambda _: script("step.parity", "compiled")),
        Stage("speed", 100, lambda _: script("step.speed"), told=True),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: docs/results/<GPU>")
    options = parser.parse_args()
    found = device("gpu-smoke")
    if "name" not in found:
        return without_device(stages())
    out = (options.out or results(found)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    smoke = out / "smoke.md"
    smoke.unlink(missing_ok=True)
    clear()
    print(f"{found['name']}, torch {found['torch']}; results in {smoke}", flush=True)
    outcomes: list[Outcome] = []
    for outcome in go_through(stages(), SECONDS, partial(run, log=smoke, env=environment(found["arch"]))):
        outcomes.append(outcome)
        tell(outcome)
    smoke.write_text(report(outcomes))
    missed = [outcome for outcome in outcomes if outcome.result != "ok"]
    for outcome in missed:
        print(f"\n{outcome.stage}, the end of its output:", *outcome.output, sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
