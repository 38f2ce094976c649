"""Tables and a figure of what race.py has measured.

python -m benchmarks.cpu.engine.report docs/results/sparse-engine.jsonl docs/results/sparse-engine.md

The figure goes beside the page, under the same name.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import median

from benchmarks.cpu.engine.masks import IMAGES, ITERATIONS, KINDS, UNIFORM
from benchmarks.cpu.engine.race import ROUNDS
from benchmarks.cpu.engine.rows import DEEPSPARSE, DISTURBED, Cell, Row, read
from benchmarks.pages import markdown
from drive.experiments.bench.inference import TOLERATED, draw, milliseconds
from drive.experiments.bench.rivals import CHANNELS_LAST, CONTIGUOUS, DENSE, ONNX_RUNTIME, OPENVINO, OURS
from drive.experiments.bench.turns import SECONDS
from drive.files import write_atomic

PICTURED = Cell("resnet50", 1, 0.9, UNIFORM)
NETWORKS = {
    "resnet50": "ResNet-50, 224x224", "resnet18": "ResNet-18, 32x32",
    "mobilenet_v2": "MobileNetV2, 224x224", "vgg16": "VGG-16, 224x224",
}  # fmt: skip

PAGE = """# Sparse inference on a CPU

{machines}

Milliseconds a call of `drive.sparse.freeze`'s plan, beside torch, ONNX Runtime, OpenVINO and DeepSparse, all
in float32 with as many threads; and how many times as long as ours the best dense one of the same turns took,
and DeepSparse.{picture}

- **Networks**: torchvision's, untrained; what survives in a layer has the norm that all its weights had, and
  BatchNorm the statistics of noise, so that activations neither vanish nor grow. ResNet-18 has a 3x3 stem and
  no pooling after it.
- **Masks**: uniform ones are random, of the same sparsity in every layer. DRIVE's ({iterations} iterations on
  {images} images of noise each) leave a share of the weights ("by count") or of the multiply-adds: what is
  left of these is a column.
- **Dense ones** take as long at any sparsity: their columns are of the first cell of a network and batch
  size. The best of them runs in the turns of every other cell too, and "best dense / ours" is of these.
- **Turns**: {rounds} rounds, in each a burst of {seconds:g} s of everyone, in an order of its own, in which
  nothing else runs: a burst begins when all threads sleep, and its first call is not timed. A figure is the
  median of the bursts' medians. Half of all quartiles are within {typical:.1%} of it, 9 of 10 within
  {most:.1%}; {disturbed} of {rows} rows have more than {tolerated:.0%} between them, which the next run
  measures again.
- **Outputs** were compared with the dense network's before: {outputs}.
- DeepSparse 1.8.0 is the last version, in a process of its own environment (benchmarks/cpu/engine/served.py).
{absent}
{tables}
"""


def tables(rows: Iterable[Row]) -> Iterator[str]:
    """A section a network."""
    names = list(NETWORKS)
    rows = sorted(rows, key=lambda r: (names.index(r.cell.network), r.cell.network, r.cell.batch,
                                       KINDS.index(r.cell.masks), r.cell.sparsity))  # fmt: skip
    for network, group in groupby(rows, key=lambda row: row.cell.network):
        found = list(group)
        head = ["batch", "sparsity", "masks", "multiply-adds left", *columns(), "best dense / ours",
                f"{DEEPSPARSE} / ours"]  # fmt: skip
        lines = [_line(row, dense_of(found, row.cell.batch)) for row in found]
        yield f"## {NETWORKS[network]}\n\n{markdown(head, lines)}"


def columns() -> list[str]:
    """Competitors, in their order."""
    return [CONTIGUOUS, CHANNELS_LAST, ONNX_RUNTIME, OPENVINO, DEEPSPARSE, OURS]


def dense_of(rows: Iterable[Row], batch: int) -> Row:
    """The row with all dense ones, of those of one network."""
    return max(
        (row for row in rows if row.cell.batch == batch),
        key=lambda row: len(row.seconds.keys() & DENSE.keys()),
    )


def _line(row: Row, dense: Row) -> list[str]:
    cell = row.cell
    seconds = {**row.seconds, **{name: time for name, time in dense.seconds.items() if name in DENSE}}
    over = row.over_deepsparse()
    return [
        str(cell.batch), f"{cell.sparsity:.0%}", cell.masks, f"{row.left:.1%}",
        *(milliseconds(seconds[name].median) if name in seconds else "-" for name in columns()),
        f"{row.over_dense():.2f}", "-" if over is None else f"{over:.2f}",
    ]  # fmt: skip


def _machines(rows: list[Row]) -> str:
    """Where and when, with what, and how many rows if there are several."""
    found = Counter(
        f"{row.processor}, {row.threads} threads; "
        + ", ".join(f"{name} {number}" for name, number in row.versions.items())
        + f"; {row.date}, commit {row.commit}"
        for row in rows
    )
    return (
        next(iter(found))
        if len(found) == 1
        else "\n".join(f"- {line}: {n} rows" for line, n in found.items())
    )


def _outputs(rows: list[Row]) -> str:
    """How far they were off, and whose should not be compared."""
    every = [(name, d, row.cell) for row in rows for name, d in row.differences.items()]
    wrong = [f"{name} by {d:.0e} ({cell.network}, batch {cell.batch}, {cell.sparsity:.0%}, {cell.masks})"
             for name, d, cell in every if not d <= TOLERATED]  # fmt: skip
    if wrong:
        return f"these differ by more than {TOLERATED:g} of the largest entry: {'; '.join(wrong)}"
    return f"none differs by more than {max(d for _, d, _ in every):.0e} of the largest entry"


def _absent(rows: list[Row]) -> str:
    """Who did not run where."""
    why = Counter((name, reason) for row in rows for name, reason in row.absent.items())
    return "".join(f"- {name} did not run in {n} cells: {reason}.\n" for (name, reason), n in why.items())


def page(rows: list[Row], figure: str) -> str:
    """The page, with the figure of that name if there is one."""
    off = sorted(
        abs(edge / time.median - 1)
        for row in rows for time in row.seconds.values() for edge in (time.low, time.high)
    )  # fmt: skip
    return PAGE.format(
        machines=_machines(rows), picture=figure and f"\n\n![milliseconds of a call]({figure})",
        iterations=ITERATIONS, images=IMAGES, rounds=ROUNDS, seconds=SECONDS, typical=median(off),
        most=off[int(0.9 * (len(off) - 1))], disturbed=sum(row.disturbed for row in rows), rows=len(rows),
        tolerated=DISTURBED, outputs=_outputs(rows), absent=_absent(rows), tables="\n\n".join(tables(rows)),
    )  # fmt: skip


def picture(rows: list[Row], path: Path) -> bool:
    """The cell that the README shows, if it has been measured: a bar each, in milliseconds."""
    row = next((row for row in rows if row.cell == PICTURED), None)
    if row is None:
        return False
    of_same = [other for other in rows if other.cell.network == row.cell.network]
    seconds = {**dense_of(of_same, row.cell.batch).seconds, **row.seconds}
    title = (
        f"{NETWORKS[row.cell.network]}, {row.cell.sparsity:.0%} pruned, batch {row.cell.batch}: ms a call\n"
        f"{row.processor}, {row.threads} threads, float32"
    )
    draw({name: seconds[name] for name in columns() if name in seconds}, title, path)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args(arguments)
    rows, figure = read(options.rows), options.page.with_suffix(".png")
    name = figure.name if picture(rows, figure) else ""
    write_atomic(options.page, page(rows, name).encode())


if __name__ == "__main__":
    main()
