"""`drive table1`, `table2`, `figure5`, `figure6`, `ablation`: the paper's experiments, as time permits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from drive import methods
from drive.experiments.data import sources
from drive.experiments.data.dataset import Dataset
from drive.experiments.paper.grids import Grid
from drive.experiments.paper.pages import PAGES
from drive.experiments.paper.published import METHODS, ROWS, Row
from drive.experiments.paper.queue import Experiment
from drive.experiments.runs import inputs
from drive.experiments.runs.folder import make_folder
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.progress import bars
from drive.experiments.training.compute import Compute, deterministic

from .console import conclude, name_skipped
from .options import (
    ChannelsLast,
    Compile,
    Device,
    Devices,
    Fractions,
    Names,
    Precision,
    SparseOps,
    TensorBoard,
    file,
    option,
)

_METHODS = [name for name in methods.names() if name == "imp" or methods.get(name).stage != "training"]


def reproduce(
    context: typer.Context,
    rows: Annotated[
        Names | None,
        option("--rows", f"out of {', '.join(ROWS)} [default: the paper's]", inputs.several_of(ROWS), "A,B"),
    ] = None,
    pruned_by: Annotated[
        Names | None,
        option("--methods", f"out of {', '.join(_METHODS)} [default: {','.join(METHODS)}]",
               inputs.several_of(_METHODS), "A,B"),
    ] = None,
    sparsities: Annotated[
        Fractions | None,
        option("--sparsities", "fractions of zeros [default: the paper's]", inputs.sparsities, "X,Y"),
    ] = None,
    seeds: Annotated[int, option("--seeds", "runs with seeds 0..N-1", inputs.seeds)] = 3,
    scale: Annotated[
        float,
        option("--scale", "fraction of epochs and images; every table says so", inputs.fraction, "X"),
    ] = 1.0,
    budget: Annotated[
        float | None,
        option("--budget", "minutes after which no cell is begun [default: none]", inputs.positive, "N"),
    ] = None,
    pause: Annotated[
        bool, typer.Option("--pause", help="after the budget, leave the cell in hand at the end of an epoch")
    ] = False,
    data_dir: Annotated[
        Path | None,
        file("--data-dir", "folder with the data sets (cifar10, cifar10.tar.gz, ...), or one of them "
             "[default: CIFAR is downloaded]", "DIR"),
    ] = None,
    device: Device = None,
    devices: Devices = None,
    precision: Precision = None,
    channels_last: ChannelsLast = False,
    compile: Compile = False,
    sparse_ops: SparseOps = False,
    momentum: Annotated[
        float | None, option("--momentum", "of SGD [default: 0.9]", inputs.not_negative, "X")
    ] = None,
    weight_decay: Annotated[
        float | None, option("--weight-decay", "[default: 5e-4]", inputs.not_negative, "X")
    ] = None,
    padding: Annotated[
        int | None, option("--padding", "of the random crops [default: 4]", inputs.whole_number(0))
    ] = None,
    no_flip: Annotated[bool, typer.Option("--no-flip", help="do not mirror images")] = False,
    tensorboard: TensorBoard = False,
    out: Annotated[
        Path, file("--out", "folder of cells and pages [default: runs/paper]", "DIR")
    ] = Path("runs/paper"),
) -> None:  # fmt: skip
    deadline = time.monotonic() + 60 * (budget or math.inf)
    page = PAGES[str(context.info_name)]
    changes = {
        "momentum": momentum, "weight_decay": weight_decay, "padding": padding,
        "flip": False if no_flip else None,
    }  # fmt: skip
    chosen = [_changed(ROWS[name], changes) for name in rows or page.rows]
    compute = Compute(
        device or "cpu", precision or "float32", channels_last, compile, sparse_ops, devices or 1
    )
    names = list(pruned_by or METHODS)
    grid = page.grid(
        Grid(chosen, seeds, scale, tuple(sparsities) if sparsities else page.sparsities, compute), names
    )

    if page.figure:
        inputs.require("matplotlib.figure")  # now, not after hours of training
    make_folder(out)
    deterministic(torch.get_num_threads())
    console = Console()
    experiment = Experiment(out, grid.cells, loader(data_dir, console), tensorboard=tensorboard)
    with bars(console) as progress:
        outcome = experiment.run(progress, deadline=deadline, pause=pause)
    if not outcome.results and len(reasons := set(outcome.failures.values())) == 1:
        raise InputError(reasons.pop())  # the same for all: the data are missing, say
    text = page.write(out, grid, names, outcome)
    conclude(page.name, outcome, text, out, console)


def _changed(row: Row, changes: Mapping[str, object]) -> Row:
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(row, recipe=replace(row.recipe, **given))  # type: ignore[arg-type]


def loader(data_dir: Path | None, console: Console) -> Callable[[str], Dataset]:
    """What loads a data set by its name, from that folder."""

    def load(name: str) -> Dataset:
        with console.status(f"loading {name}"):
            found = sources.load(name, sources.locate(name, str(data_dir) if data_dir else None))
        name_skipped(found, console)
        return found

    return load
