"""Many cells in a folder, resumable: what is finished is never done again, what fails stops nothing else.

Several processes may share the folder, one on each GPU say: each takes cells that no other is at work on.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, cast

from rich.progress import Progress

from drive.experiments.data.dataset import Dataset
from drive.experiments.runs.inputs import InputError, one_line
from drive.experiments.runs.locks import locked
from drive.experiments.runs.stored import AGAIN, read_stamped, write_stamped
from drive.experiments.training.loop import Paused
from drive.files import write_atomic

from .trainer import CellRun
from .work import RESULT, C, Result

IMAGES = "drive.images.v1"


@dataclass
class Outcome(Generic[C]):
    """What is known of an experiment's cells."""

    results: dict[C, Result] = field(default_factory=dict)
    failures: dict[C, str] = field(default_factory=dict)  # the first line of what was raised
    open: list[C] = field(default_factory=list)  # not begun, paused, or in the hands of another process
    interrupted: KeyboardInterrupt | None = None  # by what it was


class Experiment(Generic[C]):
    """Cells in `folder/cells`, a folder each.

    Args:
        folder: of the run.
        cells: all of them, in the order in which they are to be trained; those of one data set together.
        load: a data set by its name.
        work: what trains a cell.
        tensorboard: write TensorBoard's files beside each cell's `log.csv`.
    """

    def __init__(
        self, folder: Path, cells: Sequence[C], load: Callable[[str], Dataset], *,
        tensorboard: bool = False, work: Callable[..., Any] = CellRun,
    ):  # fmt: skip
        self.cells_folder, self._tensorboard = folder / "cells", tensorboard
        self.cells, self._load = list(dict.fromkeys(cells)), load
        self._work = work
        self._loaded: tuple[str, Dataset | Exception] | None = None  # the last one: they may be large

    def run(
        self, progress: Progress, *,
        deadline: float = math.inf, pause: bool = False, keep_going: bool = True,
        keep_networks: Collection[C] = (),
    ) -> Outcome[C]:  # fmt: skip
        """Train what is not finished yet.

        Args:
            deadline: of time.monotonic(); no cell is begun after it.
            pause: leave the cell in hand too, at the end of an epoch after the deadline.
            keep_going: what a cell raises is kept, and the others are trained (after an interruption, none).
                Otherwise it is raised.
            keep_networks: cells whose trained networks and masks are kept.
        """
        overall = progress.add_task("all networks", total=len(self.cells))
        found: Outcome[C] = Outcome()
        for cell in self.cells:
            try:
                result = self.result(cell)
                if result is None and time.monotonic() < deadline:
                    result = self._train(
                        cell, progress, deadline if pause else math.inf, cell in keep_networks
                    )
                if result is None:
                    found.open.append(cell)
                else:
                    found.results[cell] = result
            except KeyboardInterrupt as error:
                if not keep_going:
                    raise
                found.interrupted = error
                found.open.append(cell)
                deadline = -math.inf
            except Exception as error:
                if not keep_going:
                    raise
                # not the error itself: its frames would keep the network, and a GPU's memory
                found.failures[cell] = one_line(error)
            progress.advance(overall)
        return found

    def result(self, cell: C) -> Result | None:
        """Of a finished cell.

        Raises:
            InputError: it cannot be read.
        """
        path = self.cells_folder / cell.name / "result.json"
        return read_stamped(path, RESULT, AGAIN) if path.exists() else None

    def data(self, cell: C) -> Dataset:
        """The data set of a cell, on its device.

        Raises:
            InputError: it cannot be loaded, or is not what the folder's other cells were trained on.
        """
        if self._loaded is None or self._loaded[0] != cell.data:
            self._loaded = None  # frees the memory first
            try:
                data = self._load(cell.data)
                self._check(cell.data, data)
                self._loaded = cell.data, data.to(cell.compute.device)
            except InputError as error:  # and it is not tried again for each cell
                self._loaded = cell.data, error
        if isinstance(self._loaded[1], Exception):
            raise self._loaded[1]
        return self._loaded[1]

    def _train(self, cell: C, progress: Progress, deadline: float, keep_network: bool) -> Result | None:
        """None: it was paused, or another process is at work on it."""
        data = self.data(cell)
        folder = self.cells_folder / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as mine:
            if not mine:
                return None
            if (result := self.result(cell)) is not None:  # by another process, a moment ago
                return result
            try:
                result = self._work(
                    cell, self.cells_folder, data, progress, deadline=deadline, keep_network=keep_network,
                    tensorboard=self._tensorboard,
                ).run()  # fmt: skip
                return cast(Result, result)
            except Paused:
                return None
            except Exception:
                write_atomic(folder / "failure.txt", traceback.format_exc().encode())
                raise

    def _check(self, name: str, data: Dataset) -> None:
        self.cells_folder.mkdir(parents=True, exist_ok=True)
        path, here = self.cells_folder / f"{name}.json", data.fingerprint
        if not path.exists():
            write_stamped(path, IMAGES, {"fingerprint": here})
        elif read_stamped(path, IMAGES, "give --out another folder")["fingerprint"] != here:
            raise InputError(
                f"--data must be what {self.cells_folder.parent} was started with, got other images or labels"
            )
