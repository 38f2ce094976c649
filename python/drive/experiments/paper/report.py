"""What an experiment found: report.json, the table, the verdict and two figures."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from drive.figures import figure_of, save_figure
from drive.targets.targets import prunable

from .compare import Comparison, Config

Results = list[dict[str, Any]]  # of the cells, as `Comparison.run` gives them
HEADLINE = 0.98  # the sparsity at which DRIVE and SNIP are compared in words


def summarise(comparison: Comparison, results: Results) -> dict[str, Any]:
    """The report: numbers that depend on the configuration only, no timings and no dates."""
    config, data = comparison.config, comparison.data
    sizes = {name: w.numel() for name, w in prunable(comparison.network.build()).items()}
    groups = {(m, s): _of(results, m, s) for m in config.methods for s in config.sparsities}
    dense = _of(results, "dense", 0.0)
    return {
        "config": config.as_dict(),
        "images": {
            "train": len(data.train_y),
            "test": len(data.test_y),
            "classes": data.classes,
            "shape": list(data.train_x.shape[1:]),
            "skipped": list(data.skipped),
        },
        "prunable": sizes,
        "dense": _accuracy(dense),
        "pruned": [
            {
                "method": m,
                "sparsity": s,
                **_accuracy(cells),
                "density": _density(cells, sizes),
                "empty": _named(cells, "empty"),
                "disconnected": _named(cells, "disconnected"),
            }
            for (m, s), cells in groups.items()
        ],
        "verdict": _verdict(groups),
    }


def timings(config: Config, results: Results) -> list[dict[str, Any]]:
    """Mean seconds of warm-up, pruning and training per method and sparsity."""
    return [
        {
            "method": m,
            "sparsity": s,
            "warmup_seconds": mean(c["warmup_seconds"] for c in _of(results, m, s)),
            "prune_seconds": mean(c["prune_seconds"] for c in _of(results, m, s)),
            # methods that train in the course of pruning are charged for it here
            "train_seconds": mean(c["round_seconds"] + c["train_seconds"] for c in _of(results, m, s)),
        }
        for m, s in [("dense", 0.0), *((m, s) for m in config.methods for s in config.sparsities)]
    ]


def details(report: dict[str, Any], times: list[dict[str, Any]]) -> Table:
    """Seconds of pruning, and layers that collapsed: a row per method, a cell per sparsity."""
    config = report["config"]
    result = Table(
        title="seconds of pruning; layers that lost every weight + layers whose survivors lead nowhere",
        caption="mean over the seeds; layers: the most over the seeds", min_width=78,
    )  # fmt: skip
    result.add_column("weights pruned")
    for sparsity in config["sparsities"]:
        result.add_column(f"{100 * sparsity:g} %", justify="right")
    seconds = {(row["method"], row["sparsity"]): row["prune_seconds"] for row in times}
    for method in config["methods"]:
        rows = [row for row in report["pruned"] if row["method"] == method]
        result.add_row(method, *(
            f"{seconds[method, row['sparsity']]:.2f} s; {_most(row['empty'])} + {_most(row['disconnected'])}"
            for row in rows
        ))  # fmt: skip
    return result


def draw_time(report: dict[str, Any], times: list[dict[str, Any]], path: Path) -> None:
    """PNG: seconds of warm-up, training and pruning, stacked, a bar per method and sparsity."""
    config = report["config"]
    figure = figure_of(max(6.0, 0.9 * len(config["methods"])) + 2, 3.8)
    axes = figure.subplots()
    width = 0.8 / len(config["sparsities"])
    for index, sparsity in enumerate(config["sparsities"]):
        rows = [
            next(r for r in times if (r["method"], r["sparsity"]) == (m, sparsity)) for m in config["methods"]
        ]
        places = [i - 0.4 + width * (index + 0.5) for i in range(len(rows))]
        bottom = [0.0] * len(rows)
        for part, color in (("warmup", "C7"), ("train", "C0"), ("prune", "C1")):
            heights = [row[f"{part}_seconds"] for row in rows]
            label = {"warmup": "dense warm-up", "train": "training", "prune": "pruning"}[part]
            axes.bar(places, heights, width * 0.9, bottom=bottom, color=color, label=None if index else label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.axhline(_in_all(_dense(times)), color="black", linestyle="--", label="dense")
    axes.set_xticks(range(len(config["methods"])), config["methods"], rotation=30, ha="right")
    axes.set_ylabel("seconds")
    over = ", ".join(f"{100 * s:g}" for s in config["sparsities"])
    axes.set_title(f"{config['model']} on {config['data']}; bars: {over} % pruned", fontsize=10)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _dense(times: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in times if row["method"] == "dense")


def _in_all(row: dict[str, Any]) -> float:
    return float(row["warmup_seconds"] + row["prune_seconds"] + row["train_seconds"])


def markdown(report: dict[str, Any], times: list[dict[str, Any]]) -> str:
    """The comparison as three tables for a page of results."""
    config, seeds = report["config"], report["config"]["seeds"]
    heads = "".join(f" {100 * s:g} % |" for s in config["sparsities"])
    line = "| --- |" + " ---: |" * len(config["sparsities"])
    seconds = {(row["method"], row["sparsity"]): row for row in times}
    accuracy, cost, end_to_end = [], [], []
    dense = _in_all(_dense(times))
    for method in config["methods"]:
        rows = [row for row in report["pruned"] if row["method"] == method]
        accuracy.append(f"| {method} |" + "".join(f" {_shown(row, seeds)} |" for row in rows))
        cost.append(f"| {method} |" + "".join(
            f" {seconds[method, row['sparsity']]['prune_seconds']:.2f} / "
            f"{seconds[method, row['sparsity']]['train_seconds']:.2f}, "
            f"{_most(row['empty'])} + {_most(row['disconnected'])} |"
            for row in rows
        ))  # fmt: skip
        sums = [_in_all(seconds[method, row["sparsity"]]) for row in rows]
        end_to_end.append(f"| {method} |" + "".join(f" {s:.1f} ({dense / s:.2f}x) |" for s in sums))
    sparse = "on the sparse ops" if config["sparse_ops"] else "dense, with masks"
    return "\n".join([
        f"Test accuracy in %, {seeds} seeds; the dense network: {_shown(report['dense'], seeds)}.", "",
        f"| pruned |{heads}", line, *accuracy, "",
        "Seconds of pruning / training; layers that lost every weight + layers whose survivors lead nowhere "
        "(most over the seeds).", "", f"| pruned |{heads}", line, *cost, "",
        f"Seconds in all - dense warm-up, pruning, training {sparse} - and how many times faster than the "
        f"dense network's {dense:.1f}.", "", f"| pruned |{heads}", line, *end_to_end, "",
    ])  # fmt: skip


def table(report: dict[str, Any]) -> Table:
    """Test accuracy in %, mean and standard deviation over the seeds: a row per method."""
    config, seeds = report["config"], report["config"]["seeds"]
    over = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    dense = _shown(report["dense"], seeds)
    result = Table(
        title=f"{config['model']} on {config['data']}: test accuracy in %, {over}",
        caption=f"the dense network: {dense}",
        min_width=78,
    )
    result.add_column("weights pruned")
    for sparsity in config["sparsities"]:
        result.add_column(f"{100 * sparsity:g} %", justify="right")
    for method in config["methods"]:
        rows = [row for row in report["pruned"] if row["method"] == method]
        result.add_row(method, *(_shown(row, seeds) for row in rows))
    return result


def draw_accuracy(report: dict[str, Any], path: Path) -> None:
    """PNG: accuracy against sparsity, a line per method with a band of one standard deviation.

    Two panels: the whole range, and the few points below the dense network in which methods differ
    while they work.
    """
    config, dense = report["config"], 100 * report["dense"]["mean"]
    figure = figure_of(10.0, 4.2)
    panels = figure.subplots(1, 2)
    places = list(range(len(config["sparsities"])))  # evenly spaced: the interesting ones crowd near 1
    for axes in panels:
        for index, method in enumerate(config["methods"]):
            rows = [row for row in report["pruned"] if row["method"] == method]
            means = [100 * row["mean"] for row in rows]
            low = [100 * (row["mean"] - row["std"]) for row in rows]
            high = [100 * (row["mean"] + row["std"]) for row in rows]
            line = "-" if index < 10 else ":"  # there are ten colours
            axes.plot(places, means, line, marker="o", color=f"C{index}", label=method)
            axes.fill_between(places, low, high, color=f"C{index}", alpha=0.18, linewidth=0)
        axes.axhline(dense, color="black", linestyle="--", label="dense")
        axes.set_xticks(places, [f"{100 * s:g}" for s in config["sparsities"]])
        axes.set_xlabel("weights pruned in %")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 test accuracy in %")
    panels[0].legend(fontsize=8)
    panels[1].set_ylim(dense - 6, dense + 1)
    panels[1].set_title("the same, near the dense network", fontsize=10)
    seeds = config["seeds"]
    band = f"mean of {seeds} seeds ± standard deviation" if seeds > 1 else "one seed"
    panels[0].set_title(f"{config['model']} on {config['data']} ({band})", fontsize=10)
    save_figure(figure, path)


def draw_layers(report: dict[str, Any], path: Path) -> None:
    """PNG: the density of every layer, a panel per sparsity; a cross at the bottom: nothing is kept."""
    names, sparsities = list(report["prunable"]), report["config"]["sparsities"]
    columns = min(2, len(sparsities))
    rows = -(-len(sparsities) // columns)
    figure = figure_of(max(4.2, 0.3 * len(names)) * columns, 2.9 * rows + 0.5)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    floor = 0.5 * min((d for row in report["pruned"] for d in row["density"].values() if d), default=1)
    places = list(range(len(names)))
    labels = [name.removesuffix(".weight") for name in names]
    crowded = len(names) > 6
    if not crowded:
        labels = [f"{label}\n{report['prunable'][name]:,}" for label, name in zip(labels, names, strict=True)]
    for axes, sparsity in zip(panels, sparsities, strict=False):
        for index, method in enumerate(report["config"]["methods"]):
            row = next(r for r in report["pruned"] if (r["method"], r["sparsity"]) == (method, sparsity))
            kept = [row["density"][name] for name in names]
            heights = [max(d, floor) for d in kept]
            axes.plot(places, heights, marker="o", markersize=4, color=f"C{index}", label=method)
            empty = [place for place, d in zip(places, kept, strict=True) if not d]
            axes.plot(empty, [floor] * len(empty), "x", markersize=11, color=f"C{index}")
        axes.axhline(1 - sparsity, color="black", linestyle="--", linewidth=0.9, label="whole network")
        axes.set_yscale("log")
        axes.set_title(f"{100 * sparsity:g} % pruned", fontsize=10)
        axes.set_xticks(places, labels, rotation=90 if crowded else 0, fontsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(sparsities) :]:
        axes.remove()
    figure.supylabel("fraction of the layer's weights that is kept", fontsize=10)
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def _of(results: Results, method: str, sparsity: float) -> Results:
    return [r for r in results if (r["method"], r["sparsity"]) == (method, sparsity)]


def _accuracy(cells: Results) -> dict[str, Any]:
    values = [c["correct"] / c["tested"] for c in cells]
    return {"accuracy": values, "mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def _named(cells: Results, what: str) -> list[list[str]]:
    """Names of collapsed layers, a list per seed."""
    return [list(cell[what]) for cell in cells]


def _most(names: list[list[str]]) -> int:
    return max(map(len, names))


def _density(cells: Results, sizes: dict[str, int]) -> dict[str, float]:
    """Mean over the seeds of the kept fraction of every tensor."""
    return {name: mean(c["kept"][name] for c in cells) / size for name, size in sizes.items()}


def _verdict(groups: dict[tuple[str, float], Results]) -> str:
    """DRIVE against SNIP at the headline sparsity, in words."""
    drive, snip = groups.get(("drive", HEADLINE)), groups.get(("snip", HEADLINE))
    if not drive or not snip:
        return f"DRIVE and SNIP were not compared: that takes both of them at {100 * HEADLINE:g} % pruned."
    right = [sum(cell["correct"] for cell in cells) for cells in (drive, snip)]
    word = "beats" if right[0] > right[1] else "equals" if right[0] == right[1] else "does not beat"
    figures = [f"{100 * _accuracy(cells)['mean']:.2f} %" for cells in (drive, snip)]
    over = f"in the mean of {len(drive)} seeds" if len(drive) > 1 else "with one seed"
    return (
        f"At {100 * HEADLINE:g} % pruned DRIVE {word} SNIP {over}: "
        f"{figures[0]} against {figures[1]} test accuracy."
    )


def _shown(row: dict[str, Any], seeds: int) -> str:
    return f"{100 * row['mean']:.2f}" + (f" ± {100 * row['std']:.2f}" if seeds > 1 else "")
