"""The figures of the paper, of our own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import mean, stdev

from drive.figures import figure_of, save_figure

from .cell import Cell
from .grids import Grid, Key
from .queue import Outcome
from .tables import Numbers

# parts of a cell's time, from the bottom of a bar to its top
PARTS = {
    "warmup_seconds": ("dense warm-up", "C7"),
    "round_seconds": ("training in order to prune", "C3"),
    "prune_seconds": ("scoring and pruning", "C1"),
    "train_seconds": ("training of the sparse network", "C0"),
}


def draw_accuracy(grid: Grid, methods: Sequence[str], outcome: Outcome[Cell], path: Path) -> None:
    """PNG: accuracy against sparsity, a panel per row, a line per method with a band of one deviation."""
    numbers = Numbers(grid, outcome)
    figure = figure_of(6.4 * len(grid.rows), 4.4)
    for axes, row in zip(figure.subplots(1, len(grid.rows), squeeze=False)[0], grid.rows, strict=True):
        sparsities = grid.sparsities_of(row)
        places = range(len(sparsities))  # evenly spaced: the interesting ones crowd near 1
        for index, method in enumerate(methods):
            groups = [numbers.accuracies(Key(row.name, method, s)) for s in sparsities]
            known = [(place, values) for place, values in zip(places, groups, strict=True) if values]
            means = [mean(values) for _, values in known]
            deviation = [stdev(values) if len(values) > 1 else 0.0 for _, values in known]
            at, color = [place for place, _ in known], f"C{index}"
            axes.plot(at, means, marker="o", color=color, label=method)
            low = [m - d for m, d in zip(means, deviation, strict=True)]
            high = [m + d for m, d in zip(means, deviation, strict=True)]
            axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
            if method in row.published:
                published = [row.published[method].accuracy.get(s, nan) for s in sparsities]
                axes.plot(places, published, "x", color=color)
        if dense := numbers.accuracies(Key(row.name, "dense", 0.0)):
            axes.axhline(mean(dense), color="black", linestyle="--", label="not pruned")
        if row.published:
            axes.plot([], [], "x", color="black", label="published")
        axes.set_xticks(list(places), [f"{100 * s:g}" for s in sparsities])
        axes.set_xlabel("weights pruned in %")
        axes.set_ylabel("top-1 test accuracy in %")
        axes.set_title(_title(f"{row.model} on {row.data}", grid), fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_time(grid: Grid, methods: Sequence[str], outcome: Outcome[Cell], path: Path) -> None:
    """PNG: seconds of pruning and training, a panel per row, a bar per method (mean over sparsities)."""
    numbers = Numbers(grid, outcome)
    figure = figure_of(5.6 * len(grid.rows), 4.2)
    for axes, row in zip(figure.subplots(1, len(grid.rows), squeeze=False)[0], grid.rows, strict=True):
        bottom = [0.0] * (len(methods) + 1)
        names = ["dense", *methods]
        for part, (label, color) in PARTS.items():
            heights = []
            for name in names:
                sparsities = (0.0,) if name == "dense" else grid.sparsities_of(row)
                keys = [Key(row.name, name, s) for s in sparsities]
                heights.append(numbers.seconds(keys, [part]) or 0.0)
            axes.bar(names, heights, 0.7, bottom=bottom, color=color, label=label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axes.set_ylabel("seconds")
        axes.set_title(_title(f"{row.model} on {row.data}", grid), fontsize=10)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def _title(what: str, grid: Grid) -> str:
    seeds = f"{grid.seeds} seeds" if grid.seeds > 1 else "one seed"
    scaled = f"\nSCALED: {100 * grid.scale:g} % of epochs and images" if grid.scale != 1 else ""
    return f"{what}, {seeds}{scaled}"
