"""What the GPU benchmark writes: every row as CSV, tables in Markdown, a figure."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.step import goals
from benchmarks.gpu.step.providers import API, COMPILED, CUB, GRAPH, PYTORCH, TRITON, YARDSTICK, Provider
from benchmarks.gpu.step.rows import (
    WRONG,
    Cases,
    Row,
    as_csv,
    best_of_pytorch,
    by_case,
    from_csv,
    name_of,
    number,
    ours,
)
from benchmarks.pages import markdown
from drive.experiments.bench.workload import Case
from drive.files import write_atomic

HEADER = """# One pruning step on {device}

{facts}

CUDA: `torch.ops.drive.prune_` on CUDA tensors. API: the same through `fused_drive_prune(check_finite=False)`.
Graph: the same replayed from a CUDA graph. Triton: the version that needs no compiler. Rivals that make the
same masks: `drive.reference` by topk, sort or kthvalue; `torch.nn.utils.prune.global_unstructured` with
importance scores. `cub::DeviceTopK` is timed on stored scores: it selects, and neither computes scores nor
writes masks. The yardstick is `torch.mul(a, b, out=c)` of the same number of entries and dtype.

Medians of {rounds} runs by CUDA events, all providers in turn on the same tensors; slow ones as often as fits
into {seconds} s (`runs` in prune.csv). Weights and old masks are put back before every run, then four times
the L2 cache is overwritten, so that no run finds its inputs there. The device is busy with that when a step
is called: launches overlap with it, as they do in a training loop. Before they were timed, masks and weights
of CUDA and Triton were equal to the reference's to the bit or, where that needs too much memory, checked
against the definition of the step (`checked` in prune.csv).

A case is a size, a dtype and a sparsity. Old masks: the step finds masks of half the sparsity. One bucket:
the highest 14 bits of all scores are the same. GB/s counts the least that any step must move, 3 x dtype + 1
bytes an entry (one more with old masks): weights and gradients read once, weights and mask written. host: the
microseconds until a call of CUDA came back, which waits for nothing. Memory is
the most that was allocated beyond the inputs, in bytes an entry. The rivals' and the API's includes the new
masks of a first step; CUDA and Triton are given masks.

"""


class Report:
    """All rows so far, of earlier runs too; prune.csv and prune.md are written anew after each case."""

    def __init__(self, out: Path, facts: dict[str, str], rounds: int, seconds: float):
        self.out, self.facts = out, facts
        described = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "device")
        self.header = HEADER.format(device=facts["device"], facts=described, rounds=rounds, seconds=seconds)
        earlier = out / "prune.csv"
        self.rows = from_csv(earlier.read_text(), facts) if earlier.exists() else []
        self.missed: list[str] = []

    def has(self, case: Case, providers: tuple[Provider, ...]) -> bool:
        """Are the rows there already?"""
        there = {row.provider for row in self.rows if row.case == case}
        return all(provider.name in there for provider in providers)

    def add(self, case: Case, found: list[Row] | str) -> None:
        """The rows of a case, or why there are none."""
        if isinstance(found, str):
            self.missed.append(f"{title(case)}: {found}")
        else:
            self.rows += found
        write_atomic(self.out / "prune.csv", as_csv(self.rows, self.facts).encode())
        write_atomic(self.out / "prune.md", f"{self.header}{self.tables()}\n".encode())

    def draw(self) -> None:
        """prune.png: once, at the end, as it takes seconds."""
        draw(self.rows, self.facts["device"], self.out / "prune.png")

    def tables(self) -> str:
        """Rivals, notes, and last what matters most."""
        cases = by_case(self.rows)
        notes = {f"{row.provider}: {row.note}": None for row in self.rows if row.note}  # each once, in order
        parts = [
            markdown(RIVAL_COLUMNS, [rival_cells(found) for found in cases.values()]),
            "\n".join(f"- {note}" for note in (*notes, *self.missed)),
            markdown(OUR_COLUMNS, [our_cells(found, cases) for found in cases.values()]),
            goals.table(cases),
        ]
        return "\n\n".join(filter(None, parts))


def title(case: Case) -> str:
    """A case in the fewest words."""
    words = [case.size, name_of(case.dtype), f"{100 * case.sparsity:g} %"]
    words += ["old masks"] if case.old_masks else []
    words += [case.scores] if case.scores != "normal" else []
    return ", ".join(words)


def brief(found: list[Row] | str) -> str:
    """What came out of a case, for the log."""
    if isinstance(found, str):
        return found
    return ", ".join(f"{row.provider} {shown(row)}" for row in found)


def shown(row: Row) -> str:
    """Milliseconds, or in a word why there are none."""
    if not row.note:
        return f"{row.seconds * 1e3:.4g}"
    return WRONG if row.note.startswith(WRONG) else "OOM" if "out of memory" in row.note else "-"


RIVAL_COLUMNS = [
    "case",
    *(f"{name}, ms" for name in (*PYTORCH, CUB)),
    *(f"memory, {name}" for name in PYTORCH),
]


def rival_cells(found: dict[str, Row]) -> list[str]:
    rivals = [shown(found[name]) for name in (*PYTORCH, CUB)]
    return [title(found[YARDSTICK].case), *rivals, *(number(found[name].memory, ".1f") for name in PYTORCH)]


OUR_COLUMNS = [
    "case", "torch.mul, ms", "CUDA, ms", "GB/s", "/ mul", "graph, ms", "host, us", "API, ms", "Triton, ms",
    "/ mul", "best of PyTorch, ms", "/ ours", "ours / normal scores", "memory, CUDA", "memory, Triton",
]  # fmt: skip


def our_cells(found: dict[str, Row], cases: Cases) -> list[str]:
    yardstick, compiled, triton, mine = found[YARDSTICK], found[COMPILED], found[TRITON], ours(found)
    best = best_of_pytorch(found)
    normal = cases.get(replace(mine.case, scores="normal")) if mine.case.scores != "normal" else None
    return [
        title(mine.case),
        shown(yardstick),
        shown(compiled),
        number(compiled.gigabytes / compiled.seconds, ".0f"),
        number(compiled.seconds / yardstick.seconds, ".2f"),
        shown(found[GRAPH]),
        number(compiled.host * 1e6, ".0f"),
        shown(found[API]),
        shown(triton),
        number(triton.seconds / yardstick.seconds, ".2f"),
        f"{best.provider} {shown(best)}" if best else "-",
        number(best.seconds / mine.seconds, ".1f") if best else "",
        number(mine.seconds / ours(normal).seconds, ".2f") if normal else "",
        number(compiled.memory, ".3f"),
        number(triton.memory, ".3f"),
    ]


STYLES = {  # from the slowest, as the legend is read
    **{name: {"color": "C7", "marker": m} for name, m in zip(PYTORCH, "v^<>", strict=True)},
    CUB: {"color": "C2", "marker": "x"},
    TRITON: {"color": "C0", "linewidth": 2.5, "marker": "s"},
    COMPILED: {"color": "C3", "linewidth": 2.5, "marker": "o"},
    GRAPH: {"color": "C1", "marker": "o", "markersize": 4},
    YARDSTICK: {"color": "black", "linestyle": "--"},
}


def in_figure(case: Case) -> bool:
    return case == Case(case.size, case.dtype, 0.9, old_masks=False)


def draw(rows: list[Row], device: str, path: Path) -> None:
    """PNG: milliseconds of a first step at 90 % against entries, a panel per dtype, a line per provider."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the numbers are complete without it
    figure = Figure(figsize=(11, 5), layout="constrained")
    lines = {}
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, dtype in zip(panels, (torch.float32, torch.bfloat16), strict=True):
        drawn = [row for row in rows if in_figure(row.case) and row.case.dtype == dtype and row.runs]
        for name, style in STYLES.items():
            if points := sorted((row.entries, row.seconds * 1e3) for row in drawn if row.provider == name):
                (lines[name],) = axes.plot(*zip(*points, strict=True), **style)
        axes.set(xscale="log", yscale="log", xlabel="entries", title=str(dtype).removeprefix("torch."))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    figure.legend(lines.values(), lines, loc="outside right center")
    figure.suptitle(f"One pruning step to 90 % sparsity on {device}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomic(path, buffer.getvalue())
