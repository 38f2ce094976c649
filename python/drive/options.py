"""The options that commands share, and what they are where the user does not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from . import data, inputs, models
from .inputs import InputError
from .runs import Options

Parsed = TypeVar("Parsed")


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


_names = ", ".join(data.NAMES)
Data = Annotated[
    str | None, option("--data", f"{_names} [default: digits]", inputs.one_of(data.NAMES), "NAME")
]
DataDir = Annotated[
    Path | None,
    file("--data-dir", "images: train/CLASS/* and test/CLASS/* (or val); or CIFAR-10's folder", "DIR"),
]
Model = Annotated[
    str | None,
    option(
        "--model", f"{', '.join(models.names())} [default: small_cnn for digits, else resnet18]",
        inputs.one_of(models.names()), "NAME",
    ),
]  # fmt: skip
Epochs = Annotated[
    int | None, option("--epochs", "epochs in all [default: digits 20, else 30]", inputs.whole_number(1))
]
BatchSize = Annotated[
    int | None, option("--batch-size", "images in a batch [default: 128]", inputs.whole_number(2))
]
LearningRate = Annotated[
    float | None,
    option("--lr", "learning rate at its peak [default: the network's own]", inputs.positive, "X"),
]
Device = Annotated[
    str | None, option("--device", "cpu, cuda or cuda:N [default: cpu]", inputs.device, "NAME")
]
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
    """The options that the user gave, as they are stored."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in options.items()
        if value is not None
    }


def with_shared_defaults(options: Options) -> Options:
    """`options` completed by what `drive prune` and `drive train` have in common."""
    digits = options.get("data", "digits") == "digits"
    model = options.get("model", "small_cnn" if digits else "resnet18")
    return {
        "data": "digits",
        "data_dir": None,
        "limit_train": None,
        "model": model,
        "epochs": 20 if digits else 30,
        "batch_size": 128,
        "lr": models.default_lr(model),
        "device": "cpu",
        # 8x8 images give threads nothing to do but wait; and with one thread the numbers do not
        # depend on how many cores there are
        "threads": 1 if digits else torch.get_num_threads(),
        **options,
    }
