"""One pruning step on CPU against its rivals, at all sizes: a table, in some 25 minutes.

python -m benchmarks.cpu.prune --out docs/results/cpu.md
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import torch

from benchmarks import ROOT
from drive.experiments.bench import step as bench
from drive.files import write_atomic

HEADER = """# One pruning step on CPU

{machine}, commit {commit}

`fused_drive_prune` against `drive.reference` (cat, then topk or kthvalue) and
`torch.nn.utils.prune.global_unstructured` with importance scores, on the shapes of ResNet-18 (11 M),
VGG-16 (138 M) and two VGG-16 with a ResNet-18 and a Linear (300 M). Masks and weights were equal to the
reference's, bit for bit, in every case before it was timed. Medians of interleaved runs in one process:
{rounds} of ours and of the yardstick; of the rivals 3 at 11 M, 1 above. 300 M at 90 % only. Weights are
written anew before every call. "First": new masks are made within the time, in memory that earlier ones
have left (the first call of a process pays for its pages). "First, again": they take the place of the last
call's, which are freed within the time, as in a loop. "Old masks": the step finds masks of half the
sparsity. The yardstick is `torch.mul(a, b, out=c)` of the same number of entries and the same dtype; "by CPU
time" is that ratio in seconds of all CPUs, which neighbours on the host disturb less. GB/s counts the least
traffic of two passes (float32: 17 bytes an entry, 18 with old masks). Extra memory: peak resident memory
beyond the inputs, in bytes an entry, in a process that has kept none (with old masks, those are inputs; at
11 M, megabytes of the process's own make some tenths of a byte an entry).

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=bench.SIZES, default=list(bench.SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    header = HEADER.format(machine=bench.machine(), commit=commit, rounds=options.rounds)
    rows: list[bench.Row] = []
    cases = [
        case
        for case in bench.cases(options.sizes, [torch.float32, torch.bfloat16], [0.5, 0.9, 0.993])
        if case.size != "300M" or case.sparsity == 0.9  # two minutes each
    ]
    for row in bench.run(cases, options.rounds):
        rows.append(row)
        print(*bench.cells(row), sep=" | ", flush=True)
        write_atomic(options.out, f"{header}{bench.markdown(rows)}\n".encode())


if __name__ == "__main__":
    main()
