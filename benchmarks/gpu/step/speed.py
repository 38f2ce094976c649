"""Four first steps to 90 % on a GPU, a line as soon as each is measured, and which goals are met.

138 M and 1 B entries in float32 and bfloat16: the compiled step, called eagerly and replayed from a CUDA
graph, beside torch.mul and PyTorch's two fastest ways to the same masks. measure.py has it all.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import pages
from benchmarks.gpu.step import goals, report
from benchmarks.gpu.step.measure import Job, plan, run
from benchmarks.gpu.step.providers import COMPILED, GRAPH, PROVIDERS, YARDSTICK
from benchmarks.gpu.step.rows import Row, best_of_pytorch, by_case, number

TAKING_PART = (YARDSTICK, COMPILED, GRAPH, "topk", "sort")
COLUMNS = [
    "case", "torch.mul, ms", "CUDA, ms", "/ mul", "host, us", "graph, ms", "/ mul", "host, us",
    "best of PyTorch, ms", "/ CUDA", "masks",
]  # fmt: skip


def jobs(sizes: list[str]) -> list[Job]:
    providers = tuple(provider for provider in PROVIDERS if provider.name in TAKING_PART)
    return [Job(job.case, providers) for job in plan(sizes) if report.in_figure(job.case)]


def cells(rows: list[Row]) -> list[str]:
    (found,) = by_case(rows).values()
    mul, ours, graph, best = found[YARDSTICK], found[COMPILED], found[GRAPH], best_of_pytorch(found)
    return [
        report.title(ours.case),
        report.shown(mul),
        report.shown(ours),
        number(ours.seconds / mul.seconds, ".2f"),
        number(ours.host * 1e6, ".0f"),
        report.shown(graph),
        number(graph.seconds / mul.seconds, ".2f"),
        number(graph.host * 1e6, ".0f"),
        f"{best.provider} {report.shown(best)}" if best else "-",
        number(best.seconds / ours.seconds, ".1f") if best else "",
        ours.checked or ours.note,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["138M", "1B"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3, help="for a slow provider, in each case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    print(", ".join(f"{k} {v}" for k, v in pages.facts(options.device).items()), end="\n\n")
    print(pages.markdown(COLUMNS, []), flush=True)
    rows: list[Row] = []
    for found in run(jobs(options.sizes), options.device, options.rounds, options.seconds):
        if isinstance(found, str):
            print(f"| {found} |", flush=True)
            continue
        rows += found
        print(f"| {' | '.join(cells(found))} |", flush=True)
    print("", goals.table(by_case(rows)), sep="\n")
    if not all(row.checked for row in rows if row.provider == COMPILED):
        raise SystemExit("not all masks are right")


if __name__ == "__main__":
    main()
