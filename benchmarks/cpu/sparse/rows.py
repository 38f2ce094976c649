"""The file that measure.py writes and report.py reads: a row a line, each naming its version."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from drive.experiments.bench.step import machine
from drive.files import write_atomic

# What a row is of; IN_A_ROW: the same convolutions, called many times in a row.
NETWORK, CONVOLUTION, IN_A_ROW, LINEAR = "network", "3x3 convolution", "3x3 convolution, in a row", "linear"

MEASURED = (  # of the last commit that changed one of these a row is
    "csrc", "python/drive_kernels", "python/drive/sparse", "benchmarks/cpu/sparse/measure.py",
    "benchmarks/cpu/sparse/networks.py", "benchmarks/layers.py", "benchmarks/transformer.py",
)  # fmt: skip

TOLERATED = 0.97  # a converted network may be so much slower than the dense one
FIRST = "ours, first"  # beside "ours" where a network seemed to be slower than that, and was measured again
DISTURBED = 0.1  # by so much may two copies of the dense network differ, timed in the same turns


def best_dense(seconds: Mapping[str, float]) -> float:
    """Of the eager ones: torch.compile's is shown apart."""
    return min(s for name, s in seconds.items() if name.startswith("dense"))


@dataclass(frozen=True)
class Row:
    """What was timed, and the seconds a call of each provider; "dense..." are those to beat."""

    what: str
    name: str
    batch: int
    sparsity: float
    mode: str
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    machine: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.what, self.name, self.batch, self.sparsity, self.mode

    def speedup(self, provider: str = "ours") -> float:
        return best_dense(self.seconds) / self.seconds[provider]

    @property
    def disturbed(self) -> bool:
        """Whether the machine was too busy with something else for the row to count."""
        return "again" in self.seconds and abs(self.seconds["dense"] / self.seconds["again"] - 1) > DISTURBED


def read(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def version(measured: Sequence[str] = MEASURED) -> str:
    """The commit that last changed what is measured here, with a + if something has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", *measured]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


class Rows:
    """The file: a row a line, written as soon as it is measured."""

    def __init__(self, path: Path):
        self.path, self.commit = path, version()
        self.known = {row.key: row for row in read(path)} if path.exists() else {}

    def missing(self, *key: Any) -> bool:
        row = self.known.get(key)
        return row is None or row.commit != self.commit or row.disturbed

    def add(self, *key: Any, seconds: dict[str, float], chosen: str = "") -> None:
        row = Row(*key, seconds=seconds, chosen=chosen, machine=machine(), commit=self.commit)
        self.known.pop(key, None)
        self.known[key] = row
        lines = [json.dumps(asdict(row)) + "\n" for row in self.known.values()]
        write_atomic(self.path, "".join(lines).encode())
        shown = ", ".join(
            f"{name} {row.speedup(name):.2f}x" for name in seconds if not name.startswith("dense")
        )
        print(f"{key}: dense {best_dense(seconds) * 1e3:.2f} ms; {shown} {chosen}", flush=True)
