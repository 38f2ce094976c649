"""How much faster the networks of cells.py are than dense ones, on the sparse ops; and ResNet-18, untrained.

python -m benchmarks.cpu.budget.speeds --data-dir cifar10.tar.gz --out runs/budget

All networks of a kind run in the same turns, with the masks of the first seed: others leave as much work.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

import drive
from benchmarks.cpu.budget.cells import BATCH, DENSE, LEVELS, NETWORKS, Cell, images, kept
from benchmarks.pages import facts
from drive.experiments.data.batches import Batches
from drive.experiments.runs.stored import read_json, write_json
from drive.experiments.training.networks import Network
from drive.sparse import convert
from drive.sparse.measure import CHANNELS_LAST, model_times

MODES = {"inference": False, "training step": True}
UNTRAINED, UNTRAINED_BATCH, LEVEL = "resnet18", 32, 0.05


def times(
    model: nn.Module, masks: Mapping[str, drive.Masks], shape: tuple[int, ...], training: bool
) -> dict[str, float]:
    """How many times faster than the better one of two dense networks, by the names of the masks."""
    example = torch.randn(shape)
    model.train(training)
    ways = {name: convert(model, some, example) for name, some in masks.items()}
    found = model_times({DENSE: model, CHANNELS_LAST: model, **ways}, (example,), training)
    best = min(found[DENSE], found[CHANNELS_LAST])
    return {name: best / found[name] for name in masks}


def trained(network: str, folder: Path) -> dict[str, drive.Masks]:
    every = (Cell(network, way, level, 0) for way, levels in LEVELS.items() for level in levels)
    paths = {cell.name: folder / f"{cell.name}.safetensors" for cell in every}
    return {name: drive.Masks.load(path) for name, path in paths.items() if path.exists()}


def untrained(batches: Batches) -> Iterator[tuple[str, drive.Masks, dict[str, float]]]:
    """Masks at one level, in every way, and what they leave."""
    torch.manual_seed(0)
    weights = Network(UNTRAINED, 10, 3, 32).build().state_dict()
    for way in LEVELS:
        model = Network(UNTRAINED, 10, 3, 32).build()
        model.load_state_dict(weights)
        masks = Cell(UNTRAINED, way, LEVEL, 0).prune(model, batches.endless("prune", lambda: None))
        if masks is not None:
            yield way, masks, kept(model, masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(2)
    path = options.out / "speeds.json"
    found = read_json(path) if path.exists() else {}
    found["facts"] = {**facts("cpu"), "threads": torch.get_num_threads()}

    for network in NETWORKS:
        model = Network(network, 10, 3, 32).build()
        masks = trained(network, options.out)
        found[network] = {m: times(model, masks, (BATCH, 3, 32, 32), on) for m, on in MODES.items()}
        write_json(path, found)
        print(network, found[network], flush=True)

    batches = Batches(images(options.data_dir)[0], UNTRAINED_BATCH, 0)
    every = {way: (masks, left) for way, masks, left in untrained(batches)}
    model, masks = Network(UNTRAINED, 10, 3, 32).build(), {way: some for way, (some, _) in every.items()}
    speeds = {m: times(model, masks, (UNTRAINED_BATCH, 3, 32, 32), on) for m, on in MODES.items()}
    found[UNTRAINED] = [
        {"way": way, **left, **{mode: speeds[mode][way] for mode in MODES}}
        for way, (_, left) in every.items()
    ]
    write_json(path, found)


if __name__ == "__main__":
    main()
