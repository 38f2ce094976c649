"""Channels pruned by several methods, networks shrunk and trained: the paper's claim in small, as a page.

python -m benchmarks.cpu.structured --data-dir cifar10.tar.gz --out runs/structured docs/results/structured.md

Runs `drive compare --structure channels` on the digits and on CIFAR-10, and goes on where it was killed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import facts
from drive.__main__ import main as drive
from drive.experiments.paper.report import markdown
from drive.experiments.runs.stored import read_json
from drive.files import write_atomic

METHODS = "early_crop,snip,magnitude,random"
CIFAR10 = "--data cifar10 --limit-train 10000 --epochs 12 --warmup-epochs 2 --seeds 3 --sparsities 0.8,0.95"
RUNS = {
    "digits": "--seeds 5 --sparsities 0.5,0.8,0.9,0.95",
    "cnn4": f"{CIFAR10} --model cnn4",
    "resnet8": f"{CIFAR10} --model resnet8",
}

PAGE = """# Smaller networks

`drive compare --structure channels --methods {methods}`: channels are pruned, networks
shrunk (`drive.shrink`), and trained. {facts}.

EarlyCroP trains dense until its rule says so, prunes by gate scores, and trains the smaller network in full;
SNIP by nodes and random prune at the initialisation; magnitude by nodes after the dense warm-up, whose epochs
are the first of its training. All scores are taken in eval mode, as EarlyCroP's authors do. Percentages are
of the nodes (channels, units) but those of the outputs: of as many nodes methods leave different numbers of
parameters and multiply-adds. Memory is counted, not sampled: weights, gradients, the optimizer's state and
what the forward pass keeps for the backward pass, of one batch. Seconds are of a shared machine. Energy is
that of the whole processor by its own counter (RAPL); a dash: the machine does not let it be read.

{parts}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--runs", default=",".join(RUNS), help="which to run before the page is written")
    parser.add_argument("page", type=Path)
    options = parser.parse_args(arguments)
    for name in filter(None, options.runs.split(",")):
        run(name, options.out / name, options.data_dir)
    done = [name for name in RUNS if (options.out / name / "report.json").exists()]
    parts = "\n".join(part(name, options.out / name, options.page) for name in done)
    said = ", ".join(f"{name} {value}" for name, value in facts("cpu").items())
    write_atomic(options.page, PAGE.format(methods=METHODS, facts=said, parts=parts).encode())


def run(name: str, folder: Path, data: str) -> None:
    """From where it is."""
    if (folder / "report.json").exists():
        return
    words = ["compare", "--structure", "channels", "--methods", METHODS, *RUNS[name].split()]
    if (folder / "config.json").exists():
        words = ["compare", "--resume"]
    elif "cifar10" in words:
        words += ["--data-dir", data]
    if drive([*words, "--out", str(folder)]):
        raise SystemExit(f"{name}: drive compare failed")


def part(name: str, folder: Path, page: Path) -> str:
    """A run's section of the page; its figure is put beside the page."""
    report: dict[str, Any] = read_json(folder / "report.json")
    figure = page.with_name(f"{page.stem}-{name}.png")
    shutil.copyfile(folder / "accuracy.png", figure)
    config = report["config"]
    return (
        f"## {config['model']} on {config['data']}\n\n{report['images']['train']:,} images, "
        f"{config['threads']} thread(s), {config['epochs']} epochs, "
        f"of which {config['warmup_epochs']} before magnitude prunes.\n\n"
        f"{markdown(report, read_json(folder / 'timing.json'))}\n![accuracy]({figure.name})\n"
    )


if __name__ == "__main__":
    main()
