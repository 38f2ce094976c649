"""`drive prune`, `drive compare`: pruning methods against each other and the dense network, on any data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from drive import methods
from drive.experiments.data.dataset import Dataset
from drive.experiments.runs.inputs import InputError
from drive.experiments.training.compute import Compute
from drive.experiments.training.networks import Network
from drive.experiments.training.recipe import Recipe
from drive.files import write_atomic
from drive.targets.structures import CHANNELS

from .cell import Cell
from .goal import Goal
from .queue import Experiment
from .variants import Variant, dense
from .work import Result


@dataclass(frozen=True)
class Config:
    """All that the results depend on: the options of `drive prune` and `drive compare`.

    Attributes:
        sparsities, macs: of one of them there are none.
    """

    data: str
    data_dir: str | None
    limit_train: int | None
    model: str
    methods: list[str]
    sparsities: list[float]
    macs: list[float]
    alpha: float | None
    structure: str
    prior: float
    seeds: int
    epochs: int
    warmup_epochs: int
    iterations: int
    batch_size: int
    lr: float
    sparse_ops: bool
    device: str
    threads: int

    @property
    def goals(self) -> list[Goal]:
        """Of every method, the sparsest last."""
        return [*map(Goal, self.sparsities), *(Goal(macs=macs, alpha=self.alpha) for macs in self.macs)]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Comparison:
    """A run in a folder: `cells/`, then checkpoint and masks of one network.

    `checkpoint.pt` (or, for `drive.rebuild`, `small.safetensors`) and `masks.safetensors` are of the first
    seed's sparsest network, pruned by DRIVE (or the first method, if DRIVE is not among them).

    Args:
        data: of the run, its images limited already if they are to be.
    """

    def __init__(self, config: Config, data: Dataset, folder: Path):
        self.config, self.data, self.folder = config, data, folder
        self.network = Network(config.model, data.classes, data.channels, data.side)
        self.network.build()  # one that does not fit the images says so now
        self.cells = [
            cell
            for seed in range(config.seeds)
            for cell in (
                self._cell(self._dense, Goal(0.0), seed),
                *(
                    self._cell(variant_of(name, config), goal, seed)
                    for name in config.methods
                    for goal in config.goals
                ),
            )
        ]

    def run(self, progress: Progress) -> list[Result]:
        """Train every network that is not finished yet; the results of all, in the order of `cells`.

        Raises:
            InputError: the data are not those that the run was started with; training diverges; another
                command is at work on its cells.
        """
        config = self.config
        kept = "drive" if "drive" in config.methods else config.methods[0]
        exported = self._cell(variant_of(kept, config), config.goals[-1], seed=0)
        experiment = Experiment(self.folder, self.cells, lambda _: self.data)
        outcome = experiment.run(progress, keep_going=False, keep_networks=[exported])
        if outcome.open:
            raise InputError(f"--out must be no other process's, got {self.folder}, in which one is at work")
        network = "small.safetensors" if exported.variant.smaller else "checkpoint.pt"
        for name in (network, "masks.safetensors"):
            source = experiment.cells_folder / exported.name / name
            write_atomic(self.folder / name, source.read_bytes())
        return [outcome.results[cell] for cell in self.cells]

    @property
    def _dense(self) -> Variant:
        """Measured as networks are that are shrunk, if some are."""
        config = self.config
        return replace(dense(config.warmup_epochs), structure=config.structure, prior=config.prior)

    def _cell(self, variant: Variant, goal: Goal, seed: int) -> Cell:
        config = self.config
        return Cell(
            config.data, config.model, variant, goal, seed,
            Recipe(config.epochs, config.lr, config.batch_size),
            Compute(config.device, sparse_ops=config.sparse_ops), limit=config.limit_train,
        )  # fmt: skip


def variant_of(name: str, config: Config) -> Variant:
    """A method as the two commands run it; channels are scored in eval mode, as EarlyCroP's authors do."""
    variant, by_outputs = _variant_of(name, config), config.structure == CHANNELS
    return replace(variant, structure=config.structure, prior=config.prior, eval_mode=by_outputs)


def _variant_of(name: str, config: Config) -> Variant:
    """Gradual and RigL within the epochs of the others."""
    method, epochs = methods.get(name), config.epochs
    part = max(1, epochs * 3 // 4)
    if name == "gradual":
        return Variant(name, name, iterations=part)
    if name == "rigl":
        return Variant(name, name, iterations=part + 1)  # the first comes before any training
    if name in ("imp", "early_crop"):
        return Variant(name, name, rounds=epochs)
    several = config.iterations if method.iterations > 1 and name != "crop" else None
    warmup = config.warmup_epochs if method.stage == "warm-up" else 0
    return Variant(name, name, warmup=warmup, iterations=several)
