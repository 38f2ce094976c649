"""What a training did, epoch by epoch, and the files that say so: log.csv, layers.csv, TensorBoard's."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from drive.experiments.runs.inputs import require
from drive.files import write_atomic


class Epoch(NamedTuple):
    """One epoch of a training."""

    epoch: int  # from 1, over the whole recipe: a sparse network may start at 6
    loss: float  # mean over the batches
    lr: float  # in its last step
    accuracy: float | None  # on the test images afterwards; None: not tested
    seconds: float  # without the test
    layers: dict[str, dict[str, float]] = {}  # noqa: RUF012 (nobody writes to it) numbers of each layer


@dataclass(frozen=True)
class Log:
    """Where a training is written down, up to date after every epoch: `log.csv` in a folder.

    Attributes:
        before: epochs that the network was trained before: its warm-up.
        test_every: epochs; the last one is always tested. Five cost little: a test is forward only.
        tensorboard: also TensorBoard's files, in the folder `tensorboard`.
    """

    folder: Path
    before: tuple[Epoch, ...] = ()
    test_every: int = 5
    tensorboard: bool = False


class LogFiles:
    """The files of a `Log`, at work on them.

    Args:
        history: what a training that was interrupted has done already. Epochs that were written down after it
            was last saved are done again, and stand there once all the same.
    """

    def __init__(self, log: Log, history: Sequence[Epoch]):
        self._path, self._before, self._board = log.folder / "log.csv", log.before, None
        if log.tensorboard:
            require("tensorboard")
            make = require("lightning.fabric.loggers").TensorBoardLogger
            # from that step on, what is there already does not count
            done = history[-1].epoch if history else 0
            self._board = make(log.folder, name="tensorboard", version="", purge_step=done + 1)
            for epoch in () if history else log.before:
                self._draw(epoch)

    def write(self, history: Sequence[Epoch]) -> None:
        """Of a training whose last epoch has just ended."""
        write_log(self._path, [*self._before, *history])
        if history[-1].layers:
            write_layers(self._path.with_name("layers.csv"), [*self._before, *history])
        self._draw(history[-1])

    def close(self) -> None:
        if self._board:
            self._board.finalize("")

    def _draw(self, epoch: Epoch) -> None:
        if self._board:
            values = {"loss": epoch.loss, "lr": epoch.lr, "accuracy": epoch.accuracy}
            for layer, numbers in epoch.layers.items():
                values |= {f"{what}/{layer}": number for what, number in numbers.items()}
            self._board.log_metrics({k: v for k, v in values.items() if v is not None}, epoch.epoch)
            self._board.save()


def write_log(path: Path, epochs: Sequence[Epoch]) -> None:
    """All epochs as CSV, whole or not at all: what a resumed training repeats is never there twice."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Epoch._fields[:-1])
    writer.writerows(epoch[:-1] for epoch in epochs)
    write_atomic(path, text.getvalue().encode())


def write_layers(path: Path, epochs: Sequence[Epoch]) -> None:
    """The numbers of each layer as CSV, a row for a layer in an epoch, likewise."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [(epoch.epoch, name, numbers) for epoch in epochs for name, numbers in epoch.layers.items()]
    what = list(dict.fromkeys(key for _, _, numbers in rows for key in numbers))
    writer.writerow(["epoch", "layer", *what])
    writer.writerows([epoch, name, *(numbers.get(key, "") for key in what)] for epoch, name, numbers in rows)
    write_atomic(path, text.getvalue().encode())
