"""Sparse inference on a CPU: `drive.sparse.freeze` against torch, ONNX Runtime, OpenVINO and DeepSparse.

python -m benchmarks.cpu.engine.race [NETWORK ...] \\
    --out docs/results/sparse-engine.jsonl --deepsparse ENV/bin/python

A cell is a network at a batch size, with masks of one kind (masks.py) and sparsity. Outputs are compared with
the dense network's first. Then all take turns, in bursts in which nothing else runs (turns.py); DeepSparse in
a process of its own environment (served.py). How sparse a network is makes no difference to dense ones: all
of them run in the first cell of a network and batch size, and the best of these in every other, in the same
turns as ours. All compute in float32 with as many threads, and keep the memory that they free
(benchmarks/cpu/sparse/measure.py says why).

A cell that this version has measured is skipped, unless something else disturbed it (rows.py): the same
command goes on.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
from torch import nn

from benchmarks import ROOT
from benchmarks.cpu.engine.masks import KINDS, sparse_network
from benchmarks.cpu.engine.rows import DEEPSPARSE, Cell, Row, Rows
from benchmarks.cpu.engine.served import served
from benchmarks.cpu.sparse.measure import keep_freed_memory
from drive.experiments.bench import rivals
from drive.experiments.bench.inference import milliseconds
from drive.experiments.bench.networks import build, noise
from drive.experiments.bench.rivals import DENSE, OURS, Run
from drive.experiments.bench.step import processor
from drive.experiments.bench.turns import SECONDS, Burst, Spread, burst, in_turns
from drive.experiments.runs.inputs import one_line
from drive.experiments.training.macs import macs_left

BATCHES = {"resnet50": (1, 16), "resnet18": (1, 32), "mobilenet_v2": (1, 16), "vgg16": (1,)}
SPARSITIES = (0.9, 0.8, 0.95, 0.98)
ROUNDS = 9
PREPARED = 20.0  # seconds a cell before its turns, roughly: masks, plan, DeepSparse's compilation
MASKS = ROOT / "build" / "engine-masks"

Dense = dict[str, Run]


class Race:
    """The cells of one network and batch size.

    Args:
        rows: where to.
        deepsparse: the python of its environment; None: it takes no part.
    """

    def __init__(self, network: str, batch: int, rows: Rows, deepsparse: Path | None):
        self._network, self._rows, self._deepsparse = network, rows, deepsparse
        self._example = noise(batch, build(network)[1])
        self._dense: Dense = {}

    def run(self, cell: Cell) -> Row:
        """Measure a cell, and keep it."""
        model, masks = sparse_network(self._network, cell.masks, cell.sparsity, MASKS)
        with torch.inference_mode():
            expected = model(self._example)
        runs = {OURS: rivals.ours(model, masks, self._example)}
        differences = {OURS: rivals.difference(runs[OURS](), expected)}
        absent: dict[str, str] = {}
        if not self._dense:
            self._dense, absent = self._make_dense(model)
            differences |= {name: rivals.difference(run(), expected) for name, run in self._dense.items()}
        bursts: dict[str, Burst] = {name: burst(run) for name, run in (runs | self._dense).items()}
        versions = {name: _version(name) for name in ("torch", "onnxruntime", "openvino")}
        with ExitStack() as stack:
            if self._deepsparse:
                try:
                    theirs = stack.enter_context(served(self._deepsparse, model, self._example))
                except RuntimeError as error:
                    absent[DEEPSPARSE] = one_line(error)
                else:
                    bursts[DEEPSPARSE], versions["deepsparse"] = theirs.burst, theirs.version
                    differences[DEEPSPARSE] = rivals.difference(theirs.output, expected)
            seconds = in_turns(bursts, ROUNDS)
        self._keep_best(seconds)
        row = Row(
            cell, macs_left(model, masks, self._example), seconds, differences, absent, processor(),
            torch.get_num_threads(), versions, time.strftime("%Y-%m-%d"), self._rows.commit,
        )  # fmt: skip
        self._rows.add(row)
        return row

    def _make_dense(self, model: nn.Module) -> tuple[Dense, dict[str, str]]:
        made = {name: rivals.made(make, model, self._example) for name, make in DENSE.items()}
        there = {name: run for name, run in made.items() if not isinstance(run, str)}
        return there, {name: why for name, why in made.items() if isinstance(why, str)}

    def _keep_best(self, seconds: dict[str, Spread]) -> None:
        best = min(self._dense, key=lambda name: seconds[name].median)
        self._dense = {best: self._dense[best]}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not there"


def shown(row: Row) -> str:
    """A row in a line."""
    cell = row.cell
    times = ", ".join(f"{name} {milliseconds(time.median)}" for name, time in row.seconds.items())
    wrong = max(row.differences.values())
    return (
        f"{cell.network}, batch {cell.batch}, {cell.sparsity:.0%}, {cell.masks}: {times} ms; "
        f"differences up to {wrong:.0e}" + "".join(f"; {name}: {why}" for name, why in row.absent.items())
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"default: {', '.join(BATCHES)}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--deepsparse", type=Path, metavar="PYTHON", help="of its environment")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="default: each network's")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, metavar="X")
    parser.add_argument("--masks", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    rows = Rows(options.out)
    todo = {}
    for network in options.networks or BATCHES:
        for batch in options.batches or BATCHES.get(network, (1,)):
            cells = product([network], [batch], options.sparsities, options.masks)
            todo[network, batch] = rows.missing(Cell(*cell) for cell in cells)
    left = sum(map(len, todo.values()))
    print(f"{left} cells, about {left * (PREPARED + ROUNDS * 4 * SECONDS) / 60:.0f} minutes", flush=True)
    begun, done = time.monotonic(), 0
    for (network, batch), cells in todo.items():
        if not cells:
            continue
        race = Race(network, batch, rows, options.deepsparse)
        for cell in cells:
            print(shown(race.run(cell)), flush=True)
            done += 1
            minutes = (time.monotonic() - begun) / done * (left - done) / 60
            print(f"{done} of {left} cells, about {minutes:.0f} minutes left", flush=True)


if __name__ == "__main__":
    main()
