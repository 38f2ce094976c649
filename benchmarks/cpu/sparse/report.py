"""Tables and a figure of what measure.py has measured.

python -m benchmarks.cpu.sparse.report docs/results/sparse-cpu.jsonl docs/results/sparse-cpu.md

The figure goes beside the page, under the same name.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import median

from benchmarks.cpu.sparse.rows import (
    CONVOLUTION,
    DISTURBED,
    FIRST,
    IN_A_ROW,
    LINEAR,
    NETWORK,
    TOLERATED,
    Row,
    read,
)
from drive.figures import figure_of, save_figure
from drive.files import write_atomic

HEAD = """# Sparse layers and networks on CPU

{machines}

How many times faster than dense: than the best of contiguous and channels_last, for Linear also of oneDNN's
packed weight (inference). Outputs were compared with the dense ones before anything was timed. All run in
turns in one process, each turn in an order of its own, calls of less than 50 ms twice and the second timed; a
figure is the median of the ratios in each turn. Freed memory is kept for the next call, for dense and sparse
alike: benchmarks/cpu/sparse/measure.py says why. A dash: not measured.

## Whole networks

`drive.sparse.convert` of a network with 3x32x32 images (MLP: 4096-4096-4096, a row an item; transformer
block: 768 wide, 128 tokens an item), masks uniform over the convolutions or, where it says so, those of DRIVE
on the untrained network. A training step is forward, backward and SGD with momentum. `convert` measures and
may choose dense: {lowest}. Rows in which these two differ by more than {disturbed} are measured again by
the next run; a network below {tolerated} is at once, in 15 turns with the dense ones alone, and that counts
({repeats}).

{networks}

Dense networks under `torch.compile` against the same eager ones: {compiled}.

Of those, inference with `torch.sparse` CSR (MKL) in place of Linear, in turns with dense ones alone:

{csr}

![speed-up against sparsity]({figure})

## Single layers

The ops themselves, also where `convert` would choose dense, called with ordinary tensors, [N, C, H, W]; 3x3
convolutions have stride 1. Backward: to input and weight. Called in turns with all others, a call a turn:

{layers}

There each call finds its tensors where the others' calls, dense ones among them, have left them: where little
is computed, in memory. In turns of many calls in a row (a tenth of a second of each; the mean of a turn), as
kernels are commonly timed, they lie in the caches as far as these hold them, for all alike:

{repeated}

{linear}

The same convolutions by our op on images in blocks, as inside a converted network / by SparseProp's faster
kernel (arXiv 2302.04852) / a plain copy of their input to memory of the output's size, in place of them:

{layer_rivals}

And in a row:

{repeated_rivals}

The same Linear by `torch.sparse` CSR (MKL), whose backward is dense / by SparseProp:

{linear_rivals}
"""

Cell = Callable[[Row], str]


def table(rows: Iterable[Row], cell: Cell) -> str:
    """A line per name, batch and mode, a column per sparsity."""
    rows = sorted(rows, key=lambda row: (row.name, row.mode, row.batch, row.sparsity))
    sparsities = sorted({row.sparsity for row in rows})
    lines = [
        "| | batch | " + " | ".join(f"{s:.1%}" for s in sparsities) + " |",
        "| --- | ---: |" + " ---: |" * len(sparsities),
    ]
    for (name, mode, batch), group in groupby(rows, key=lambda row: (row.name, row.mode, row.batch)):
        found = {row.sparsity: cell(row) for row in group}
        cells = " | ".join(found.get(s, "-") for s in sparsities)
        lines.append(f"| {name}, {mode} | {batch} | {cells} |")
    return "\n".join(lines)


def _machines(rows: list[Row]) -> str:
    """Where and when, and of which version of the code, with the number of rows if there are several."""
    found = Counter((row.machine, row.commit) for row in rows)
    lines = [f"{machine}, commit {commit or 'unknown'}" for machine, commit in found]
    if len(found) == 1:
        return lines[0]
    return "\n".join(f"- {line}: {n} rows" for line, n in zip(lines, found.values(), strict=True))


def _of(*providers: str) -> Cell:
    """Their speed-ups, one beside the other."""

    def cell(row: Row) -> str:
        return " / ".join(f"{row.speedup(p):.3g}" if p in row.seconds else "-" for p in providers)

    return cell


def _lowest(rows: list[Row]) -> str:
    """What is lost where dense would have been better, and how far two measurements of one thing differ."""
    lowest = min(rows, key=Row.speedup)
    below = [row for row in rows if row.speedup() < TOLERATED]
    dense = sum(row.chosen.startswith("dense") for row in below)
    again = sorted(row.seconds["dense"] / row.seconds["again"] for row in rows)
    quarter = len(again) // 4
    where = f"{lowest.name}, {lowest.mode}, batch {lowest.batch}, {lowest.sparsity:.1%}"
    whose = f", {dense} of them of networks that it left dense" if below else ""
    return (
        f"{len(below)} of {len(rows)} figures are below {TOLERATED}{whose}; the lowest is "
        f"{lowest.speedup():.3f} ({where}). A second copy of the dense network, measured in the same turns, "
        f"ran at {again[0]:.2f} to {again[-1]:.2f} times the speed of the first, in the middle half of the "
        f"cases at {again[quarter]:.3f} to {again[-quarter - 1]:.3f}"
    )


def _repeats(rows: list[Row]) -> str:
    """What was low at first."""
    first = sorted(row.speedup(FIRST) for row in rows if FIRST in row.seconds)
    if not first:
        return "none of these"
    return f"{len(first)} of these, {first[0]:.3f} to {first[-1]:.3f} at first: the `.jsonl` has both figures"


def _compiled(rows: list[Row]) -> Iterator[str]:
    """Of torch.compile, whose speed does not depend on the sparsity."""
    rows = sorted(rows, key=lambda row: (row.name, row.mode, row.batch))
    for (name, mode, batch), group in groupby(rows, key=lambda row: (row.name, row.mode, row.batch)):
        found = [row.speedup("torch.compile") for row in group if "torch.compile" in row.seconds]
        if found:
            yield f"{name}, {mode}, batch {batch}: {median(found):.2f}x"


def page(rows: list[Row], figure: str) -> str:
    nets, convolutions, repeated, linear = (
        [row for row in rows if row.what == what] for what in (NETWORK, CONVOLUTION, IN_A_ROW, LINEAR)
    )
    others = _of("ours, blocked", "SparseProp", "copy")
    csr = [row for row in nets if "MKL CSR" in row.seconds]
    return HEAD.format(
        machines=_machines(rows), lowest=_lowest(nets), disturbed=f"{DISTURBED:.0%}", tolerated=TOLERATED,
        networks=table(nets, _of("ours")), compiled="; ".join(_compiled(nets)),
        csr=table(csr, _of("MKL CSR")), figure=figure, layers=table(convolutions, _of("ours")),
        repeats=_repeats(nets), repeated=table(repeated, _of("ours")), linear=table(linear, _of("ours")),
        layer_rivals=table(convolutions, others), repeated_rivals=table(repeated, others),
        linear_rivals=table(linear, _of("MKL CSR", "SparseProp")),
    )  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Speed-up against sparsity, both on a logarithmic axis, with the ideal line 1 / density."""
    rows = [row for row in rows if row.what == NETWORK and row.sparsity > 0]
    modes = list(dict.fromkeys(row.mode for row in rows))
    figure = figure_of(12.0, 5.0)
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(row.name for row in rows))
    styles = {1: ":", 32: "-", 128: "--"}
    sparsities = sorted({row.sparsity for row in rows})
    ideal = [1 / (1 - s) for s in sparsities]
    for axes, mode in zip(panels, modes, strict=True):
        axes.plot(ideal, ideal, color="black", linewidth=0.9, label="1 / density")
        axes.axhline(1, color="black", linestyle="--", linewidth=0.9)
        for name in names:
            for batch, style in styles.items():
                line = sorted(
                    (r for r in rows if (r.name, r.mode, r.batch) == (name, mode, batch)),
                    key=lambda r: r.sparsity,
                )
                axes.plot(
                    [1 / (1 - r.sparsity) for r in line], [r.speedup() for r in line], style, marker="o",
                    markersize=3, color=f"C{names.index(name)}", label=name if batch == 32 else None,
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=mode, xlabel="weights pruned")
        axes.set_xticks(ideal, [f"{s:.1%}" for s in sparsities], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_ylim(0.7, 60)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("times faster than dense (batch 1 dotted, 32 solid, 128 dashed)")
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    rows, figure = read(options.rows), options.page.with_suffix(".png")
    draw(rows, figure)
    write_atomic(options.page, page(rows, figure.name).encode())


if __name__ == "__main__":
    main()
