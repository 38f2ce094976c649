"""`drive prune` and `drive compare`: the same work, with other defaults."""

from __future__ import annotations

from typing import Annotated

import typer

from drive import methods
from drive.experiments.runs import inputs
from drive.experiments.runs.progress import bars
from drive.experiments.runs.stored import write_json
from drive.files import write_atomic

from .console import load, open_console
from .options import (
    Alpha,
    BatchSize,
    Data,
    DataDir,
    Device,
    Epochs,
    Fractions,
    LearningRate,
    LimitTrain,
    Model,
    Names,
    Out,
    Resume,
    SparseOps,
    Structure,
    compare_defaults,
    given,
    option,
    prune_defaults,
)


def comparison(
    context: typer.Context,
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    methods: Annotated[
        Names | None,
        option("--methods", f"out of {', '.join(methods.names())} "
               "[default: drive prune: drive,snip,magnitude; drive compare: all]",
               inputs.several_of(methods.names()), "A,B"),
    ] = None,
    sparsities: Annotated[
        Fractions | None,
        option("--sparsities", "fractions of zeros [default: 0.9,0.95,0.98,0.993]",
               inputs.sparsities, "X,Y"),
    ] = None,
    macs: Annotated[
        Fractions | None,
        option("--macs", "instead of sparsities: shares of the multiply-adds that are left",
               inputs.shares, "X,Y"),
    ] = None,
    alpha: Alpha = None,
    structure: Structure = None,
    prior: Annotated[
        float | None,
        option("--prior", "share of the channels that go first, before --sparsities of all weights do",
               inputs.fraction, "X"),
    ] = None,
    seeds: Annotated[
        int | None,
        option("--seeds", "runs with seeds 0..N-1 [default: drive prune: digits 5, else 1; drive compare: 3]",
               inputs.seeds),
    ] = None,
    epochs: Epochs = None,
    warmup_epochs: Annotated[
        int | None,
        option("--warmup-epochs", "of these, dense ones before pruning [default: 5]",
               inputs.whole_number(0)),
    ] = None,
    iterations: Annotated[
        int | None,
        option("--iterations", "of DRIVE and SynFlow [default: 100]", inputs.whole_number(1)),
    ] = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    sparse_ops: SparseOps = False,
    device: Device = None,
    limit_train: LimitTrain = None,
    out: Out = None,
    resume: Resume = False,
) -> None:  # fmt: skip
    options = given(
        data=data, data_dir=data_dir, model=model, methods=methods, sparsities=sparsities, macs=macs,
        alpha=alpha, structure=structure, prior=prior, seeds=seeds, epochs=epochs,
        warmup_epochs=warmup_epochs, iterations=iterations, batch_size=batch_size, lr=lr,
        sparse_ops=sparse_ops, device=device, limit_train=limit_train,
    )  # fmt: skip
    command = str(context.info_name)
    defaults = {"prune": prune_defaults, "compare": compare_defaults}[command]
    with open_console(command, out, resume, options, defaults) as (run, console):
        from drive.experiments.paper import report
        from drive.experiments.paper.compare import Comparison, Config
        from drive.experiments.training.compute import deterministic

        config, folder = Config(**run.options), run.folder
        deterministic(config.threads)
        images = load(run.options, console)
        networks = Comparison(config, images, folder)
        inputs.require("matplotlib.figure")  # now, not after hours of training
        run.keep({"data": images.fingerprint})
        with bars(console) as progress:
            results = networks.run(progress)
        summary = report.summarise(networks, results)
        times = report.timings(config, results)
        write_json(folder / "timing.json", times)
        report.draw_accuracy(summary, folder / "accuracy.png")
        report.draw_layers(summary, folder / "layers.png")
        report.draw_time(summary, times, folder / "time.png")
        write_atomic(folder / "tables.md", report.markdown(summary, times).encode())
        write_json(folder / "report.json", summary)
        for table in report.tables(summary, times):
            console.print(table)
        console.print(summary["verdict"], highlight=False)
        console.print(f"results in {folder}", highlight=False)
