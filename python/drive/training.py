"""`drive train`: one network, dense or sparse, in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from .data import Batches, Dataset, seed_of
from .inputs import InputError
from .masks import Masks
from .models import Network
from .runs import Options, load_tensors, write_json
from .train import Checkpoint, Recipe, evaluate, train


def train_network(options: Options, data: Dataset, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train, or go on from `folder/checkpoint.pt`; write that and `folder/report.json`.

    Args:
        options: of `drive train`: model, epochs, batch_size, lr, seed, device; init and masks are
            paths or None.
        data: the images.
        folder: of the run.
        progress: where to show a bar.

    Returns:
        The report: the options, the loss of every epoch, test accuracy and sparsity.

    Raises:
        InputError: initial weights or masks of another model; training diverges.
    """
    data = data.to(options["device"])
    network = Network(options["model"], data.classes, data.channels, data.side)
    torch.manual_seed(seed_of(options["seed"], "initialisation"))
    model = network.build()
    if options["init"] is not None:
        state = load_tensors(Path(options["init"]), "--init")["model"]
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"--init must hold the weights of {network}, got {options['init']}") from error
    masks = None
    if options["masks"] is not None:
        try:
            masks = Masks.load(options["masks"])
            masks.apply_(model)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--masks must be a masks file of {options['model']}, got {options['masks']} ({error})"
            ) from error
        masks = masks.to(options["device"])
    model.to(options["device"])

    batches = Batches(data, options["batch_size"], options["seed"])
    epochs = options["epochs"]
    bar = progress.add_task(f"training {options['model']}", total=epochs * len(batches))
    losses = train(
        model, batches, Recipe(epochs, options["lr"]), epochs=range(epochs), masks=masks,
        checkpoint=Checkpoint(folder / "checkpoint.pt", network.as_dict()),
        on_step=lambda: progress.advance(bar),
    )  # fmt: skip
    report = {
        "config": options,
        "losses": losses,
        "accuracy": evaluate(model, batches) / len(data.test_y),
        "sparsity": masks.sparsity() if masks else 0.0,
    }
    write_json(folder / "report.json", report)
    return report
