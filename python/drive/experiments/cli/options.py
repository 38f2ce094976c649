"""The options that commands share, and what they are where the user does not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NewType, TypeVar

import torch
import typer

from drive import methods
from drive.experiments.data import sources
from drive.experiments.runs import inputs
from drive.experiments.runs.folder import Options
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.stored import load_tensors, reading
from drive.experiments.training import networks
from drive.experiments.training.compute import PRECISIONS
from drive.plan import DEFAULT_ALPHA
from drive.targets.structures import CHANNELS

Parsed = TypeVar("Parsed")
# typer would take an option that is a plain list as one to be given several times
Names = NewType("Names", list[str])
Fractions = NewType("Fractions", list[float])


def option(name: str, help: str, parser: Callable[[str], Parsed], metavar: str = "N") -> Any:
    """A typer option whose values `parser` reads; what that rejects becomes a usage error."""

    def parse(text: str) -> Parsed:
        try:
            return parser(text)
        except InputError as error:
            raise typer.BadParameter(str(error)) from error

    return typer.Option(name, help=help, parser=parse, metavar=metavar, show_default=False)


def file(name: str, help: str, metavar: str = "FILE") -> Any:
    """A typer option that is a path."""
    return typer.Option(name, help=help, metavar=metavar, show_default=False)


_names = ", ".join(sources.NAMES)
Data = Annotated[
    str | None, option("--data", f"{_names} [default: digits]", inputs.one_of(sources.NAMES), "NAME")
]
DataDir = Annotated[
    Path | None,
    file("--data-dir", "train/CLASS/* and test/CLASS/* (or val), also as .tar.gz; or CIFAR's folder", "DIR"),
]
Model = Annotated[
    str | None,
    option(
        "--model", f"{', '.join(networks.names())} [default: small_cnn for digits, else resnet18]",
        inputs.one_of(networks.names()), "NAME",
    ),
]  # fmt: skip
Epochs = Annotated[
    int | None, option("--epochs", "epochs in all [default: digits 20, else 30]", inputs.whole_number(1))
]
Alpha = Annotated[
    float | None,
    option(
        "--alpha", f"with --macs, rank by score / cost^alpha [default: {DEFAULT_ALPHA:g}]",
        inputs.not_negative, "X",
    ),
]  # fmt: skip
Structure = Annotated[
    str | None,
    option(
        "--structure", "unstructured, or channels: networks are shrunk [default: unstructured]",
        inputs.one_of(("unstructured", CHANNELS)), "NAME",
    ),
]  # fmt: skip
BatchSize = Annotated[
    int | None, option("--batch-size", "images in a batch [default: 128]", inputs.whole_number(2))
]
LearningRate = Annotated[
    float | None,
    option("--lr", "learning rate at its peak [default: the network's own]", inputs.positive, "X"),
]
SparseOps = Annotated[
    bool,
    typer.Option("--sparse-ops", help="train pruned layers with their surviving weights only, where it pays"),
]
Device = Annotated[
    str | None, option("--device", "cpu, cuda or cuda:N [default: cpu]", inputs.device, "NAME")
]
Devices = Annotated[
    int | None,
    option("--devices", "GPUs that share a training, from --device on [default: 1]", inputs.whole_number(1)),
]
Precision = Annotated[
    str | None,
    option("--precision", "float32 or bfloat16 [default: float32]", inputs.one_of(PRECISIONS), "NAME"),
]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="memory format of images")]
Compile = Annotated[bool, typer.Option("--compile", help="train with torch.compile")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="write logs for TensorBoard, too")]
LimitTrain = Annotated[
    int | None,
    option("--limit-train", "training images to use, for a quick try [default: all]", inputs.whole_number(2)),
]
Out = Annotated[
    Path | None, file("--out", "folder for the results [default: runs/COMMAND, or the next free one]", "DIR")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="go on with the run in --out [default: the latest one]")
]


def given(**options: Any) -> Options:
    """The options that the user gave, as they are stored; a flag that is not set was not given."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in options.items()
        if value is not None and value is not False
    }


def compare_defaults(options: Options) -> Options:
    """The options of `drive compare`, completed; as `prune_defaults`."""
    able = [name for name in methods.names() if "macs" not in options or _ranks_all(name)]
    return prune_defaults({"methods": able, "seeds": 3, **options})


def _ranks_all(method: str) -> bool:
    """Together, as a budget needs it."""
    return methods.get(method).scope == "global"


def prune_defaults(options: Options) -> Options:
    """The options of `drive prune`, completed.

    Raises:
        InputError: no epoch is left after the warm-up; options that do not go together.
    """
    to_macs = _to_macs(options, "sparsities")
    complete = _completed({
        "methods": ["drive", "snip", "magnitude"],
        "sparsities": [] if to_macs else [0.9, 0.95, 0.98, 0.993],
        "macs": [],
        "alpha": DEFAULT_ALPHA if to_macs else None,
        "structure": "unstructured",
        "prior": 0.0,
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
    other = complete["structure"] != "unstructured" or to_macs
    if complete["prior"] and (other or complete["prior"] >= 1):
        raise InputError(
            "--prior must be a share below 1, without --structure and --macs, got "
            f"{complete['prior']:g}{' with one of them' if other else ''}"
        )
    if complete["prior"] or complete["structure"] != "unstructured":
        inputs.require("torch_pruning")
    unable = [name for name in complete["methods"] if not _ranks_all(name)]
    if to_macs and unable:
        raise InputError(f"--methods must rank all layers together with --macs, got {', '.join(unable)}")
    return complete


def train_defaults(options: Options) -> Options:
    """The options of `drive train`, completed; the model is that of --init, if there is one.

    Raises:
        InputError: --init is no checkpoint; options that do not go together.
    """
    defaults: Options = {
        "seed": 0, "masks": None, "sparsity": None, "macs": None, "method": "drive",
        "structure": "unstructured", "init": None, "devices": 1, "precision": "float32",
        "alpha": DEFAULT_ALPHA if _to_macs(options, "masks") else None, "channels_last": False,
        "compile": False, "tensorboard": False,
    }  # fmt: skip
    goals = [name for name in ("masks", "sparsity", "macs") if name in options]
    if len(goals) > 1:
        raise InputError(f"--{goals[1]} must be left out with --{goals[0]}, got both")
    if how := [name for name in ("method", "structure") if name in options]:
        if not goals or goals == ["masks"]:
            raise InputError(f"--{how[0]} must come with --sparsity or --macs, got {options[how[0]]} alone")
        if options.get("structure") == CHANNELS:
            inputs.require("torch_pruning")
    if "init" in options and "model" not in options:
        path = Path(options["init"])
        network = load_tensors(path, "--init").get("network")
        if network:  # those of others say nothing
            with reading(path, "the weights of a network", argument="--init"):
                defaults |= {"model": str(network["name"])}
    return _completed({**defaults, **options})


def _to_macs(options: Options, other: str) -> bool:
    """Is a share of the multiply-adds asked for?

    Raises:
        InputError: the other option is given too, or --alpha alone.
    """
    if "macs" in options and other in options:
        raise InputError(f"--macs must be left out with --{other}, got both")
    if "alpha" in options and "macs" not in options:
        raise InputError(f"--alpha must be left out without --macs, got {options['alpha']:g}")
    return "macs" in options


def _completed(options: Options) -> Options:
    """`options` and the defaults of those that all commands have."""
    digits = options.get("data", "digits") == "digits"
    model = options.get("model", "small_cnn" if digits else "resnet18")
    return {
        "data": "digits",
        "data_dir": None,
        "limit_train": None,
        "model": model,
        "epochs": 20 if digits else 30,
        "batch_size": 128,
        "lr": networks.default_lr(model),
        "sparse_ops": False,
        "device": "cpu",
        # 8x8 images give threads nothing to do but wait; and with one thread the numbers do not
        # depend on how many cores there are
        "threads": 1 if digits else torch.get_num_threads(),
        **options,
    }
