"""What an experiment found: report.json, the table, the verdict and two figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from drive.experiments.training import macs
from drive.figures import figure_of, save_figure
from drive.targets.structures import CHANNELS
from drive.targets.targets import prunable

from .compare import Comparison, Config
from .goal import Goal
from .tables import head, line

Results = list[dict[str, Any]]  # of the cells, as `Comparison.run` gives them
STEP = "memory (weights, gradients, state, activations), time and energy of a training step"
HEADLINE = 0.98  # the sparsity at which DRIVE and SNIP are compared in words; of multiply-adds, the least


def summarise(comparison: Comparison, results: Results) -> dict[str, Any]:
    """The report: numbers that depend on the configuration only, no timings and no dates."""
    config, data = comparison.config, comparison.data
    sizes = {name: w.numel() for name, w in prunable(comparison.network.build()).items()}
    groups = {(m, goal): _of(results, m, goal) for m in config.methods for goal in config.goals}
    dense = _of(results, "dense", Goal(0.0))
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
        "dense": {**_accuracy(dense), **_smaller(dense)},
        "pruned": [
            {
                "method": m,
                **goal.as_dict(),
                **_accuracy(cells),
                "macs_left": macs.mean_left(cells),
                **_smaller(cells),
                "density": _density(cells, sizes),
                "empty": _named(cells, "empty"),
                "disconnected": _named(cells, "disconnected"),
            }
            for (m, goal), cells in groups.items()
        ],
        "verdict": _verdict(groups, config.goals),
    }


def timings(config: Config, results: Results) -> list[dict[str, Any]]:
    """Mean seconds of warm-up, pruning and training per method and goal."""
    groups = [("dense", Goal(0.0)), *((m, goal) for m in config.methods for goal in config.goals)]
    return [
        {
            "method": m,
            **goal.as_dict(),
            "warmup_seconds": mean(c["warmup_seconds"] for c in cells),
            "prune_seconds": mean(c["prune_seconds"] for c in cells),
            # methods that train in the course of pruning are charged for it here
            "train_seconds": mean(c["round_seconds"] + c["train_seconds"] for c in cells),
            **_step(cells),
        }
        for m, goal in groups
        for cells in [_of(results, m, goal)]
    ]


def draw_time(report: dict[str, Any], times: list[dict[str, Any]], path: Path) -> None:
    """PNG: seconds of warm-up, training and pruning, stacked, a bar per method and goal."""
    config = report["config"]
    goals = _goals(config)
    figure = figure_of(max(6.0, 0.9 * len(config["methods"])) + 2, 3.8)
    axes = figure.subplots()
    width = 0.8 / len(goals)
    for index in range(len(goals)):
        rows = [_rows(times, m)[index] for m in config["methods"]]
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
    over = ", ".join(goal.percent for goal in goals)
    axes.set_title(f"{config['model']} on {config['data']}; bars: {_axis(config)}, {over}", fontsize=10)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _dense(times: list[dict[str, Any]]) -> dict[str, Any]:
    return _rows(times, "dense")[0]


def _in_all(row: dict[str, Any]) -> float:
    return float(row["warmup_seconds"] + row["prune_seconds"] + row["train_seconds"])


def markdown(report: dict[str, Any], times: list[dict[str, Any]]) -> str:
    """The comparison as three tables for a page of results."""
    config, seeds = report["config"], report["config"]["seeds"]
    accuracy, cost, end_to_end = [], [], []
    dense = _in_all(_dense(times))
    for method in config["methods"]:
        rows, seconds = _rows(report["pruned"], method), _rows(times, method)
        left = macs.shown([row["macs_left"] for row in rows])
        accuracy.append([method, *(_shown(row, seeds) for row in rows), left])
        cost.append([
            method,
            *(
                f"{time['prune_seconds']:.2f} / {time['train_seconds']:.2f}, "
                f"{_most(row['empty'])} + {_most(row['disconnected'])}"
                for row, time in zip(rows, seconds, strict=True)
            ),
            left,
        ])  # fmt: skip
        sums = [_in_all(time) for time in seconds]
        end_to_end.append([method, *(f"{s:.1f} ({dense / s:.2f}x)" for s in sums), left])
    small = []
    if "step_bytes" in report["dense"]:
        shown = [
            [method, *map(_shrunk, _rows(report["pruned"], method), _rows(times, method))]
            for method in config["methods"]
        ]
        small = [
            f"Parameters left; {STEP}, means over the seeds; the dense network: "
            f"{_shrunk(report['dense'], _dense(times))}.", "",
            *_markdown(config, shown, left=False),
        ]  # fmt: skip
    how = "of smaller networks" if small else "dense, with masks"
    how = "on the sparse ops" if config["sparse_ops"] else how
    return "\n".join([
        f"Test accuracy in %, {seeds} seeds; the dense network: {_shown(report['dense'], seeds)}. "
        f"{macs.NOTE}", "",
        *_markdown(config, accuracy),
        "Seconds of pruning / training; layers that lost every weight + layers whose survivors lead nowhere "
        "(most over the seeds).", "", *_markdown(config, cost), *small,
        f"Seconds in all - dense warm-up, pruning, training {how} - and how many times faster than the "
        f"dense network's {dense:.1f}.", "", *_markdown(config, end_to_end),
    ])  # fmt: skip


def _markdown(config: dict[str, Any], rows: list[list[str]], left: bool = True) -> list[str]:
    heads = [_axis(config), *(goal.percent for goal in _goals(config)), *([macs.TITLE] if left else [])]
    return [*head(heads), *map(line, rows), ""]


def tables(report: dict[str, Any], times: list[dict[str, Any]]) -> Iterator[Table]:
    """Test accuracy; what is left of the multiply-adds; seconds of pruning, and layers that collapsed.

    Each a table, a row per method and a cell per goal, so that they fit into a terminal.
    """
    config, seeds = report["config"], report["config"]["seeds"]
    over = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    yield _table(
        config, f"{config['model']} on {config['data']}: test accuracy in %, {over}",
        f"the dense network: {_shown(report['dense'], seeds)}",
        [_shown(row, seeds) for row in report["pruned"]],
    )  # fmt: skip
    yield _table(
        config,
        macs.TITLE,
        "mean over the seeds",
        [macs.shown([row["macs_left"]]) for row in report["pruned"]],
    )
    pruned = [time for time in times if time["method"] != "dense"]
    if "step_bytes" in report["dense"]:
        yield _table(
            config, f"parameters left; {STEP}",
            f"mean over the seeds; the dense network: {_shrunk(report['dense'], _dense(times))}",
            [_shrunk(row, time) for row, time in zip(report["pruned"], pruned, strict=True)],
        )  # fmt: skip
    yield _table(
        config, "seconds of pruning; layers that lost every weight + layers whose survivors lead nowhere",
        "mean over the seeds; layers: the most over the seeds",
        [
            f"{time['prune_seconds']:.2f} s; {_most(row['empty'])} + {_most(row['disconnected'])}"
            for row, time in zip(report["pruned"], pruned, strict=True)
        ],
    )  # fmt: skip


def _table(config: dict[str, Any], title: str, caption: str, cells: list[str]) -> Table:
    """`cells`: method by method, and of each goal by goal."""
    result, goals = Table(title=title, caption=caption, min_width=78), _goals(config)
    result.add_column(_axis(config))
    for goal in goals:
        result.add_column(goal.percent, justify="right")
    for number, method in enumerate(config["methods"]):
        result.add_row(method, *cells[number * len(goals) : (number + 1) * len(goals)])
    return result


def draw_accuracy(report: dict[str, Any], path: Path) -> None:
    """PNG: accuracy against what is pruned, a line per method with a band of one standard deviation.

    Beside the whole range, if any is there, the few points below the dense network in which methods differ
    while they work.
    """
    config, dense = report["config"], 100 * report["dense"]["mean"]
    lowest = dense - 6
    two = any(100 * row["mean"] > lowest for row in report["pruned"])
    figure = figure_of(5.0 + 5.0 * two, 4.2)
    panels = figure.subplots(1, 1 + two, squeeze=False).flatten()
    goals = _goals(config)
    places = list(range(len(goals)))  # evenly spaced: the interesting ones crowd at the sparse end
    for axes in panels:
        for index, method in enumerate(config["methods"]):
            rows = _rows(report["pruned"], method)
            means = [100 * row["mean"] for row in rows]
            low = [100 * (row["mean"] - row["std"]) for row in rows]
            high = [100 * (row["mean"] + row["std"]) for row in rows]
            line = "-" if index < 10 else ":"  # there are ten colours
            axes.plot(places, means, line, marker="o", color=f"C{index}", label=method)
            axes.fill_between(places, low, high, color=f"C{index}", alpha=0.18, linewidth=0)
        axes.axhline(dense, color="black", linestyle="--", label="dense")
        axes.set_xticks(places, [f"{100 * goal.share:g}" for goal in goals])
        axes.set_xlabel(f"{_axis(config)} in %")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 test accuracy in %")
    panels[0].legend(fontsize=8)
    for axes in panels[1:]:
        axes.set_ylim(lowest, dense + 1)
        axes.set_title("the same, near the dense network", fontsize=10)
    seeds = config["seeds"]
    band = f"mean of {seeds} seeds ± standard deviation" if seeds > 1 else "one seed"
    panels[0].set_title(f"{config['model']} on {config['data']} ({band})", fontsize=10)
    save_figure(figure, path)


def draw_layers(report: dict[str, Any], path: Path) -> None:
    """PNG: the density of every layer, a panel per goal; a cross at the bottom: nothing is kept."""
    names, goals = list(report["prunable"]), _goals(report["config"])
    columns = min(2, len(goals))
    rows = -(-len(goals) // columns)
    figure = figure_of(max(4.2, 0.3 * len(names)) * columns, 2.9 * rows + 0.5)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    floor = 0.5 * min((d for row in report["pruned"] for d in row["density"].values() if d), default=1)
    places = list(range(len(names)))
    labels = [name.removesuffix(".weight") for name in names]
    crowded = len(names) > 6
    if not crowded:
        labels = [f"{label}\n{report['prunable'][name]:,}" for label, name in zip(labels, names, strict=True)]
    for number, (axes, goal) in enumerate(zip(panels, goals, strict=False)):
        for index, method in enumerate(report["config"]["methods"]):
            density = _rows(report["pruned"], method)[number]["density"]
            kept = [density[name] for name in names]
            heights = [max(d, floor) for d in kept]
            axes.plot(places, heights, marker="o", markersize=4, color=f"C{index}", label=method)
            empty = [place for place, d in zip(places, kept, strict=True) if not d]
            axes.plot(empty, [floor] * len(empty), "x", markersize=11, color=f"C{index}")
        if (
            goal.macs is None and report["config"]["structure"] != CHANNELS
        ):  # of the multiply-adds, each method's network has its own
            axes.axhline(1 - goal.gone, color="black", linestyle="--", linewidth=0.9, label="whole network")
        axes.set_yscale("log")
        axes.set_title(f"{_axis(report['config'])}: {goal.percent}", fontsize=10)
        axes.set_xticks(places, labels, rotation=90 if crowded else 0, fontsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(goals) :]:
        axes.remove()
    figure.supylabel("fraction of the layer's weights that is kept", fontsize=10)
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def _goals(config: dict[str, Any]) -> list[Goal]:
    return Config(**config).goals


def _axis(config: dict[str, Any]) -> str:
    """What the percentages of the goals are of."""
    axis = _goals(config)[0].axis
    return axis.replace("weights", "channels") if config["structure"] == CHANNELS else axis


def _rows(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Of a report or its timings: a method's, in the order of the goals."""
    return [row for row in rows if row["method"] == method]


def _of(results: Results, method: str, goal: Goal) -> Results:
    return [r for r in _rows(results, method) if goal.as_dict().items() <= r.items()]


def _accuracy(cells: Results) -> dict[str, Any]:
    values = [c["correct"] / c["tested"] for c in cells]
    return {"accuracy": values, "mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def _smaller(cells: Results) -> dict[str, Any]:
    """Of networks that were shrunk, and the dense one beside them, means over the seeds."""
    if "footprint" not in cells[0]:
        return {}
    left = {name: mean(c.get(name, 1.0) for c in cells) for name in ("nodes_left", "parameters_left")}
    return {**left, "step_bytes": mean(c["footprint"]["bytes"] for c in cells)}


def _step(cells: Results) -> dict[str, float | None]:
    """What a training step of these takes, likewise; None: the machine does not say how much energy."""
    if "footprint" not in cells[0]:
        return {}
    joules = [c["footprint"]["joules"] for c in cells]
    return {
        "step_seconds": mean(c["footprint"]["seconds"] for c in cells),
        "step_joules": None if None in joules else mean(joules),
    }


def _shrunk(row: dict[str, Any], time: dict[str, Any]) -> str:
    """Of one of the networks: parameters left; memory, time and energy of a step."""
    energy = "-" if time["step_joules"] is None else f"{time['step_joules']:.2f} J"
    return (
        f"{100 * row['parameters_left']:.1f} %; {row['step_bytes'] / 1e6:.1f} MB, "
        f"{1e3 * time['step_seconds']:.1f} ms, {energy}"
    )


def _named(cells: Results, what: str) -> list[list[str]]:
    """Names of collapsed layers, a list per seed."""
    return [list(cell[what]) for cell in cells]


def _most(names: list[list[str]]) -> int:
    return max(map(len, names))


def _density(cells: Results, sizes: dict[str, int]) -> dict[str, float]:
    """Mean over the seeds of the kept fraction of every tensor."""
    return {name: mean(c["kept"][name] for c in cells) / size for name, size in sizes.items()}


def _verdict(groups: dict[tuple[str, Goal], Results], goals: list[Goal]) -> str:
    """DRIVE against SNIP at the headline, in words."""
    at = Goal(HEADLINE) if goals[-1].macs is None else goals[-1]
    words = f"{at.title} {'pruned' if at.macs is None else 'left'}"
    drive, snip = groups.get(("drive", at)), groups.get(("snip", at))
    if not drive or not snip:
        return f"DRIVE and SNIP were not compared: that takes both of them at {words}."
    right = [sum(cell["correct"] for cell in cells) for cells in (drive, snip)]
    word = "beats" if right[0] > right[1] else "equals" if right[0] == right[1] else "does not beat"
    figures = [f"{100 * _accuracy(cells)['mean']:.2f} %" for cells in (drive, snip)]
    over = f"in the mean of {len(drive)} seeds" if len(drive) > 1 else "with one seed"
    return f"At {words} DRIVE {word} SNIP {over}: {figures[0]} against {figures[1]} test accuracy."


def _shown(row: dict[str, Any], seeds: int) -> str:
    return f"{100 * row['mean']:.2f}" + (f" ± {100 * row['std']:.2f}" if seeds > 1 else "")
