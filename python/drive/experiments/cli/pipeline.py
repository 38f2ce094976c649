"""`drive pipeline`: sparsity in every stage of training, taken apart."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from drive.experiments.paper.queue import Experiment
from drive.experiments.pipeline import page, plots
from drive.experiments.pipeline.grid import Numbers, PipelineGrid
from drive.experiments.pipeline.rows import ALL, METHODS, ROWS, MaskOptions, Row
from drive.experiments.pipeline.trainer import work
from drive.experiments.runs import inputs
from drive.experiments.runs.folder import make_folder
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.progress import bars
from drive.experiments.runs.stored import write_json
from drive.experiments.training.compute import Compute, deterministic
from drive.files import write_atomic

from .console import conclude
from .options import Device, Fractions, Names, Precision, TensorBoard, file, option
from .paper import loader


def _switch(name: str, what: str) -> Any:
    return option(name, f"{what} [default: with and without]", inputs.one_of(("on", "off")), "on|off")


def pipeline(
    rows: Annotated[
        Names | None,
        option("--rows", f"out of {', '.join(ROWS)} [default: digits-mlp]", inputs.several_of(ROWS), "A,B"),
    ] = None,
    init: Annotated[str | None, _switch("--init", "ZerO initialisation")] = None,
    mask: Annotated[str | None, _switch("--mask", "a learned mask before pruning")] = None,
    smooth: Annotated[str | None, _switch("--smooth", "soft labels and activations after pruning")] = None,
    skips: Annotated[str | None, _switch("--skips", "soft skips after pruning")] = None,
    baselines: Annotated[
        Names | None,
        option("--baselines", f"out of {', '.join(METHODS)} [default: each row's]",
               inputs.several_of(METHODS), "A,B"),
    ] = None,
    sparsities: Annotated[
        Fractions | None,
        option("--sparsities", "fractions of zeros [default: each row's]", inputs.sparsities, "X,Y"),
    ] = None,
    seeds: Annotated[int, option("--seeds", "runs with seeds 0..N-1", inputs.seeds)] = 3,
    scale: Annotated[float, option("--scale", "fraction of the epochs", inputs.fraction, "X")] = 1.0,
    limit_train: Annotated[
        int | None, option("--limit-train", "training images [default: each row's]", inputs.whole_number(2))
    ] = None,
    forward: Annotated[
        str, option("--forward", "expectation, sample or round: of the mask [default: expectation]",
                    inputs.one_of(("expectation", "sample", "round")), "NAME"),
    ] = "expectation",
    through_mask: Annotated[
        bool, typer.Option("--through-mask", help="theta gets the gradient of theta m, not that of m = 1")
    ] = False,
    density: Annotated[
        float, option("--density", "factor of the penalty for open masks", inputs.not_negative, "X")
    ] = 3.0,
    undecided: Annotated[
        float, option("--undecided", "factor of the penalty for undecided masks", inputs.not_negative, "X")
    ] = 3.0,
    delay: Annotated[
        float, option("--delay", "part of the epochs before the penalties", inputs.not_negative, "X")
    ] = 0.0,
    ramp: Annotated[
        float, option("--ramp", "part of the epochs in which they grow", inputs.not_negative, "X")
    ] = 0.0,
    mask_lr: Annotated[
        float, option("--mask-lr", "learning rate of the logits", inputs.positive, "X")
    ] = 0.1,
    forwards: Annotated[
        bool, typer.Option("--forwards", help="compare the six ways to learn a mask, too (MLPs)")
    ] = False,
    budget: Annotated[
        float | None,
        option("--budget", "minutes after which no cell is begun [default: none]", inputs.positive),
    ] = None,
    data_dir: Annotated[
        Path | None,
        file("--data-dir", "folder with the data sets (cifar10, mnist, ...), or one of them", "DIR"),
    ] = None,
    device: Device = None,
    precision: Precision = None,
    tensorboard: TensorBoard = False,
    out: Annotated[
        Path, file("--out", "folder of cells and page [default: runs/pipeline]", "DIR")
    ] = Path("runs/pipeline"),
) -> None:  # fmt: skip
    """Sparsity in every stage of training (arXiv 2312.01653), each stage on or off, and methods beside it.

    Without arguments: an MLP on scikit-learn's digits, all sixteen combinations, three seeds, some minutes
    on a CPU. The folder then holds pipeline.md, pipeline.json, figures, and all cells; the same command goes
    on after a kill.

    Examples:

        drive pipeline

        drive pipeline --init off --forwards

        drive pipeline --rows digits-mlp,cifar10-vgg16-narrow --data-dir data --budget 60
    """
    deadline = time.monotonic() + 60 * (budget or math.inf)
    inputs.require("matplotlib.figure")  # now, not after hours of training
    switches = {"init": init, "mask": mask, "smooth": smooth, "skips": skips}
    chosen = [
        _changed(ROWS[name].scaled(scale), switches, baselines, sparsities, limit_train)
        for name in rows or ["digits-mlp"]
    ]
    options = MaskOptions(forward, not through_mask, density, undecided, delay, ramp, mask_lr)
    grid = PipelineGrid(chosen, seeds, options, forwards, Compute(device or "cpu", precision or "float32"))
    make_folder(out)
    # small images give threads nothing to do but wait; with one, numbers do not depend on the cores there are
    deterministic(1 if all(row.data in ("digits", "mnist") for row in chosen) else torch.get_num_threads())
    console = Console()
    experiment = Experiment(out, grid.cells, loader(data_dir, console), tensorboard=tensorboard, work=work)
    with bars(console) as progress:
        outcome = experiment.run(progress, deadline=deadline)
    if not outcome.results and len(reasons := set(outcome.failures.values())) == 1:
        raise InputError(reasons.pop())
    numbers = Numbers(grid, outcome)
    figures: dict[str, list[str]] = {row.name: [] for row in grid.rows}
    for row in grid.rows:
        for name, draw in (("accuracy", plots.draw_accuracy), ("layers", plots.draw_layers)):
            figure = f"pipeline-{row.name}-{name}.png"
            if draw(row, numbers, out / figure):
                figures[row.name].append(figure)
    text = page.markdown(numbers, figures)
    write_json(out / "pipeline.json", [_without_layers(result) for result in outcome.results.values()])
    write_atomic(out / "pipeline.md", text.encode())
    for cell, why in outcome.failures.items():
        console.print(f"failed: {cell.title}: {why}", highlight=False)
    conclude("pipeline", outcome, text, out, console)


def _changed(
    row: Row,
    switches: dict[str, str | None],
    baselines: list[str] | None,
    sparsities: list[float] | None,
    limit: int | None,
) -> Row:
    """A row as the options have it.

    Raises:
        InputError: no combination of stages is left.
    """
    wanted = {stage: value == "on" for stage, value in switches.items() if value}
    base = ALL if wanted else row.stages  # a row that has some of them only, asked for others
    stages = tuple(s for s in base if all(getattr(s, stage) == value for stage, value in wanted.items()))
    return replace(
        row, stages=stages, baselines=row.baselines if baselines is None else tuple(baselines),
        keep=tuple(round(1 - s, 6) for s in sparsities) if sparsities else row.keep,
        limit=limit or row.limit,
    )  # fmt: skip


def _without_layers(result: dict[str, Any]) -> dict[str, Any]:
    """Those are in layers.csv of each training."""
    return {name: value for name, value in result.items() if name != "layers"}
