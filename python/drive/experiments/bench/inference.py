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
            milliseconds(time.median),
            f"{milliseconds(time.low)} - {milliseconds(time.high)}",
            f"{time.median / found.seconds[OURS].median:.2f}",
            f"{found.differences[name]:.0e}",
        )
    return result


def milliseconds(seconds: float) -> str:
    """Three digits, or all before the point."""
    value = 1e3 * seconds
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def draw(seconds: dict[str, Spread], title: str, path: Path) -> None:
    """PNG: a bar for the milliseconds of each, from zero; ours in colour.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = figure_of(8.0, 0.8 + 0.4 * len(seconds))
    axes = figure.subplots()
    times = [time.median for time in seconds.values()]
    bars = axes.barh(list(seconds), times, color=["C0" if name == OURS else "C7" for name in seconds])
    axes.bar_label(bars, [f"{milliseconds(time)} ms" for time in times], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False, labelbottom=False, left=False)
    axes.set_title(title, fontsize=11)
    save_figure(figure, path)
