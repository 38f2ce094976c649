"""The file that race.py writes and report.py reads: a row a line, each naming its version."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cpu.sparse.rows import version
from drive.experiments.bench.rivals import DENSE, OURS
from drive.experiments.bench.turns import Spread
from drive.files import write_atomic

DEEPSPARSE = "DeepSparse"
DISTURBED = 0.25  # so much of the median may lie between the quartiles

MEASURED = (  # of the last commit that changed one of these a row is
    "csrc", "python/drive_kernels", "python/drive/sparse", "python/drive/experiments/bench/networks.py",
    "python/drive/experiments/bench/rivals.py", "python/drive/experiments/bench/turns.py",
    "benchmarks/cpu/engine/masks.py", "benchmarks/cpu/engine/race.py", "benchmarks/cpu/engine/served.py",
    "benchmarks/cpu/engine/deepsparse_server.py",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is measured: one network with one set of masks at one batch size."""

    network: str
    batch: int
    sparsity: float
    masks: str


@dataclass(frozen=True)
class Row:
    """A cell, what was measured in the same turns, and where and when.

    Attributes:
        left: the share of the multiply-adds.
        seconds: a call of each.
        differences: of the outputs from the dense network's, relative to the largest.
        absent: who did not run, and why.
    """

    cell: Cell
    left: float
    seconds: dict[str, Spread]
    differences: dict[str, float]
    absent: dict[str, str]
    processor: str
    threads: int
    versions: dict[str, str]
    date: str
    commit: str

    @property
    def disturbed(self) -> bool:
        """Whether the machine was too busy with something else for the row to count."""
        counts = [self.seconds[name] for name in (OURS, DEEPSPARSE) if name in self.seconds] + [self._best]
        return any(time.high - time.low > DISTURBED * time.median for time in counts)

    @property
    def _best(self) -> Spread:
        """Of those that compute with the zeros."""
        dense = (time for name, time in self.seconds.items() if name in DENSE)
        return min(dense, key=lambda time: time.median)

    def over_dense(self) -> float:
        """How many times faster than the best dense one it is."""
        return self._best.median / self.seconds[OURS].median

    def over_deepsparse(self) -> float | None:
        """The same of DeepSparse; None: it was not there."""
        if DEEPSPARSE not in self.seconds:
            return None
        return self.seconds[DEEPSPARSE].median / self.seconds[OURS].median


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    found = []
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        fields["cell"] = Cell(**fields["cell"])
        fields["seconds"] = {name: Spread(**time) for name, time in fields["seconds"].items()}
        found.append(Row(**fields))
    return found


class Rows:
    """The file: a row is there as soon as it is measured, in place of one of another version."""

    def __init__(self, path: Path):
        self.path, self.commit = path, version(MEASURED)
        self._known = {row.cell: row for row in read(path)} if path.exists() else {}

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that this version has not measured, or not without being disturbed."""
        known = self._known
        return [
            cell for cell in cells
            if cell not in known or known[cell].commit != self.commit or known[cell].disturbed
        ]  # fmt: skip

    def add(self, row: Row) -> None:
        """Keep it."""
        self._known.pop(row.cell, None)
        self._known[row.cell] = row
        lines = [json.dumps(asdict(row)) + "\n" for row in self._known.values()]
        write_atomic(self.path, "".join(lines).encode())
