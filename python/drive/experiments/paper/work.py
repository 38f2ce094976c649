"""What the work on a cell of any kind has in common: a folder that a kill at any moment does not spoil."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from rich.progress import Progress
from torch import nn

from drive.experiments.data.dataset import Dataset, seed_of
from drive.experiments.runs.folder import made_with
from drive.experiments.runs.locks import locked
from drive.experiments.runs.stored import save_tensors, write_json, write_stamped
from drive.experiments.training.compute import Compute
from drive.experiments.training.loop import Checkpoint
from drive.experiments.training.macs import macs_left
from drive.experiments.training.networks import Network
from drive.masks import Masks
from drive.structured.shrink import Shrunk

RESULT = "drive.result.v1"
SAVE_EVERY = 60.0  # seconds between two savings of a training, or of the levels of IMP, in progress

Result = dict[str, Any]


class Trained(NamedTuple):
    """A network that is ready.

    Attributes:
        result: what is said of it.
        masks: of the network, before it was shrunk if it was; None: nothing is pruned.
        shrunk: by these masks.
    """

    result: Result
    masks: Masks | None
    shrunk: Shrunk | None = None


class AnyCell(Protocol):
    """One network to train, named by all that its result depends on."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def compute(self) -> Compute: ...
    def images(self, data: Dataset) -> Dataset: ...
    def network(self, images: Dataset) -> Network: ...
    def as_dict(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=AnyCell)


class CellWork(ABC, Generic[C]):
    """The work on one cell.

    Args:
        root: of all cells; this one's folder is in there.
        data: on the cell's device, all of them.
        deadline: of time.monotonic(); after it the work pauses as soon as it can be gone on with.
        keep_network: leave it in `checkpoint.pt`, or for `drive.rebuild` in `small.safetensors` if it was
            shrunk, and its masks in `masks.safetensors`.
        tensorboard: write TensorBoard's files beside `log.csv`.
    """

    def __init__(
        self, cell: C, root: Path, data: Dataset, progress: Progress, *,
        deadline: float = math.inf, keep_network: bool = False, tensorboard: bool = False,
    ):  # fmt: skip
        self.cell, self.root, self.progress = cell, root, progress
        self.deadline, self.keep_network, self.tensorboard = deadline, keep_network, tensorboard
        self.folder = root / cell.name
        self.images = cell.images(data)
        self.network = cell.network(self.images)

    def run(self) -> Result:
        """Train, or go on from where it was left.

        Returns:
            The result, which `result.json` holds then.

        Raises:
            InputError: training diverges.
            Paused: the deadline is over.
        """
        cell, folder = self.cell, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial"):  # of a killed process
            left.unlink()
        write_json(folder / "config.json", cell.as_dict())
        torch.manual_seed(seed_of(cell.seed, "initialisation"))
        model = cell.compute.place(self.network.build())
        found, masks, shrunk = self.train(model)
        if self.keep_network:
            if masks is not None:
                masks.save(folder / "masks.safetensors")
            if shrunk is not None:
                shrunk.save(folder / "small.safetensors")
        if self.keep_network and shrunk is None:
            state = {"network": self.network.as_dict(), "model": model.state_dict()}
            save_tensors(folder / "checkpoint.pt", state)
        result = {
            "data": cell.data,
            "model": cell.model,
            "seed": cell.seed,
            "train_images": len(self.images.train_y),
            "tested": len(self.images.test_y),
            "kept": {name: int(mask.sum()) for name, mask in (masks or {}).items()},
            "macs_left": macs_left(model, masks, self.images.train_x),
            **found,
            "made_with": {**made_with(cell.compute.device), "threads": torch.get_num_threads()},
        }
        write_stamped(folder / "result.json", RESULT, result)
        for name in ("training.pt", "pruned.pt", "thinned.pt", "failure.txt"):
            (folder / name).unlink(missing_ok=True)
        return result

    @abstractmethod
    def train(self, model: nn.Module) -> Trained:
        """Train a fresh network, in place unless it is shrunk."""

    def checkpoint(self, folder: Path) -> Checkpoint:
        """Of a training in progress in that folder."""
        return Checkpoint(folder / "training.pt", self.network.as_dict(), SAVE_EVERY, self.deadline)

    @contextmanager
    def shared(self, cell: AnyCell) -> Iterator[Path]:
        """The folder of a training that several cells share; a process that comes second waits for it."""
        folder = self.root / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):
            write_json(folder / "config.json", cell.as_dict())
            yield folder
