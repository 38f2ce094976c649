"""One pruning step on CPU against its rivals.

pytest benchmarks/ --benchmark-only                        quick: 11 M entries, one case
python benchmarks/bench_prune.py --out docs/results/cpu.md the whole table, some 25 minutes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from drive import bench

CASE = bench.Case("11M", torch.float32, 0.9, old_masks=False)


@pytest.fixture(scope="module")
def inputs() -> bench.Inputs:
    made = bench.Inputs(bench.SIZES[CASE.size], CASE.dtype)
    bench.validate(made, CASE)
    return made


@pytest.mark.parametrize("provider", bench.PROVIDERS)
def test_prune_step(benchmark, inputs: bench.Inputs, provider: str):
    def setup():
        inputs.fresh()
        return (bench.PROVIDERS[provider](inputs, CASE),), {}

    benchmark.extra_info["entries"] = inputs.entries
    benchmark.pedantic(lambda step: step(), setup=setup, rounds=10 if provider in bench.QUICK else 3)


HEADER = """# One pruning step on CPU

{machine}

`fused_drive_prune` against `drive.reference` (cat, then topk or kthvalue) and
`torch.nn.utils.prune.global_unstructured` with importance scores, on the shapes of ResNet-18 (11 M), VGG-16
(138 M) and two VGG-16 with a ResNet-18 (300 M). Masks and weights were equal to the reference's, bit for
bit, in every case before it was timed. Medians of interleaved runs in one process: {rounds} of ours and of the
yardstick; of the rivals 3 at 11 M, 2 at 138 M, 1 at 300 M. New masks are allocated within the time. "Old masks": the step finds masks of half the
sparsity. The yardstick is `torch.mul(a, b, out=c)` of the same number of entries and the same dtype. GB/s
counts the least traffic of two passes (float32: 21 bytes an entry, 23 with old masks). Extra memory: peak
resident memory beyond the inputs, in bytes an entry (with old masks, those are inputs).

"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the pruning step and write a Markdown table.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=bench.SIZES, default=list(bench.SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    header = HEADER.format(machine=bench.machine(), rounds=options.rounds)
    rows: list[bench.Row] = []
    cases = [options.sizes, [torch.float32, torch.bfloat16], [0.5, 0.9, 0.993]]
    for row in bench.run(*cases, options.rounds):
        rows.append(row)
        print(bench.table([row]).splitlines()[-1], flush=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(header + bench.table(rows) + "\n")
        partial.replace(options.out)


if __name__ == "__main__":
    main()
