"""The command `drive`: options in, run folders out, one clear line for whatever is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from drive import methods
from drive.experiments.bench.step import SIZES
from drive.experiments.paper.pages import PAGES
from drive.experiments.runs import inputs
from drive.experiments.runs.folder import make_folder
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.progress import bars
from drive.experiments.runs.stored import digest_of, write_json

from .comparison import comparison
from .console import BAD_INPUT, complain, interrupted, load, open_console
from .ends import outlets, signals_interrupt
from .info import facts
from .options import (
    Alpha,
    BatchSize,
    ChannelsLast,
    Compile,
    Data,
    DataDir,
    Device,
    Devices,
    Epochs,
    Fractions,
    LearningRate,
    LimitTrain,
    Model,
    Out,
    Precision,
    Resume,
    SparseOps,
    Structure,
    TensorBoard,
    file,
    given,
    option,
    train_defaults,
)
from .paper import reproduce
from .pipeline import pipeline
from .sparse_bench import sparse_bench

# the root of typer's usage errors, whichever click it stands on
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Commands(typer.core.TyperGroup):
    def invoke(self, context: typer.Context) -> Any:  # type: ignore[override]
        """Say that a command was interrupted, if it has not said so itself; typer would not."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise interrupted(f"drive {context.invoked_subcommand}", error) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="DRIVE: prune a neural network before it is trained, and train what is left.",
)


@app.callback(invoke_without_command=True)
def _drive(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for page in PAGES.values():
    app.command(page.name, help=page.help)(reproduce)
app.command(
    "prune",
    help="""Prune a network by DRIVE, SNIP and magnitude, train the rest, compare with the dense one.

    Without arguments: scikit-learn's handwritten digits and a small CNN, about a minute on a CPU.
    The folder then holds report.json, timing.json, tables.md, accuracy.png, layers.png, time.png, and, of
    DRIVE's sparsest network (first seed), checkpoint.pt and masks.safetensors.

    Examples:

        drive prune

        drive prune --resume

        drive prune --data cifar10 --model vgg16_bn --device cuda --seeds 3 --out runs/vgg

        drive prune --macs 0.1,0.05 --alpha 0.5

        drive prune --data imagefolder --data-dir photos --sparsities 0.9,0.98 --limit-train 2000
    """,
)(comparison)
app.command(
    "compare",
    help="""Compare all pruning methods, also those that prune in the course of a training.

    As `drive prune`, with every method and three seeds.

    Examples:

        drive compare

        drive compare --methods drive,snip,synflow,imp --sparsities 0.9,0.98 --seeds 3

        drive compare --structure channels --methods early_crop,snip --sparsities 0.5,0.9

        drive compare --resume
    """,
)(comparison)


app.command("pipeline")(pipeline)
app.command("sparse-bench")(sparse_bench)


@app.command()
def train(
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    masks: Annotated[
        Path | None, file("--masks", "masks.safetensors: train this sparse network [default: dense]")
    ] = None,
    sparsity: Annotated[
        float | None,
        option("--sparsity", "instead of masks: prune at first to this share of zeros", inputs.sparsity, "X"),
    ] = None,
    macs: Annotated[
        float | None,
        option("--macs", "or to this share of the multiply-adds", inputs.fraction, "X"),
    ] = None,
    alpha: Alpha = None,
    method: Annotated[
        str | None,
        option("--method", "by which to prune [default: drive]", inputs.one_of(methods.names()), "NAME"),
    ] = None,
    structure: Structure = None,
    init: Annotated[
        Path | None, file("--init", "checkpoint whose weights to start from [default: random ones]")
    ] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    precision: Precision = None,
    channels_last: ChannelsLast = False,
    compile: Compile = False,
    sparse_ops: SparseOps = False,
    seed: Annotated[int | None, option("--seed", "[default: 0]", inputs.whole_number(0))] = None,
    device: Device = None,
    devices: Devices = None,
    limit_train: LimitTrain = None,
    tensorboard: TensorBoard = False,
    out: Out = None,
    resume: Resume = False,
) -> None:  # fmt: skip
    """Train one network, dense, with the masks that `drive prune` or `drive.prune` made, or pruned at first.

    The folder holds checkpoint.pt and log.csv, whole after every epoch, and at the end report.json; of a
    network that was shrunk also small.safetensors, for `drive.rebuild`.

    Examples:

        drive train

        drive train --masks runs/prune/masks.safetensors --epochs 30

        drive train --init runs/train/checkpoint.pt --macs 0.1 --out runs/sparse

        drive train --method early_crop --structure channels --sparsity 0.9 --out runs/small

        drive train --data cifar10 --model resnet18 --device cuda --precision bfloat16 --out runs/resnet

        drive train --resume --out runs/resnet
    """
    options = given(
        data=data, data_dir=data_dir, model=model, masks=masks, sparsity=sparsity, macs=macs, alpha=alpha,
        method=method, structure=structure, init=init,
        epochs=epochs, batch_size=batch_size, lr=lr, precision=precision, channels_last=channels_last,
        compile=compile, sparse_ops=sparse_ops, seed=seed, device=device, devices=devices,
        limit_train=limit_train, tensorboard=tensorboard,
    )  # fmt: skip
    with open_console("train", out, resume, options, train_defaults) as (run, console):
        from drive.experiments.training.command import Training
        from drive.experiments.training.compute import deterministic

        deterministic(run.options["threads"])
        images = load(run.options, console)
        training = Training(run.options, images, run.folder)
        files = {name: digest_of(Path(run.options[name])) for name in ("init", "masks") if run.options[name]}
        run.keep({"data": images.fingerprint, **files})
        with bars(console) as progress:
            result = training.run(progress)
        console.print(
            f"{100 * result['accuracy']:.2f} % test accuracy at {100 * result['sparsity']:.2f} % pruned, "
            f"{100 * result['macs_left']:.2f} % of the multiply-adds left; results in {run.folder}",
            highlight=False,
        )  # fmt: skip


@app.command()
def bench(
    size: Annotated[
        str,
        option("--size", "entries: those of ResNet-18, VGG-16, or two of them", inputs.one_of(SIZES), "NAME"),
    ] = "11M",
    sparsities: Annotated[
        Fractions | None,
        option("--sparsities", "fractions of zeros [default: 0.9]", inputs.sparsities, "X,Y"),
    ] = None,
    rounds: Annotated[int, option("--rounds", "of the quick ones", inputs.whole_number(1))] = 9,
    out: Annotated[Path | None, file("--out", "folder for bench.json and bench.png", "DIR")] = None,
) -> None:
    """Time one pruning step on the CPU against its rivals, on real shapes, validated first.

    11M takes some 20 seconds, 138M two minutes and 10 GB of memory, 300M four and 22 GB: the rivals'.

    Examples:

        drive bench

        drive bench --size 138M --sparsities 0.5,0.9 --out runs/bench
    """
    from drive.experiments.bench import page
    from drive.experiments.bench import step as timing

    if out is not None:
        inputs.require("matplotlib.figure")
        make_folder(out)
    console = Console()
    cases = timing.cases([size], [torch.float32], sparsities or [0.9])
    console.print(timing.machine(), highlight=False)
    measured = []
    with bars(console) as progress:
        for row in progress.track(timing.run(cases, rounds), total=len(cases), description="timing"):
            measured.append(row)
            console.print(page.table(row))
            if out is not None:
                write_json(out / "bench.json", [one.as_dict() for one in measured])
    if out is not None:
        page.draw(measured, out / "bench.png")
        console.print(f"results in {out}", highlight=False)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """What was built, what runs where, and why something does not.

    Examples:

        drive info

        drive info --json
    """
    found = facts()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None)
    for section, entries in found.items():
        table.add_row(f"[bold]{section}[/]", "")
        for name, text in entries.items():
            table.add_row(f"  {name}".replace("[", r"\["), text.replace("[", r"\["))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 for output that cannot be written, 2 for bad input, 130 for
    Ctrl-C, 128 and the number of another signal that ended it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with outlets() as (output, _):
        status = _run(words)
    unread = isinstance(output.error, BrokenPipeError)  # `drive prune | head`: what was wanted was read
    if output.error is None or unread:
        return status
    return status or complain("drive", f"output could not be written: {output.error}", 1)


def _run(words: list[str]) -> int:
    command = " ".join(["drive", *words[:1]])
    try:
        with signals_interrupt():
            return int(app(args=words, prog_name="drive", standalone_mode=False) or 0)
    except UsageError as error:
        return complain(command, _usage_message(error), BAD_INPUT)
    except InputError as error:
        return complain(command, str(error), BAD_INPUT)
    except OSError as error:
        return complain(command, str(error), 1)


def _usage_message(error: Any) -> str:
    """One of typer's usage errors in the words of all others, where it is about an option's value."""
    if isinstance(error, typer.BadParameter) and error.param:
        return f"{error.param.opts[0]} {error.message or 'must be given'}"
    return str(error.format_message())
