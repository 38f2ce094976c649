"""Which cells a table or a figure takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from drive import methods
from drive.experiments.runs.inputs import InputError
from drive.experiments.training.compute import Compute

from .cell import Cell
from .goal import Goal
from .published import Row
from .variants import Variant, dense

FIGURE5 = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
WARMUPS, ITERATIONS = (0, 1, 2, 5, 10), (1, 10, 100)

# How DRIVE's score falls apart: |theta|^p * |G|^q, by (p, q). Magnitude is (1, 0), connection sensitivity
# (1, 1), convergence sensitivity (0, 1); their product ranks as its root does.
POWERS = {
    "whole score": (2, 2),
    "without convergence sensitivity": (2, 1),
    "without connection sensitivity": (1, 1),
    "without magnitude": (1, 2),
    "p 1 q 0": (1, 0),
    "p 0 q 1": (0, 1),
    "p 3 q 1": (3, 1),
    "p 1 q 3": (1, 3),
}


class Key(NamedTuple):
    """What the cells of several seeds have in common."""

    row: str
    variant: str
    sparsity: float


@dataclass
class Grid:
    """Cells in the order in which they are trained: of a row the first seed's come first."""

    rows: list[Row]
    seeds: int
    scale: float
    sparsities: tuple[float, ...] | None = None  # None: those of each row
    compute: Compute = field(default_factory=Compute)
    cells: list[Cell] = field(default_factory=list)
    groups: dict[Key, list[Cell]] = field(default_factory=dict)

    def sparsities_of(self, row: Row) -> tuple[float, ...]:
        return self.sparsities or row.sparsities

    def warmup_of(self, row: Row) -> int:
        """DRIVE's, in this grid's fraction of the epochs."""
        return dense(row.warmup).scaled(self.scale).warmup

    def add(self, row: Row, variants: Sequence[Variant]) -> None:
        """Add a row: the dense network, and the variants, which are scaled already, at all sparsities."""
        first = dense(self.warmup_of(row))
        for seed in range(self.seeds):
            self._add(row, first, 0.0, seed)
            for variant in variants:
                for sparsity in self.sparsities_of(row):
                    self._add(row, variant, sparsity, seed)

    def _add(self, row: Row, variant: Variant, sparsity: float, seed: int) -> None:
        recipe = row.recipe.scaled(self.scale)
        if variant.warmup >= recipe.epochs:
            raise InputError(
                f"--scale must leave epochs after the dense warm-up, got {self.scale:g} "
                f"({row.name}: {recipe.epochs} epochs, {variant.warmup} of warm-up)"
            )
        cell = Cell(row.data, row.model, variant, Goal(sparsity), seed, recipe, self.compute, self.scale)
        self.cells.append(cell)
        self.groups.setdefault(Key(row.name, variant.name, sparsity), []).append(cell)


def pruned_by(row: Row, method: str) -> Variant:
    """A method as the paper has it; one that it does not have, by its own defaults."""
    if method == "imp":
        return Variant(method, method, iterations=row.levels, rounds=row.level_epochs)
    found = methods.get(method)
    iterations = found.iterations if found.iterations > 1 else None
    return Variant(method, method, row.warmup if found.stage == "warm-up" else 0, iterations)


def compared(grid: Grid, names: Sequence[str]) -> Grid:
    """The tables and figures of the paper: methods against each other."""
    for row in grid.rows:
        grid.add(row, [pruned_by(row, name).scaled(grid.scale) for name in names])
    return grid


def ablated(grid: Grid) -> Grid:
    """What of DRIVE matters: its parts, warm-up and iterations, and the terms of its score.

    The warm-ups of the grid are not scaled. Those that leave nothing to train after them are left out.
    """
    for row in grid.rows:
        epochs = row.recipe.scaled(grid.scale).epochs
        grid.add(row, [v for v in ablation(grid.warmup_of(row)) if v.warmup < epochs])
    return grid


def ablation(warmup: int) -> list[Variant]:
    """All variants, around DRIVE with this warm-up; each is there once, though several tables show it."""
    steps = [
        Variant("SNIP", "snip"),
        Variant("iterative SNIP", "snip", iterations=100),
        Variant("warm-up, one-shot SNIP", "snip", warmup),
    ]
    warmups = sorted({*WARMUPS, warmup})
    grid = [Variant(grid_name(w, n), "drive", w, n) for w in warmups for n in ITERATIONS]
    whole = next(v for v in grid if (v.warmup, v.iterations) == (warmup, 100))
    terms = [replace(whole, name=name, powers=powers) for name, powers in POWERS.items() if powers != (2, 2)]
    return [*steps, *grid, *terms]


def grid_name(warmup: int, iterations: int) -> str:
    """DRIVE with other numbers than its own."""
    return f"DRIVE {warmup} warm-up {iterations} iterations"
