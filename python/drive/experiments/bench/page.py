"""What `drive bench` shows: a table a case, and a figure of all."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from drive.figures import figure_of, save_figure

from .step import OURS, Row


def table(row: Row) -> Table:
    """One case of the benchmark: a row per provider."""
    result = Table(title=_case(row), min_width=78)
    result.add_column("one step")
    for heading in ("ms", "times ours", "extra bytes an entry"):
        result.add_column(heading, justify="right")
    for name, seconds in row.seconds.items():
        ratio = seconds / row.seconds[OURS]
        result.add_row(name, f"{1e3 * seconds:.1f}", f"{ratio:.2f}", f"{row.memory[name]:.2f}")
    return result


def draw(rows: list[Row], path: Path) -> None:
    """PNG: milliseconds of a step, a panel per case, a bar per provider, on a logarithmic axis."""
    figure = figure_of(9.0, 0.6 + 1.6 * len(rows))
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False).flatten()
    for axes, row in zip(panels, rows, strict=True):
        names = list(row.seconds)[::-1]
        times = [1e3 * row.seconds[name] for name in names]
        bars = axes.barh(names, times, color=["C0" if name == OURS else "C7" for name in names])
        axes.bar_label(bars, fmt="%.3g ms", padding=3, fontsize=8)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_title(_case(row), fontsize=10)
    save_figure(figure, path)


def _case(row: Row) -> str:
    return f"{row.entries / 1e6:.1f} M entries, {row.case.sparsity:.1%} pruned, {row.case.call}"
