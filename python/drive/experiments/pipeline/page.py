"""The page of `drive pipeline`: tables, what they say of the source's findings, and the figures' places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from drive.experiments.paper.tables import describe, head, line
from drive.experiments.training import macs
from drive.experiments.training.recipe import Recipe

from .grid import Key, Numbers, spread
from .rows import FORWARDS, Row

STAGES = {"init": "ZerO initialisation", "mask": "learned mask", "smooth": "soft labels and activations",
          "skips": "soft skips"}  # fmt: skip
COLLAPSE = 5.0  # points below the worse one of two: more than seeds differ
CHANCE = 15.0  # of ten classes, and a little
SAME = 0.5  # points


def markdown(numbers: Numbers, figures: dict[str, list[str]]) -> str:
    """The page.

    Args:
        figures: files of each row's.
    """
    grid = numbers.grid
    lines = ["# The end-to-end pipeline", "", *_intro(numbers)]
    for row in grid.rows:
        lines += [f"## {row.model} on {row.data}", "", *_setting(row, numbers)]
        lines += _table("stages", [stages.name for stages in row.stages], row, numbers)
        lines += _effects(row, numbers)
        if row.baselines:
            modes = "SNIP, GraSP and SynFlow score in eval mode, DRIVE and RigL in train mode."
            lines += [f"Methods beside it, with the same epochs in all. {modes}", ""]
            lines += _table("method", row.baselines, row, numbers)
        if grid.forwards and row.small:
            lines += _forwards(row, numbers)
        for figure in figures.get(row.name, []):
            lines += [f"![{figure.removesuffix('.png')}]({figure})", ""]
    return "\n".join([*lines, "## The source's findings", "", *findings(numbers), ""])


def findings(numbers: Numbers) -> list[str]:
    """What the source found, and whether these numbers say the same, as list items."""
    rows = numbers.grid.rows
    said = [line for row in rows for keep in row.keep for line in _most(row, keep, numbers)]
    said += [line for row in rows for keep in row.keep for line in _together(row, keep, numbers)]
    said += [line for row in rows for keep in row.keep for line in _winner(row, keep, numbers)]
    easy, hard = ([row for row in rows if (row.data == "cifar10") is it] for it in (False, True))
    said += [line for one in easy for other in hard for line in _easier(one, other, numbers)]
    return said or ["Not enough cells are finished."]


def _most(row: Row, keep: float, numbers: Numbers) -> Iterator[str]:
    effects = {stage: numbers.effects(row, stage, keep) for stage in STAGES}
    known = {stage: mean(values) for stage, values in effects.items() if values}
    others = [value for stage, value in known.items() if stage != "mask"]
    if "mask" in known and others:
        points = ", ".join(f"{STAGES[stage]} {value:+.1f}" for stage, value in known.items())
        verdict = _verdict(known["mask"] - max(others), SAME)
        yield f"- *The learned mask matters most*: {verdict} for {_at(row, keep)} ({points} points)."


def _together(row: Row, keep: float, numbers: Numbers) -> Iterator[str]:
    """Of the stages, and of every way to learn a mask."""
    init = numbers.accuracies(Key(row.name, "init", keep))
    ways = [("the mask", "mask", "init+mask")]
    ways += [(o.name, o.name, f"ZerO, {o.name}") for o in FORWARDS if numbers.grid.forwards]
    said: dict[str, list[str]] = {}
    for name, *labels in ways:
        alone, together = (numbers.accuracies(Key(row.name, label, keep)) for label in labels)
        if init and alone and together:
            verdict = _verdict(min(mean(init), mean(alone)) - mean(together) - COLLAPSE)
            if mean(init) < CHANCE:
                verdict = "cannot be told, for ZerO alone does not train"
            said.setdefault(verdict, []).append(f"{name} {mean(alone):.1f}, with ZerO {mean(together):.1f}")
    if said:
        texts = "; ".join(f"{verdict} ({'; '.join(some)})" for verdict, some in said.items())
        yield (
            f"- *ZerO and the learned mask together collapse*, for {_at(row, keep)}, ZerO alone "
            f"{mean(init):.1f} %: {texts}."
        )


def _winner(row: Row, keep: float, numbers: Numbers) -> Iterator[str]:
    """The best of the pipeline beside the other methods, the best first."""
    means: dict[str, float] = {}
    for label in row.baselines:
        if values := numbers.accuracies(Key(row.name, label, keep)):
            means[label] = mean(values)
    stages = {s.name: numbers.accuracies(Key(row.name, s.name, keep)) for s in row.stages}
    known = {f"the pipeline ({name})": mean(values) for name, values in stages.items() if values}
    if means and known:
        best = max(known, key=lambda name: known[name])
        ranked = sorted({**means, best: known[best]}.items(), key=lambda item: -item[1])
        yield (
            f"- *Which wins*, {_at(row, keep)}: "
            + ", ".join(f"{name} {value:.1f}" for name, value in ranked)
            + "."
        )


def _easier(easy: Row, hard: Row, numbers: Numbers) -> Iterator[str]:
    for keep in sorted({*easy.keep} & {*hard.keep}, reverse=True):
        gains = [numbers.effects(row, "mask", keep) for row in (easy, hard)]
        if all(gains):
            a, b = map(mean, gains)
            yield (
                f"- *The gain of the mask is larger on the easy data*: {_verdict(a - b, SAME)} at "
                f"{100 * keep:g} % kept ({easy.data} {a:+.1f}, {hard.data} {b:+.1f} points)."
            )


def _verdict(margin: float, same: float = 0.0) -> str:
    """`margin`: by how much a finding holds, in points."""
    if abs(margin) < same:
        return f"neither way (within {same:g} points)"
    return "reproduced" if margin > 0 else "contradicted"


def _intro(numbers: Numbers) -> list[str]:
    grid = numbers.grid
    seeds = f"mean ± standard deviation of {grid.seeds} seeds" if grid.seeds > 1 else "one seed"
    made = [r["made_with"] for key in grid.groups for r in numbers.results(key)]
    where = "; ".join(sorted({", ".join(f"{k} {v}" for k, v in found.items()) for found in made}))
    return [
        "The system of arXiv 2312.01653, of which no code is public: ZerO initialisation (`init`), a mask "
        "that "
        "is learned before pruning (`mask`), label smoothing and soft activations (`smooth`) and soft skips "
        "(`skips`) after it. `none` is dense training, pruning by magnitude, training of the rest. All "
        "numbers "
        "are made by `drive pipeline`; what the source leaves open are its options. ZerO draws no random "
        "numbers: its seeds differ in the order of the images alone, so that it deviates less. Test accuracy "
        f"in %, {seeds}; in brackets right after pruning, before the second training. {macs.NOTE}", "",
        f"Made with: {where or 'nothing yet'}.", "",
    ]  # fmt: skip


def _setting(row: Row, numbers: Numbers) -> list[str]:
    recipe: Recipe = row.recipe
    limit = f", {row.limit:,} training images" if row.limit else ""
    options = numbers.grid.options
    mask = (
        f"Mask: {options.name}, density {options.density:g}, undecided {options.undecided:g}, "
        f"logits by Adam, {options.lr:g}"
    )
    late = (
        f", from {options.delay:g} of the epochs on, growing over {options.ramp:g}"
        if options.delay or options.ramp
        else ""
    )
    dense = numbers.shown(Key(row.name, "dense", 1.0))
    return [
        f"Before pruning and after it, each: {describe(recipe)}{limit}. {mask}{late}. Dense, as many epochs "
        "in "
        f"all: {dense}.", "",
    ]  # fmt: skip


def _table(first: str, labels: Sequence[str], row: Row, numbers: Numbers) -> list[str]:
    lines = head([first, *_columns(row), macs.TITLE])
    for label in labels:
        keys = [Key(row.name, label, keep) for keep in row.keep]
        lines.append(line([label, *map(numbers.shown, keys), macs.cell(map(numbers.results, keys))]))
    return [*lines, ""]


def _effects(row: Row, numbers: Numbers) -> list[str]:
    lines = ["What a stage changes, in points: mean ± deviation of all pairs that differ in it alone.", ""]
    lines += head(["stage", *_columns(row)])
    for stage, title in STAGES.items():
        found = [numbers.effects(row, stage, keep) for keep in row.keep]
        lines.append(line([title, *(spread(values, "+") if values else "-" for values in found)]))
    return [*lines, ""]


def _forwards(row: Row, numbers: Numbers) -> list[str]:
    lines = [
        "Ways to learn the mask: what the forward pass multiplies by, and whether theta gets the gradient of "
        "theta m as if m were 1.", "",
    ]  # fmt: skip
    labels = [f"{start}{options.name}" for start in ("", "ZerO, ") for options in FORWARDS]
    return [*lines, *_table("mask", labels, row, numbers)]


def _at(row: Row, keep: float) -> str:
    return f"{row.model} on {row.data} at {100 * keep:g} % kept"


def _columns(row: Row) -> list[str]:
    return [f"{100 * keep:g} % kept" for keep in row.keep]
