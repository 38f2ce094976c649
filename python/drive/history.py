"""What a training did, epoch by epoch, and its CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .files import write_atomic


class Epoch(NamedTuple):
    """One epoch of a training."""

    epoch: int  # from 1, over the whole recipe: a sparse network may start at 6
    loss: float  # mean over the batches
    lr: float  # in its last step
    accuracy: float | None  # on the test images afterwards; None: not tested
    seconds: float  # without the test


def write_log(path: Path, epochs: Sequence[Epoch]) -> None:
    """All epochs as CSV, whole or not at all: what a resumed training repeats is never there twice."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Epoch._fields)
    writer.writerows(epochs)
    write_atomic(path, text.getvalue().encode())


def read_log(path: Path) -> list[Epoch]:
    """What `write_log` wrote."""
    with path.open(newline="") as file:
        return [
            Epoch(
                int(row["epoch"]), float(row["loss"]), float(row["lr"]),
                float(row["accuracy"]) if row["accuracy"] else None, float(row["seconds"]),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip
