"""Networks on CIFAR-10, pruned to a budget of multiply-adds or to a count, and trained: a cell a file.

python -m benchmarks.cpu.budget.cells --data-dir cifar10.tar.gz --out runs/budget

Dense epochs, which all networks of a seed share; iterations of DRIVE; then epochs with the masks held, on
the sparse ops. What is done is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import drive
from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset, seed_of
from drive.experiments.data.sources import load
from drive.experiments.runs.stored import load_tensors, read_json, save_tensors, write_json
from drive.experiments.training.compute import Compute
from drive.experiments.training.loop import evaluate, train
from drive.experiments.training.networks import Network
from drive.experiments.training.recipe import Recipe
from drive.targets.multiply_adds import dense_work, multiply_adds, work
from drive.targets.targets import prunable

NETWORKS = "resnet8", "cnn4"
ITERATIONS, WARMUP, EPOCHS, BATCH = 40, 2, 8, 64
TRAINED, HELD_OUT, TESTED = (
    5000,
    4000,
    4000,
)  # images; alpha is chosen by those held out of CIFAR-10's training set

COUNT, UNIFORM, ERK, DENSE = "by count", "uniform", "ERK", "dense"
ALPHAS = {f"alpha {alpha:g}": alpha for alpha in (0.0, 0.5, 1.0, 1.5)}
MACS = 0.2, 0.05, 0.02, 0.01
LEVELS = {  # of each way: of multiply-adds that are left, or of weights
    DENSE: (1.0,),
    COUNT: (0.1, 0.02, 0.007, 0.003),
    **dict.fromkeys(ALPHAS, MACS),
    UNIFORM: MACS,
    ERK: (0.1, 0.02, 0.01, 0.005),
}


@dataclass(frozen=True)
class Cell:
    network: str
    way: str
    level: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.way.replace(' ', '')}-{self.level:g}-{self.seed}"

    def prune(self, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> drive.Masks | None:
        """In place.

        A classifier with a ranking of its own stays dense: gradients alone leave one class alive in it.
        """
        if self.way == DENSE:
            return None
        goal: dict[str, Any] = {"sparsity": 1 - self.level}
        if self.way in ALPHAS:
            goal = {"macs": self.level, "alpha": ALPHAS[self.way]}
        elif self.way != COUNT:
            *_, classifier = prunable(model)
            goal |= {"scope": self.way.lower(), "exclude": [classifier]}
        masks: drive.Masks = drive.prune(
            model, batches, F.cross_entropy, iterations=ITERATIONS, on_ties="index", progress=False, **goal
        )
        return masks


def cells(networks: list[str], seeds: list[int]) -> Iterator[Cell]:
    for seed, network, (way, levels) in product(seeds, networks, LEVELS.items()):
        for level in levels:
            yield Cell(network, way, level, seed)


def images(folder: str) -> tuple[Dataset, Dataset]:
    """Those that are tested in the second one are of the training set, and in no other."""
    data = load("cifar10", folder).limited(TRAINED + HELD_OUT)
    tested = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))[:TESTED]
    held_out = {"test_x": data.train_x[TRAINED:], "test_y": data.train_y[TRAINED:]}
    shown = {"train_x": data.train_x[:TRAINED], "train_y": data.train_y[:TRAINED]}
    test = {"test_x": data.test_x[tested], "test_y": data.test_y[tested]}  # files come class by class
    return replace(data, **shown, **test), replace(data, **shown, **held_out)


def kept(model: nn.Module, masks: drive.Masks | None) -> dict[str, float]:
    """The shares of the weights and of their multiply-adds that are left."""
    weights = prunable(model)
    example = torch.zeros(1, 3, 32, 32)
    costs = multiply_adds(model.eval(), weights, lambda: model(example), 1, op="benchmark")
    left = {name: weight.numel() for name, weight in weights.items()}
    entries = sum(left.values())
    for name, mask in (masks or {}).items():
        left[name] = int(mask.sum())
    return {"density": sum(left.values()) / entries, "macs": work(costs, left) / dense_work(costs, weights)}


def run(cell: Cell, data: Dataset, held_out: Dataset, folder: Path) -> dict[str, Any]:
    batches, recipe = Batches(data, BATCH, cell.seed), Recipe(EPOCHS, 0.1, BATCH)
    torch.manual_seed(seed_of("budget", cell.seed))
    model = Network(cell.network, 10, 3, 32).build()
    compute = Compute(channels_last=True)
    warm = folder / f"{cell.network}-warm-{cell.seed}.pt"
    if warm.exists():
        model.load_state_dict(load_tensors(warm)["model"])
    else:
        train(model, batches, recipe, epochs=range(WARMUP), compute=compute)
        save_tensors(warm, {"model": model.state_dict()})
    masks = cell.prune(model.train(), batches.endless("prune", lambda: None))
    if masks is not None:
        compute = Compute(channels_last=True, sparse_ops=True)
        masks.save(folder / f"{cell.name}.safetensors")
    train(model, batches, recipe, epochs=range(WARMUP, EPOCHS), compute=compute, masks=masks)
    found = {
        name: evaluate(model, Batches(some, BATCH, cell.seed), compute) / len(some.test_y)
        for name, some in {"accuracy": data, "held out": held_out}.items()
    }
    return {**asdict(cell), **kept(model, masks), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    data, held_out = images(options.data_dir)
    for cell in cells(options.networks.split(","), [int(seed) for seed in options.seeds.split(",")]):
        path = options.out / f"{cell.name}.json"
        if not path.exists():
            write_json(path, run(cell, data, held_out, options.out))
            found = read_json(path)
            print(f"{cell}: {found['macs']:.4f} {found['density']:.4f} {found['accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
