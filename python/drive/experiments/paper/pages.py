"""The tables and figures of the paper: of what each is made, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drive.experiments.runs.stored import write_json
from drive.files import write_atomic

from . import plots, tables
from .cell import Cell
from .grids import FIGURE5, Grid, ablated, compared
from .published import TABLE1, TABLE2
from .queue import Outcome


@dataclass(frozen=True)
class Page:
    """A table or a figure: what it is made of unless the user says otherwise."""

    name: str
    title: str
    rows: list[str]
    sparsities: tuple[float, ...] | None = None  # None: those of each row
    figure: str | None = None  # "accuracy" or "time", drawn beside the table
    ablation: bool = False

    @property
    def help(self) -> str:
        """For --help."""
        return f"""{self.title} of the paper, resumable: cells that are finished are never run again.

    A cell is a network on a data set, pruned in one way to one sparsity, from one seed. The same command
    goes on after a kill or a budget; commands with the same --out share their cells, and so do several
    processes, one on each GPU say. The folder holds {self.name}.md, {self.name}.json and all cells.

    Examples:

        drive {self.name} --device cuda --data-dir data

        drive {self.name} --rows cifar10-cnn4 --scale 0.2 --data-dir data --budget 30
    """

    def grid(self, grid: Grid, names: list[str]) -> Grid:
        return ablated(grid) if self.ablation else compared(grid, names)

    def write(self, folder: Path, grid: Grid, names: list[str], outcome: Outcome[Cell]) -> str:
        """The page as Markdown, all results as JSON, the figure; gives back the Markdown."""
        if self.ablation:
            text = tables.ablation_page(grid, outcome)
        else:
            text = tables.against_paper(self.title, grid, names, outcome)
        if self.figure:
            draw = {"accuracy": plots.draw_accuracy, "time": plots.draw_time}[self.figure]
            draw(grid, names, outcome, folder / f"{self.name}.png")
            text += f"\n![{self.title}]({self.name}.png)\n"
        write_json(folder / f"{self.name}.json", list(outcome.results.values()))
        write_atomic(folder / f"{self.name}.md", text.encode())
        return text


_ALEXNET = ["cifar10-alexnet"]
PAGES = {
    page.name: page
    for page in (
        Page("table1", "Table 1", [row.name for row in TABLE1]),
        Page("table2", "Table 2", [row.name for row in TABLE2]),
        Page("figure5", "Figure 5: accuracy against sparsity", _ALEXNET, FIGURE5, "accuracy"),
        Page("figure6", "Figure 6: time to prune and to train", _ALEXNET, (0.98,), "time"),
        Page("ablation", "Ablation", _ALEXNET, (0.95, 0.98), ablation=True),
    )
}
