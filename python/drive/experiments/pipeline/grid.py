"""The cells of `drive pipeline`, and their numbers by what several seeds have in common."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from drive.experiments.paper.cell import Cell
from drive.experiments.paper.goal import Goal
from drive.experiments.paper.queue import Outcome
from drive.experiments.paper.variants import dense
from drive.experiments.paper.work import Result
from drive.experiments.training.compute import Compute

from .cell import PipelineCell
from .rows import FORWARDS, MaskOptions, Row, Stages


class Key(NamedTuple):
    """What the cells of several seeds have in common.

    Attributes:
        label: a name of stages, of a method, or of a way to learn a mask; "dense".
        keep: 1 where nothing is pruned.
    """

    row: str
    label: str
    keep: float


class PipelineGrid:
    """All cells: of each row those of the stages first, and of these the first seed's."""

    def __init__(
        self, rows: Sequence[Row], seeds: int, options: MaskOptions, forwards: bool, compute: Compute
    ):
        self.rows, self.seeds, self.forwards = list(rows), seeds, forwards
        self.options, self.compute = options, compute
        self.groups: dict[Key, list[Cell | PipelineCell]] = {}
        for row in rows:
            for seed in range(seeds):
                self._add_row(row, seed)

    @property
    def cells(self) -> list[Cell | PipelineCell]:
        """Each once, though it may be in several groups, in the order in which they are trained."""
        order = []
        for row in self.rows:
            for beside in (False, True):
                groups = [cells for key, cells in self.groups.items()
                          if key.row == row.name and (key.label in row.baselines) is beside]  # fmt: skip
                order += [cells[seed] for seed in range(self.seeds) for cells in groups]
        return list(dict.fromkeys(order))

    def _add_row(self, row: Row, seed: int) -> None:
        whole = Cell(row.data, row.model, dense(), Goal(0.0), seed, row.whole, self.compute, limit=row.limit)
        self._add(Key(row.name, "dense", 1.0), whole)
        for stages in row.stages:
            self._add_pipeline(row, stages.name, stages, self.options, seed)
        for method in row.baselines:
            for keep in row.keep:
                cell = Cell(
                    row.data, row.model, row.variant(method), Goal(round(1 - keep, 6)), seed,
                    row.whole, self.compute, limit=row.limit,
                )  # fmt: skip
                self._add(Key(row.name, method, keep), cell)
        if self.forwards and row.small:
            for options in FORWARDS:
                for init in (False, True):
                    label = f"{'ZerO, ' if init else ''}{options.name}"
                    self._add_pipeline(row, label, Stages(init=init, mask=True), options, seed)

    def _add_pipeline(self, row: Row, label: str, stages: Stages, options: MaskOptions, seed: int) -> None:
        for keep in row.keep:
            cell = PipelineCell(
                row.data, row.model, stages, options, round(1 - keep, 6), seed, row.recipe, self.compute,
                row.limit,
            )  # fmt: skip
            self._add(Key(row.name, label, keep), cell)

    def _add(self, key: Key, cell: Cell | PipelineCell) -> None:
        self.groups.setdefault(key, []).append(cell)


class Numbers:
    """The results of a grid's finished cells."""

    def __init__(self, grid: PipelineGrid, outcome: Outcome[Cell | PipelineCell]):
        self.grid, self._outcome = grid, outcome

    def results(self, key: Key) -> list[Result]:
        found = self._outcome.results
        return [found[cell] for cell in self.grid.groups.get(key, []) if cell in found]

    def accuracies(self, key: Key, what: str = "correct") -> list[float]:
        """In %, of the seeds that are finished; `what`: also "correct_pruned", before the second training."""
        return [100 * result[what] / result["tested"] for result in self.results(key)]

    def shown(self, key: Key) -> str:
        """Mean and deviation; of the pipeline in brackets what was right after pruning."""
        values = self.accuracies(key)
        if not values:
            return "-"
        text = spread(values)
        if len(values) < self.grid.seeds:
            text += f" [{len(values)} of {self.grid.seeds} seeds]"
        if "correct_pruned" in self.results(key)[0]:
            text += f" ({mean(self.accuracies(key, 'correct_pruned')):.1f})"
        return text

    def effects(self, row: Row, stage: str, keep: float) -> list[float]:
        """Accuracy with a stage minus that without it, in points: all pairs that differ in it alone."""
        found = []
        for stages in row.stages:
            if getattr(stages, stage):
                other = Stages(**{**vars(stages), stage: False})
                with_, without = (self._by_seed(Key(row.name, s.name, keep)) for s in (stages, other))
                found += [with_[seed] - without[seed] for seed in with_.keys() & without.keys()]
        return found

    def _by_seed(self, key: Key) -> dict[int, float]:
        return {result["seed"]: 100 * result["correct"] / result["tested"] for result in self.results(key)}


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
