"""Inference of a sparse network by `drive.sparse.freeze`, beside its rivals: `drive sparse-bench`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from drive.figures import figure_of, save_figure
from drive.masks import Masks

from . import rivals
from .rivals import DENSE, OURS
from .turns import Spread, burst, in_turns

ROUNDS = 7
TOLERATED = 1e-4  # by so much of its largest entry may an output in float32 differ


@dataclass(frozen=True)
class Race:
    """How long everyone took, how far from the dense network's the outputs were; who was absent, and why."""

    seconds: dict[str, Spread]
    differences: dict[str, float]
    absent: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def notes(self) -> Iterator[str]:
        """Who is not to be compared, in a line each."""
        for name, why in self.absent.items():
            yield f"{name} did not run: {why}"
        for name, difference in self.differences.items():
            if not difference <= TOLERATED:
                yield f"{name} computes something else: its output differs by {difference:.1e} of the largest"


def race(model: nn.Module, masks: Masks, example: Tensor, rounds: int = ROUNDS) -> Race:
    """Compare the outputs, then measure everyone in turns.

    Args:
        model: in eval mode, its pruned weights 0.
        masks: of it.
        example: a batch.
        rounds: a burst of everyone in each (turns.py).
    """
    with torch.inference_mode():
        expected = model(example)
    runs = {OURS: rivals.ours(model, masks, example)}
    absent: dict[str, str] = {}
    for name, make in DENSE.items():
        run = rivals.made(make, model, example)
        if isinstance(run, str):
            absent[name] = run
        else:
            runs[name] = run
    differences = {name: rivals.difference(run(), expected) for name, run in runs.items()}
    seconds = in_turns({name: burst(run) for name, run in runs.items()}, rounds)
    return Race(seconds, differences, absent)


def table(found: Race, title: str) -> Table:
    """A row for each, the fastest first."""
    result = Table(title=title, min_width=78)
    result.add_column("inference")
    for heading in ("ms", "quartiles", "times ours", "difference"):
        result.add_column(heading, justify="right")
    for name, time in sorted(found.seconds.items(), key=lambda item: item[1].median):
        result.add_row(
            name,
            f"{1e3 * time.median:.3g}",
            f"{1e3 * time.low:.3g} - {1e3 * time.high:.3g}",
            f"{time.median / found.seconds[OURS].median:.2f}",
            f"{found.differences[name]:.0e}",
        )
    return result


def draw(milliseconds: dict[str, float], title: str, path: Path) -> None:
    """PNG: a bar for each, from zero; ours in colour.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = figure_of(8.0, 0.8 + 0.4 * len(milliseconds))
    axes = figure.subplots()
    names = list(milliseconds)
    colors = ["C0" if name == OURS else "C7" for name in names]
    bars = axes.barh(names, list(milliseconds.values()), color=colors)
    axes.bar_label(bars, fmt="%.3g ms", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False, labelbottom=False, left=False)
    axes.set_title(title, fontsize=11)
    save_figure(figure, path)
