"""A page and a figure of what cells.py and speeds.py have found.

python -m benchmarks.cpu.budget.page runs/budget docs/results/budget.md

The rows go beside the page as .json, the figure as .png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.cpu.budget import step
from benchmarks.cpu.budget.cells import (
    ALPHAS,
    BATCH,
    COUNT,
    DENSE,
    EPOCHS,
    HELD_OUT,
    ITERATIONS,
    LEVELS,
    MACS,
    NETWORKS,
    TESTED,
    TRAINED,
    WARMUP,
    Cell,
)  # fmt: skip
from benchmarks.cpu.budget.speeds import LEVEL, MODES, UNTRAINED, UNTRAINED_BATCH
from benchmarks.pages import markdown
from drive.experiments.runs.stored import read_json, write_json
from drive.figures import figure_of, save_figure
from drive.files import write_atomic

TARGET = 4.0  # times as fast as dense
LEFT = "weights left", "multiply-adds left"

PAGE = """# A budget of multiply-adds against a count of weights

{facts}

{trained:,} images of CIFAR-10, {warmup} dense epochs, {iterations} iterations of DRIVE, {rest} epochs with
the masks held (batch {batch}, SGD with one cycle, on the sparse ops); accuracy on {tested:,} test images, and
on {held_out:,} of the training set that were in no batch, by which alpha is chosen; means of seeds and their
standard deviation. "{count}" prunes to a sparsity, "alpha" to a share of the multiply-adds
(`drive.prune(macs=...)`), uniform and ERK to a sparsity with the classifier left dense. Speed: times as fast
as the better of contiguous and channels_last, all networks of a kind in the same turns,
`drive.sparse.convert` for this batch, two threads. It measures what it chooses from, and on a shared machine
now and then chooses badly: a point far off its line is one of these.

{tables}

## At {target:g} times the speed of dense inference

By straight lines between neighbouring levels, over the logarithm of the speed. A dash: no level on one side.

{targets}

## At the same multiply-adds

What alpha 1 has on the test images more than alpha 0, which ranks as "{count}" does.

{gains}

## By which alpha

Accuracy on the images held out, mean of networks and seeds, by the share of the multiply-adds that is left.
1 and 1.5 are as good as each other within the noise, and better than the rest where little is left; 1, the
score per multiply-add, is the default of `drive.prune(macs=)`.

{alphas}

## The same speed on a larger network

torchvision's ResNet-18 for 32x32, untrained, batch {untrained_batch}, {level:.0%} of the weights or of the
multiply-adds left.

{untrained}

![accuracy against speed]({figure})

## What a budget costs the step

`fused_drive_prune` on torchvision's networks for 224x224, {step_level:.0%} of the multiply-adds left, against
the step to the sparsity that it ends at, in turns; medians, and the median of their ratios.

{steps}
"""


@dataclass(frozen=True)
class Row:
    """The cells of all seeds."""

    network: str
    way: str
    level: float
    density: float
    macs: float
    held_out: list[float]
    accuracy: list[float]
    speeds: dict[str, float]


def rows(cells: list[dict[str, Any]], speeds: dict[str, Any]) -> Iterator[Row]:
    order = list(LEVELS)
    cells.sort(key=lambda c: (NETWORKS.index(c["network"]), order.index(c["way"]), -c["level"], c["seed"]))
    for (network, way, level), some in groupby(cells, lambda c: (c["network"], c["way"], c["level"])):
        found = list(some)
        name = Cell(network, way, level, 0).name
        yield Row(
            network, way, level, mean(c["density"] for c in found), mean(c["macs"] for c in found),
            [c["held out"] for c in found], [c["accuracy"] for c in found],
            {mode: 1.0 if way == DENSE else speeds[network][mode].get(name, math.nan) for mode in MODES},
        )  # fmt: skip


def at(target: float, points: Iterable[tuple[float, float]]) -> float | None:
    """What a line through points, over the logarithm of their first number, has at this one."""
    for (x0, y0), (x1, y1) in pairwise(sorted((math.log(x), y) for x, y in points)):
        if x0 <= math.log(target) <= x1:
            return y0 + (y1 - y0) * (math.log(target) - x0) / (x1 - x0)
    return None


def spread(values: list[float]) -> str:
    return f"{mean(values):.1%}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def left(density: float, macs: float) -> list[str]:
    return [f"{density:.1%}", f"{macs:.1%}"]


def faster(speeds: Mapping[str, float]) -> list[str]:
    return [f"{speeds[mode]:.2f}x" for mode in MODES]


def levels(some: list[Row]) -> str:
    return markdown(
        ["", *LEFT, "held out", "accuracy", *MODES],
        [
            [r.way, *left(r.density, r.macs), spread(r.held_out), spread(r.accuracy), *faster(r.speeds)]
            for r in some
        ],
    )


def at_target(found: list[Row]) -> str:
    """Accuracy at TARGET by way, a column a network."""

    def reached(network: str, way: str) -> str:
        some = [row for row in found if (row.network, row.way) == (network, way)]
        accuracy = at(TARGET, [(row.speeds["inference"], mean(row.accuracy)) for row in some])
        return "-" if accuracy is None else f"{accuracy:.1%}"

    ways = [way for way in LEVELS if way != DENSE]
    return markdown(
        ["", *NETWORKS], [[way, *(reached(network, way) for network in NETWORKS)] for way in ways]
    )


def gains(found: list[Row]) -> str:
    """Accuracy that alpha 1 has more than alpha 0, a column a level."""
    accuracy = {(r.network, r.way, r.level): 100 * mean(r.accuracy) for r in found}
    lines = [
        [n, *(f"{accuracy[n, 'alpha 1', m] - accuracy[n, 'alpha 0', m]:+.1f} points" for m in MACS)]
        for n in NETWORKS
    ]
    return markdown(["", *(f"{m:.0%} left" for m in MACS)], lines)


def by_alpha(found: list[Row]) -> str:
    """Held-out accuracy by alpha, a column a level."""
    lines = []
    for way in ALPHAS:
        means = [mean(mean(r.held_out) for r in found if (r.way, r.level) == (way, m)) for m in LEVELS[way]]
        lines.append([way, *(f"{m:.1%}" for m in means), f"{mean(means):.1%}"])
    return markdown(["", *(f"{m:.0%}" for m in MACS), "mean"], lines)


def draw(found: list[Row], path: Path) -> None:
    figure = figure_of(10.0, 4.2 * len(MODES))
    every = [(mode, network) for mode in MODES for network in NETWORKS]
    for axes, (mode, network) in zip(figure.subplots(len(MODES), len(NETWORKS)).flat, every, strict=True):
        for way in LEVELS:
            some = [row for row in found if (row.network, row.way) == (network, way)]
            points = sorted((row.speeds[mode], mean(row.accuracy)) for row in some)
            if way == DENSE and points:
                axes.axhline(100 * points[0][1], color="black", linewidth=0.8, label=way)
            elif points:
                line = "-" if way in ALPHAS else "--"
                axes.plot([x for x, _ in points], [100 * y for _, y in points], f"o{line}", label=way)
        axes.set(xscale="log", xlabel=f"{mode}: times as fast as dense", ylabel="accuracy, %", title=network)
        low, high = axes.get_xlim()
        ticks = [tick for tick in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10) if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    speeds = read_json(options.folder / "speeds.json")
    steps = read_json(options.folder / "step.json")
    cells = [read_json(path) for path in options.folder.glob("*-*.json")]
    found = list(rows(cells, speeds))
    page = PAGE.format(
        facts=", ".join(f"{name} {value}" for name, value in speeds["facts"].items()),
        trained=TRAINED, held_out=HELD_OUT, tested=TESTED, batch=BATCH,
        warmup=WARMUP, iterations=ITERATIONS, rest=EPOCHS - WARMUP, count=COUNT, target=TARGET,
        tables="\n\n".join(f"## {n}\n\n{levels([r for r in found if r.network == n])}" for n in NETWORKS),
        targets=at_target(found), gains=gains(found),
        alphas=by_alpha(found),
        level=LEVEL, untrained_batch=UNTRAINED_BATCH,
        untrained=markdown(
            ["", *LEFT, *MODES],
            [[r["way"], *left(r["density"], r["macs"]), *faster(r)] for r in speeds[UNTRAINED]],
        ),
        figure=options.page.with_suffix(".png").name,
        step_level=step.LEFT,
        steps=markdown(
            ["", "entries", "alpha", "weights left", "to a sparsity", "to a budget", "ratio"],
            [
                [
                    r["network"], f"{r['entries'] / 1e6:.1f} M", f"{r['alpha']:g}", f"{r['density']:.1%}",
                    f"{1e3 * r['plain']:.1f} ms", f"{1e3 * r['budget']:.1f} ms", f"{r['ratio']:.2f}",
                ]
                for r in steps
            ],
        ),
    )  # fmt: skip
    write_json(options.page.with_suffix(".json"), {"cells": cells, "speeds": speeds, "steps": steps})
    draw(found, options.page.with_suffix(".png"))
    write_atomic(options.page, page.encode())


if __name__ == "__main__":
    main()
