"""An epoch of a sparse ResNet-18, dense with masks and on the sparse ops: the same losses, other seconds.

python -m benchmarks.cpu.sparse.epoch --data-dir IMAGES --out docs/results/sparse-epoch.md

IMAGES: train/CLASS/* and test/CLASS/* of 32x32 (CIFAR-10, say). All networks start from the same weights,
pruned by DRIVE, and see the same batches in turns; the figure goes beside the page.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn
from torch.nn import functional as F

import drive
from drive.experiments.bench.step import machine
from drive.experiments.data.batches import Batches
from drive.experiments.data.sources import load
from drive.experiments.training.networks import Network
from drive.figures import figure_of, save_figure
from drive.files import write_atomic

WINDOW = 20  # steps that a point of the figure is the mean of

PAGE = """# An epoch of a sparse ResNet-18

{machine}

{images:,} images of {folder}, batch {batch}, {sparsity:.1%} pruned by DRIVE: the same weights and batches,
dense with masks, the same in channels_last, and on `drive.sparse.convert(deterministic=True)`. All three do
the same arithmetic in another order, which training magnifies with every step; the second shows by how much.

| | seconds | mean loss | first {window} steps | last {window} | first 10 differ by | means of {window} by |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

The differences are the largest ones, to the dense network. Its own loss has a standard deviation of
{noise:.3f} over the last 50 steps.

![losses]({figure})
"""


class Contestant:
    """A copy of the model, running as `way` makes of it."""

    def __init__(self, model: nn.Module, masks: drive.Masks, way: Callable[[nn.Module], nn.Module]):
        model = copy.deepcopy(model)
        self.losses, self.seconds = list[float](), 0.0
        self.running = way(model).train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        masks.attach(model, self.optimizer)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.running(images), labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - begin


def smooth(losses: list[float]) -> list[float]:
    return [mean(losses[i : i + WINDOW]) for i in range(len(losses) - WINDOW + 1)]


def row(name: str, contestant: Contestant, dense: list[float]) -> str:
    losses = contestant.losses
    means = [mean(losses), mean(losses[:WINDOW]), mean(losses[-WINDOW:])]
    early = max(abs(a - b) for a, b in zip(losses[:10], dense, strict=False))
    late = max(abs(a - b) for a, b in zip(smooth(losses), smooth(dense), strict=True))
    cells = [f"{contestant.seconds:.0f}", *(f"{x:.4f}" for x in means), f"{early:.1e}", f"{late:.3f}"]
    return f"| {name} | {' | '.join(cells)} |"


def draw(contestants: dict[str, Contestant], path: Path) -> None:
    figure = figure_of(8.0, 4.0)
    axes = figure.subplots()
    for (name, contestant), line in zip(contestants.items(), ("-", ":", "--"), strict=True):
        axes.plot(smooth(contestant.losses), line, label=f"{name}, {contestant.seconds:.0f} s")
    axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, metavar="PAGE")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--limit", type=int, help="training images [default: all]")
    options = parser.parse_args()
    torch.set_num_threads(2)
    data = load("imagefolder", str(options.data_dir))
    data = data.limited(options.limit) if options.limit else data
    batches = Batches(data, options.batch, seed=0)
    torch.manual_seed(0)
    model = Network("resnet18", data.classes, data.channels, data.side).build()
    stream = batches.endless("prune", lambda: None)
    masks = drive.prune(model, stream, F.cross_entropy, sparsity=options.sparsity, iterations=50)
    example = torch.zeros(options.batch, data.channels, data.side, data.side)
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "dense": lambda m: m,
        "dense, channels_last": lambda m: m.to(memory_format=torch.channels_last),
        "sparse ops": lambda m: drive.sparse.convert(m, masks, example, deterministic=True),
    }
    contestants = {name: Contestant(model, masks, way) for name, way in ways.items()}
    for step, batch in enumerate(batches.epoch(0)):
        for contestant in contestants.values():
            contestant.step(*batch)
        if step % 10 == 0:
            print(step, [f"{c.losses[-1]:.4f} {c.seconds:.1f} s" for c in contestants.values()], flush=True)
    draw(contestants, options.out.with_suffix(".png"))
    dense = contestants["dense"].losses
    page = PAGE.format(
        machine=machine(), images=len(data.train_y), folder=options.data_dir.name, batch=options.batch,
        sparsity=options.sparsity, window=WINDOW, figure=options.out.with_suffix(".png").name,
        rows="\n".join(row(name, contestant, dense) for name, contestant in contestants.items()),
        noise=stdev(dense[-50:]),
    )  # fmt: skip
    write_atomic(options.out, page.encode())


if __name__ == "__main__":
    main()
