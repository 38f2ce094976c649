"""The figures of `drive pipeline`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from drive.figures import figure_of, save_figure

from .grid import Key, Numbers
from .rows import Row


def draw_accuracy(row: Row, numbers: Numbers, path: Path) -> bool:
    """PNG: accuracy against weights kept, a line for each method and for the telling stages."""
    figure = figure_of(7.0, 4.6)
    axes = figure.subplots()
    stages = [stages.name for stages in row.stages if stages.name in ("none", "mask", "init+mask", "all")]
    for index, label in enumerate([*stages, *row.baselines]):
        groups = {keep: numbers.accuracies(Key(row.name, label, keep)) for keep in row.keep}
        known = {keep: values for keep, values in groups.items() if values}
        means = [mean(values) for values in known.values()]
        errors = [stdev(values) if len(values) > 1 else 0.0 for values in known.values()]
        name, style = (f"pipeline: {label}", "-") if label in stages else (label, "--")
        axes.errorbar(
            list(known), means, errors, fmt=style, marker="o", capsize=2, color=f"C{index}", label=name
        )
    if dense := numbers.accuracies(Key(row.name, "dense", 1.0)):
        axes.axhline(mean(dense), color="black", linewidth=0.9, label="not pruned")
    axes.set_xscale("log")
    axes.set_xticks(list(row.keep), [f"{100 * keep:g}" for keep in row.keep])
    axes.minorticks_off()
    axes.set_xlabel("weights kept in %")
    axes.set_ylabel("top-1 test accuracy in %")
    axes.set_title(f"{row.model} on {row.data}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
    return True


def draw_layers(row: Row, numbers: Numbers, path: Path) -> bool:
    """PNG: of each layer over the first training, of the first seed: rank of its change, density, penalty.

    One column for each kind of first training: with ZerO or not, with a mask or not. False: none is there.
    """
    labels = [
        name
        for name in ("none", "init", "mask", "init+mask")
        if numbers.results(Key(row.name, name, row.keep[0]))
    ]
    if not labels:
        return False
    figure = figure_of(4.0 * len(labels), 7.5)
    panels = figure.subplots(3, len(labels), squeeze=False)
    for column, label in enumerate(labels):
        history = numbers.results(Key(row.name, label, row.keep[0]))[0]["layers"]
        epochs = [epoch for epoch, _ in history]
        for line, what in enumerate(("rank", "density", "penalty")):
            axes = panels[line][column]
            for index, name in enumerate(history[-1][1]):
                values = [layers[name].get(what) for _, layers in history]
                if values[0] is not None:
                    color = f"C{index % 10}"
                    axes.plot(epochs, values, color=color, label=name.removesuffix(".weight"))
            if not axes.lines:  # there is no mask
                axes.remove()
                continue
            axes.grid(alpha=0.3)
            if what != "rank":
                axes.set_yscale("log")
            axes.set_ylabel({"rank": "stable rank of the change"}.get(what, what), fontsize=9)
            axes.set_xlabel("epoch before pruning", fontsize=9)
        panels[0][column].set_title(label, fontsize=10)
    if len(history[-1][1]) <= 6:
        panels[0][0].legend(fontsize=7)
    figure.suptitle(f"{row.model} on {row.data}: layers", fontsize=10)
    save_figure(figure, path)
    return True
