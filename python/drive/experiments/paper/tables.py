"""Tables beside the published ones, as Markdown; what is scaled, missing or failed says so in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, stdev

from drive.experiments.training import macs
from drive.experiments.training.recipe import Recipe, Steps

from .cell import Cell
from .grids import ITERATIONS, POWERS, WARMUPS, Grid, Key, grid_name
from .published import Row
from .queue import Outcome
from .work import Result

# pruning as the paper counts its seconds: all that comes before the sparse network is trained
BEFORE_TRAINING = ("warmup_seconds", "round_seconds", "prune_seconds")


class Numbers:
    """The results of a grid's cells, by what several seeds have in common."""

    def __init__(self, grid: Grid, outcome: Outcome[Cell]):
        self.grid, self._outcome = grid, outcome

    def results(self, key: Key) -> list[Result]:
        """Of the seeds that are finished."""
        found = self._outcome.results
        return [found[cell] for cell in self.grid.groups.get(key, []) if cell in found]

    def failed(self, key: Key) -> bool:
        return any(cell in self._outcome.failures for cell in self.grid.groups.get(key, []))

    def accuracies(self, key: Key) -> list[float]:
        """In %, of the seeds that are finished."""
        return [100 * r["correct"] / r["tested"] for r in self.results(key)]

    def seconds(self, keys: Sequence[Key], parts: Sequence[str]) -> float | None:
        """Of some parts of a cell's work, the mean over cells; None: none is finished."""
        values = [sum(r[part] for part in parts) for key in keys for r in self.results(key)]
        return mean(values) if values else None

    def shown(self, key: Key, published: float | None = None) -> str:
        """Mean and deviation, and beside it what is published and the difference; `*`: scaled."""
        values = self.accuracies(key)
        if not values:
            return "failed" if self.failed(key) else "-"
        text = f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
        if self.grid.scale != 1:
            text += " *"
        if len(values) < self.grid.seeds:
            text += f" [{len(values)} of {self.grid.seeds} seeds]"
        if published is not None:
            text += f" ({published:.2f}, {mean(values) - published:+.2f})"
        return text

    def line(self, names: Sequence[str], keys: Sequence[Key]) -> str:
        """A row of a table: its names, what is `shown` of each key, and what is left of the multiply-adds."""
        return line([*names, *map(self.shown, keys), macs.cell(map(self.results, keys))])


def against_paper(title: str, grid: Grid, methods: Sequence[str], outcome: Outcome[Cell]) -> str:
    """Methods against each other and against what is published, row by row of the paper."""
    numbers, lines = Numbers(grid, outcome), [f"# {title}", "", *_warning(grid)]
    lines += [
        f"Top-1 test accuracy in %, {_over(grid)}; in brackets the "
        "published mean of three runs, and ours minus that. Seconds: all that comes before the sparse "
        "network is trained (dense warm-up, levels of IMP, scoring), mean over the sparsities. "
        f"{macs.NOTE}", "",
        *_made_with(grid, outcome),
    ]  # fmt: skip
    for row in grid.rows:
        sparsities = grid.sparsities_of(row)
        dense = Key(row.name, "dense", 0.0)
        lines += _heading(row, numbers)
        lines += [f"Not pruned: {numbers.shown(dense, row.unpruned)}.", ""]
        lines += head(["method", *map(_percent, sparsities), macs.TITLE, "seconds of pruning"])
        seconds: dict[str, float | None] = {}
        for method in methods:
            published = row.published.get(method)
            keys = [Key(row.name, method, s) for s in sparsities]
            shown = [numbers.shown(k, published and published.accuracy.get(k.sparsity)) for k in keys]
            seconds[method] = numbers.seconds(keys, BEFORE_TRAINING)
            time = _seconds(seconds[method], published and published.seconds)
            lines.append(line([method, *shown, macs.cell(map(numbers.results, keys)), time]))
        lines += ["", *_ratio(row, seconds)]
    return "\n".join([*lines, *_failures(outcome)])


def ablation_page(grid: Grid, outcome: Outcome[Cell]) -> str:
    """DRIVE taken apart: its steps, warm-up and iterations, terms of the score."""
    numbers, lines = Numbers(grid, outcome), ["# Ablation", "", *_warning(grid)]
    lines += [f"Top-1 test accuracy in %, {_over(grid)}. {macs.NOTE}", "", *_made_with(grid, outcome)]
    for row in grid.rows:
        sparsities, warmup = grid.sparsities_of(row), grid.warmup_of(row)
        whole = grid_name(warmup, 100)
        lines += _heading(row, numbers)
        lines += [f"Not pruned: {numbers.shown(Key(row.name, 'dense', 0.0))}.", ""]

        def variant_line(
            names: Sequence[str], variant: str, row: Row = row, over: tuple[float, ...] = sparsities
        ) -> str:
            return numbers.line(names, [Key(row.name, variant, s) for s in over])

        heads = [*map(_percent, sparsities), macs.TITLE]
        lines += ["From SNIP to DRIVE:", "", *head(["", *heads])]
        lines += [variant_line([name], name) for name in ("SNIP", "iterative SNIP", "warm-up, one-shot SNIP")]
        lines += [variant_line([f"DRIVE ({warmup} epochs of warm-up, 100 iterations)"], whole), ""]
        for sparsity in sparsities:
            lines += [f"DRIVE to {_percent(sparsity)}: epochs of warm-up against iterations:", ""]
            lines += head(["warm-up", *map(str, ITERATIONS), macs.TITLE])
            for epochs in sorted({*WARMUPS, warmup}):
                keys = [Key(row.name, grid_name(epochs, n), sparsity) for n in ITERATIONS]
                lines.append(numbers.line([str(epochs)], keys))
            lines.append("")
        lines += ["The score, abs(theta)^p * abs(G)^q:", "", *head(["", "p, q", *heads])]
        for name, (p, q) in POWERS.items():
            variant = whole if (p, q) == (2, 2) else name
            lines.append(variant_line(["" if name.startswith("p ") else name, f"{p}, {q}"], variant))
        lines.append("")
    return "\n".join([*lines, *_failures(outcome)])


def _over(grid: Grid) -> str:
    return "one seed" if grid.seeds == 1 else f"mean ± standard deviation of {grid.seeds} seeds"


def _made_with(grid: Grid, outcome: Outcome[Cell]) -> list[str]:
    """What the numbers, and the seconds more so, depend on beside the rows' recipes."""
    found = {
        ", ".join(f"{what} {value}" for what, value in result["made_with"].items())
        for result in outcome.results.values()
    }
    return [f"Made with {'; '.join(sorted(found))}; {grid.compute.arithmetic}.", ""] if found else []


def _warning(grid: Grid) -> list[str]:
    if grid.scale == 1:
        return []
    return [
        f"**\\* Scaled: {100 * grid.scale:g} % of the epochs (dense warm-up and the levels of IMP too) and "
        f"{100 * grid.scale:g} % of the training images: no reproduction of published numbers.**",
        "",
    ]  # fmt: skip


def _heading(row: Row, numbers: Numbers) -> list[str]:
    """What the row is, and on how many images it was trained."""
    recipe = row.recipe.scaled(numbers.grid.scale)
    keys = [key for key in numbers.grid.groups if key.row == row.name]
    counts = {result["train_images"] for key in keys for result in numbers.results(key)}
    images = "".join(f", {count:,} training images" for count in sorted(counts))
    return [f"## {row.model} on {row.data}", "", f"{describe(recipe)}{images}.", ""]


def describe(recipe: Recipe) -> str:
    """A recipe in words."""
    schedule = recipe.schedule
    how = type(schedule).__name__.lower()
    if isinstance(schedule, Steps):
        shift = recipe.epochs / schedule.epochs
        how = ", ".join(f"x {drop:g} at {at * shift:g}" for at, drop in schedule.drops)
    elif rest := asdict(schedule):
        how += " (" + ", ".join(f"{name} {value:g}" for name, value in rest.items()) + ")"
    momentum = f" with momentum {recipe.momentum:g}" if recipe.optimizer == "sgd" else ""
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    return (
        f"{epochs} in batches of {recipe.batch_size}, {recipe.optimizer}{momentum}, "
        f"learning rate {recipe.lr:g} {how}, weight decay {recipe.weight_decay:g}, "
        f"crops padded by {recipe.padding}{', flips' if recipe.flip else ''}"
    )


def _seconds(ours: float | None, published: float | None) -> str:
    text = "-" if ours is None else f"{ours:,.1f}"
    return text if published is None else f"{text} ({published:,.0f})"


def _ratio(row: Row, seconds: dict[str, float | None]) -> list[str]:
    """How many times longer IMP takes than DRIVE."""
    imp, drive = seconds.get("imp"), seconds.get("drive")
    if not imp or not drive:
        return []
    text = f"IMP prunes {imp / drive:.1f} times as long as DRIVE"
    if {"imp", "drive"} <= set(row.published):
        published = row.published["imp"].seconds / row.published["drive"].seconds
        text += f" (published: {published:.1f})"
    return [f"{text}.", ""]


def _failures(outcome: Outcome[Cell]) -> list[str]:
    if not outcome.failures:
        return []
    lines = [f"- {cell.title}: {why}" for cell, why in outcome.failures.items()]
    return ["Failed:", "", *lines, ""]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def head(titles: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(titles), line(["---", *("---:" for _ in titles[1:])])]


def line(parts: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(parts)} |"
