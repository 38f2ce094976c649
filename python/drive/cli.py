"""The command `drive`: options in, run folders out, one clear line for whatever is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import data as datasets
from . import inputs, methods
from .info import facts
from .inputs import InputError
from .options import (
    BatchSize, Data, DataDir, Device, Epochs, LearningRate, LimitTrain, Model, Out, Resume,
    file, given, option, with_shared_defaults,
)  # fmt: skip
from .runs import Options, differences, load_tensors, open_run, write_json

BAD_INPUT, INTERRUPTED = 2, 130
# the root of typer's usage errors, whichever click it stands on
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="DRIVE: prune a neural network before it is trained, and train what is left.",
)


@app.callback(invoke_without_command=True)
def _drive(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def prune(
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    methods: Annotated[
        list[str] | None,
        option("--methods", f"out of {', '.join(methods.names())} [default: all]",
               inputs.several_of(methods.names()), "A,B"),
    ] = None,
    sparsities: Annotated[
        list[float] | None,
        option("--sparsities", "fractions of zeros [default: 0.9,0.95,0.98,0.993]",
               inputs.sparsities, "X,Y"),
    ] = None,
    seeds: Annotated[
        int | None,
        option("--seeds", "runs with seeds 0..N-1 [default: digits 5, else 1]", inputs.whole_number(1)),
    ] = None,
    epochs: Epochs = None,
    warmup_epochs: Annotated[
        int | None,
        option("--warmup-epochs", "of these, dense ones before pruning [default: 5]",
               inputs.whole_number(0)),
    ] = None,
    iterations: Annotated[
        int | None,
        option("--iterations", "DRIVE's pruning iterations [default: 100]", inputs.whole_number(1)),
    ] = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    device: Device = None,
    limit_train: LimitTrain = None,
    out: Out = None,
    resume: Resume = False,
) -> None:  # fmt: skip
    """Prune a network by DRIVE, SNIP and magnitude, train the rest, compare with the dense one.

    Without arguments: scikit-learn's handwritten digits and a small CNN, some two minutes on a CPU.
    The folder then holds report.json, timing.json, accuracy.png, layers.png, and, of DRIVE's network
    at the highest sparsity (first seed), checkpoint.pt and masks.safetensors.

    Examples:

        drive prune

        drive prune --resume

        drive prune --data cifar10 --model vgg16_bn --device cuda --seeds 3 --out runs/vgg

        drive prune --data imagefolder --data-dir photos --sparsities 0.9,0.98 --limit-train 2000
    """
    options = given(
        data=data, data_dir=data_dir, model=model, methods=methods, sparsities=sparsities, seeds=seeds,
        epochs=epochs, warmup_epochs=warmup_epochs, iterations=iterations, batch_size=batch_size, lr=lr,
        device=device, limit_train=limit_train,
    )  # fmt: skip
    with _run("prune", out, resume, options, _prune_defaults) as (folder, settings, console):
        from . import report
        from .experiment import Config, Experiment
        from .train import deterministic

        config = Config.read(settings)
        deterministic(config.threads)
        experiment = Experiment(config, _load(settings, console), folder)
        report.check_packages()
        with _progress(console) as progress:
            results = experiment.run(progress)
        summary = report.summarise(experiment, results)
        write_json(folder / "timing.json", report.timings(config, results))
        report.draw_accuracy(summary, folder / "accuracy.png")
        report.draw_layers(summary, folder / "layers.png")
        write_json(folder / "report.json", summary)
        console.print(report.table(summary))
        console.print(summary["verdict"], highlight=False)
        console.print(f"results in {folder}", highlight=False)


@app.command()
def train(
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    masks: Annotated[
        Path | None, file("--masks", "masks.safetensors: train this sparse network [default: dense]")
    ] = None,
    init: Annotated[
        Path | None, file("--init", "checkpoint whose weights to start from [default: random ones]")
    ] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, option("--seed", "[default: 0]", inputs.whole_number(0))] = None,
    device: Device = None,
    limit_train: LimitTrain = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Train one network, dense or with the masks that `drive prune` or `drive.prune` made.

    The folder holds checkpoint.pt, whole after every epoch, and at the end report.json.

    Examples:

        drive train

        drive train --masks runs/prune/masks.safetensors --epochs 30

        drive train --data cifar10 --model resnet18 --device cuda --out runs/resnet

        drive train --resume --out runs/resnet
    """
    options = given(
        data=data, data_dir=data_dir, model=model, masks=masks, init=init, epochs=epochs,
        batch_size=batch_size, lr=lr, seed=seed, device=device, limit_train=limit_train,
    )  # fmt: skip
    with _run("train", out, resume, options, _train_defaults) as (folder, settings, console):
        from .train import deterministic
        from .training import train_network

        deterministic(settings["threads"])
        images = _load(settings, console)
        with _progress(console) as progress:
            result = train_network(settings, images, folder, progress)
        console.print(
            f"{100 * result['accuracy']:.2f} % test accuracy at {100 * result['sparsity']:.2f} % pruned; "
            f"results in {folder}", highlight=False,
        )  # fmt: skip


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
    """Run the command line; the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = " ".join(["drive", *words[:1]])
    try:
        return int(app(args=words, prog_name="drive", standalone_mode=False) or 0)
    except UsageError as error:
        return _complain(*_usage_line(error), BAD_INPUT)
    except InputError as error:
        return _complain(command, str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _complain(command, str(error) or "interrupted", INTERRUPTED)
    except OSError as error:
        return _complain(command, str(error), 1)


def _complain(command: str, message: str, status: int) -> int:
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _usage_line(error: Any) -> tuple[str, str]:
    """(command, message) of one of typer's usage errors."""
    command = error.ctx.command_path if error.ctx else "drive"
    if isinstance(error, typer.BadParameter) and error.param:
        return command, f"{error.param.opts[0]} {error.message}"
    return command, error.format_message()


@contextmanager
def _run(
    command: str, out: Path | None, resume: bool, options: Options, complete: Any
) -> Iterator[tuple[Path, Options, Console]]:
    """A new or resumed run; Ctrl-C says how to go on with it."""
    folder, settings = open_run(command, out, resume, options, complete)
    for name, (then, now) in differences(folder).items():
        _complain(f"drive {command}", f"numbers may differ: the run was started with {name} {then}, "
                  f"this is {now}", 0)  # fmt: skip
    try:
        yield folder, settings, Console()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; go on with: drive {command} --resume --out {folder}"
        ) from None


def _load(settings: Options, console: Console) -> datasets.Dataset:
    with console.status(f"loading {settings['data']}"):
        data = datasets.load(settings["data"], settings["data_dir"])
    if data.skipped:
        shown = ", ".join(data.skipped[:5]) + (", ..." if len(data.skipped) > 5 else "")
        console.print(f"left out {len(data.skipped)} images that cannot be read: {shown}", highlight=False)
    limit = settings["limit_train"]
    return data if limit is None else data.limited(limit)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip


def _prune_defaults(options: Options) -> Options:
    complete = with_shared_defaults({
        "methods": methods.names(),
        "sparsities": [0.9, 0.95, 0.98, 0.993],
        "seeds": 5 if options.get("data", "digits") == "digits" else 1,
        "warmup_epochs": 5,
        "iterations": 100,
        **options,
    })  # fmt: skip
    if complete["warmup_epochs"] >= complete["epochs"]:
        raise InputError(
            f"--warmup-epochs must be fewer than the {complete['epochs']} epochs, "
            f"got {complete['warmup_epochs']}"
        )
    return complete


def _train_defaults(options: Options) -> Options:
    defaults: Options = {"seed": 0, "masks": None, "init": None}
    if "init" in options and "model" not in options:
        network = load_tensors(Path(options["init"]), "--init").get("network", {})
        defaults |= {"model": network["name"]} if "name" in network else {}
    return with_shared_defaults({**defaults, **options})
