"""`make spills`: registers, spills and shared memory of the Triton kernels, for GPUs that need not be here.

All launches that the tests know are compiled with the Triton that is installed. A row is what the worst
launch of a kernel takes; a spill is a load or a store of a register that there were too few of. The launches
that spill follow.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from itertools import groupby, product

import triton

from benchmarks import ROOT

sys.path.append(str(ROOT / "tests" / "helpers"))
import triton_launches
from ahead_of_time import CAPABILITIES, Code, Launch

HEADER = """| kernel | architecture | Triton | launches | registers | spills | bytes shared |
| --- | --- | --- | ---: | ---: | ---: | ---: |"""

launches = triton_launches.prune() | triton_launches.masked() | triton_launches.linear()
jobs = sorted(product(launches, CAPABILITIES), key=lambda job: (job[0].name, job[1], str(job[0])))


def code(index: int) -> Code:
    """By index: a process that was forked has the launches, which cannot be sent to it."""
    launch, capability = jobs[index]
    return Code.of(launch.compile(capability))


def kernel_of(made: tuple[tuple[Launch, int], Code]) -> tuple[str, int]:
    (launch, capability), _ = made
    return launch.name, capability


def main() -> None:
    spilling = []
    print(HEADER)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        codes = pool.imap(code, range(len(jobs)))
        for (name, capability), same in groupby(zip(jobs, codes, strict=True), key=kernel_of):
            found = list(same)
            most = (max(getattr(c, what) for _, c in found) for what in ("registers", "spills", "shared"))
            cells = (name, f"sm_{capability}", triton.__version__, len(found), *most)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            spilling += [f"sm_{capability} {c.spills:4} {launch}" for (launch, _), c in found if c.spills]
    print("", f"{len(spilling)} of {len(jobs)} spill:", *spilling, sep="\n")


if __name__ == "__main__":
    main()
