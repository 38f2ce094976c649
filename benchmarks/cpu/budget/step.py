"""What a budget costs the fused step: with costs and without, in turns.

python -m benchmarks.cpu.budget.step --out runs/budget
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torchvision import models

import drive
from drive.experiments.runs.stored import write_json
from drive.targets.multiply_adds import dense_work, multiply_adds_on
from drive.targets.targets import prunable

LEFT = 0.05
NETWORKS = {"resnet18": models.resnet18, "vgg16": models.vgg16}  # 11 M and 138 M entries
ALPHAS = 0.0, 1.0


def measure(network: str, rounds: int) -> list[dict[str, Any]]:
    """Medians of the step to a budget and to the sparsity that it ends at, on fresh weights."""
    torch.manual_seed(0)
    model = NETWORKS[network](weights=None)
    weights = prunable(model)
    costs = multiply_adds_on(model, weights, torch.zeros(1, 3, 224, 224), op="benchmark")
    grads = {name: torch.randn_like(weight) for name, weight in weights.items()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    max_cost = round(LEFT * dense_work(costs, weights))

    def taken(goal: Mapping[str, Any]) -> tuple[float, drive.PruneResult]:
        with torch.no_grad():
            for weight, old in zip(weights.values(), start.values(), strict=True):
                weight.copy_(old)
        begin = time.perf_counter()
        result = drive.fused_drive_prune(weights, grads, **goal)
        return time.perf_counter() - begin, result

    found = []
    for alpha in ALPHAS:
        budget = {"costs": costs, "max_cost": max_cost, "alpha": alpha}
        last = taken(budget)[1]  # as in a loop, new masks replace those of the last call
        plain, times = {"sparsity": last.sparsity}, []
        for _ in range(rounds):
            both = []
            for goal in (plain, budget):
                seconds, last = taken(goal)
                both.append(seconds)
            times.append(both)
        found.append({
            "network": network, "entries": last.total, "alpha": alpha, "density": last.kept / last.total,
            "plain": median(t[0] for t in times), "budget": median(t[1] for t in times),
            "ratio": median(t[1] / t[0] for t in times),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = [row for network in NETWORKS for row in measure(network, options.rounds)]
    write_json(options.out / "step.json", found)
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
