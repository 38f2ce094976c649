"""`drive sparse-bench`: a sparse network frozen for inference, and on the sparse ops, beside dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

from drive.experiments.bench import networks
from drive.experiments.bench import step as timing
from drive.experiments.runs import inputs
from drive.experiments.runs.folder import make_folder
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.stored import write_json
from drive.experiments.training.macs import macs_left
from drive.masks import Masks

from .options import file, option

_SPARSITY, _BATCH, _SAVED_BATCH = 0.9, 1, 32


def _network(text: str) -> str:
    try:
        return inputs.one_of(networks.names())(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def sparse_bench(
    network: Annotated[
        str | None,
        typer.Argument(
            parser=_network, metavar="[NETWORK]", show_default=False,
            help=f"{', '.join(networks.names())}: untrained, with uniform masks",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        option("--sparsity", f"fraction of zeros [default: {_SPARSITY}]", inputs.sparsity, "X"),
    ] = None,
    checkpoint: Annotated[
        Path | None, file("--checkpoint", "instead of NETWORK: checkpoint.pt of drive prune or drive train")
    ] = None,
    masks: Annotated[
        Path | None, file("--masks", "its masks.safetensors [default: weights that are 0 are pruned]")
    ] = None,
    batch_size: Annotated[
        int | None,
        option(
            "--batch-size", f"images in a batch [default: {_BATCH}, of a checkpoint {_SAVED_BATCH}]",
            inputs.whole_number(1),
        ),
    ] = None,
    out: Annotated[
        Path | None, file("--out", "folder for sparse.json and the figures", "DIR")
    ] = None,
) -> None:  # fmt: skip
    """Race a sparse network's plan for inference against torch, ONNX Runtime and OpenVINO, all in float32.

    Everyone's output is compared with the dense network's first; then all run in turns. ONNX Runtime and
    OpenVINO take part where they are installed: pip install 'drive-prune[rivals]'. Of a checkpoint, the
    sparse ops are timed too, layer by layer and as a whole, in inference and in training. resnet50,
    mobilenet_v2 and vgg16 are torchvision's, for 224x224; the other networks are for 32x32.

    Examples:

        drive sparse-bench resnet50

        drive sparse-bench resnet18 --sparsity 0.95 --batch-size 32 --out runs/sparse

        drive sparse-bench --checkpoint runs/prune/checkpoint.pt

        drive sparse-bench --checkpoint runs/train/checkpoint.pt --batch-size 1 --out runs/sparse
    """
    from drive.experiments.bench.sparse import MODES, Saved

    _check(network, sparsity, checkpoint, masks)
    if out is not None:
        inputs.require("matplotlib.figure")
        make_folder(out)
    console = Console()
    if network is not None:
        model, its_masks, shape = networks.sparse_network(
            network, _SPARSITY if sparsity is None else sparsity
        )
        _inference(network, model, its_masks, shape, batch_size or _BATCH, console, out)
        return
    assert checkpoint is not None
    saved, batch_size = Saved(checkpoint, masks), batch_size or _SAVED_BATCH
    shape = (saved.network.channels, saved.network.side, saved.network.side)
    race = _inference(saved.network.name, saved.model.eval(), saved.masks, shape, batch_size, console, out)
    found = {}
    for mode in MODES:
        with console.status(f"measuring {mode}"):
            found[mode] = saved.convert(mode, batch_size)
        console.print(f"\n{mode}, {batch_size} images a batch", highlight=False)
        console.print(str(found[mode]), highlight=False, soft_wrap=True)
    if out is not None:
        write_json(out / "sparse.json", {"race": race} | {mode: one.as_dict() for mode, one in found.items()})
        for mode, one in found.items():
            one.draw(out / f"{mode}.png", f"{saved.network.name}, {mode}, {batch_size} images a batch")


def _check(network: str | None, sparsity: float | None, checkpoint: Path | None, masks: Path | None) -> None:
    if (network is None) == (checkpoint is None):
        got = "neither" if network is None else "both"
        raise InputError(f"NETWORK or --checkpoint must be given, got {got}")
    if network is None and sparsity is not None:
        raise InputError(f"--sparsity must be left out with --checkpoint, got {sparsity:g}")
    if network is not None and masks is not None:
        raise InputError(f"--masks must be left out without --checkpoint, got {masks}")


def _inference(
    name: str,
    model: nn.Module,
    masks: Masks,
    shape: tuple[int, ...],
    batch: int,
    console: Console,
    out: Path | None,
) -> dict[str, Any]:
    """The race: its table, its figure, and sparse.json as long as nothing else is in it."""
    from drive.experiments.bench import inference

    console.print(timing.machine(), highlight=False)
    example = networks.noise(batch, shape)
    left = macs_left(model, masks, example)
    title = f"{name}, {masks.sparsity():.1%} pruned, {left:.1%} of the multiply-adds left, batch {batch}"
    with console.status("measuring inference"):
        found = inference.race(model, masks, example)
    console.print(inference.table(found, title))
    for note in found.notes():
        console.print(note, highlight=False, soft_wrap=True)
    if out is not None:
        write_json(out / "sparse.json", {"race": found.as_dict()})
        inference.draw(found.seconds, title, out / "race.png")
        console.print(f"results in {out}", highlight=False)
    return found.as_dict()
