"""One pruning step on a GPU against its rivals: prune.csv, prune.md and prune.png in a folder.

python -m benchmarks.gpu.step.measure --out docs/results/nvidia-h200 --minutes 5

The most telling cases come first, and the files are complete after each: it can be stopped at any time. What
prune.csv in that folder holds already, of the same commit on the same device, is not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from benchmarks import pages
from benchmarks.gpu.step.providers import CHECKED, OURS, PROVIDERS, RIVALS, Provider, Unavailable
from benchmarks.gpu.step.report import Report, brief, title
from benchmarks.gpu.step.rows import NAN, WRONG, Row
from drive.experiments.bench.step import Step
from drive.experiments.bench.workload import (
    Case,
    Inputs,
    Shapes,
    implementation,
    prove,
    resnet18_shapes,
    validate,
    vgg16_shapes,
)
from drive.fused import PruneOp

SIZES: dict[str, Shapes] = {
    "1M": [(128, 128, 3, 3)] * 7,
    "11M": resnet18_shapes(),
    "138M": vgg16_shapes(),
    "1B": [*vgg16_shapes(7), *resnet18_shapes() * 3],
    "4B": [(600_000, 4096), *vgg16_shapes(11)],  # the first one alone has more than 2^31 entries
}
HUGE = "4B"
DTYPES = (torch.float32, torch.bfloat16)
TELLING = (  # of each goal, whether it is met
    *(Case(size, dtype, 0.9, False) for size, dtype in product(("138M", "1B", "11M"), DTYPES)),
    Case("138M", torch.float32, 0.9, False, "equal"),
    Case("138M", torch.bfloat16, 0.9, False, "one bucket"),
)


class Job(NamedTuple):
    """A case, and who takes part in it at that time."""

    case: Case
    providers: tuple[Provider, ...] = PROVIDERS


def plan(sizes: list[str]) -> list[Job]:
    """All cases, the most telling ones first; last the rivals where one may take the device down."""
    hard = ("one bucket", "half zero", "equal")
    found = [*TELLING, *(Case(s, d, 0.9, True) for s, d in product(("138M", "1B", "11M"), DTYPES))]
    found += [Case(s, d, 0.9, False, scores) for s, d, scores in product(("138M", "1B"), DTYPES, hard)]
    found += [Case(s, d, 0.9, old) for s, d, old in product(("1M", HUGE), DTYPES, (False, True))]
    found += [Case(s, d, x, False) for s, d, x in product(SIZES, DTYPES, (0.5, 0.993))]
    cases = [case for case in dict.fromkeys(found) if case.size in sizes]
    huge = [case for case in cases if case.size == HUGE]
    return [
        *(Job(case, OURS if case.size == HUGE else PROVIDERS) for case in cases),
        *(Job(case, RIVALS) for case in huge),
    ]


INDEXED = 2**31  # entries from which on PyTorch's selections are not to be trusted with the device


class Times(NamedTuple):
    """Seconds of one run: by the device's clock, and until the call came back."""

    device: float
    host: float


class CudaMeter:
    """Seconds by CUDA events, peak memory by PyTorch's allocator."""

    def __init__(self) -> None:
        nbytes = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.cache = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def times(self, step: Step) -> Times:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()  # no input stays in the L2 cache
        begin.record()
        called = time.perf_counter()
        kept_alive = step()  # freeing the result is not part of the step
        host = time.perf_counter() - called
        end.record()
        end.synchronize()
        del kept_alive
        return Times(begin.elapsed_time(end) / 1e3, host)

    def memory(self, step: Step) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before


class CpuMeter:
    """To try this file where there is no GPU."""

    def times(self, step: Step) -> Times:
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        return Times(seconds, seconds)

    def memory(self, step: Step) -> float:
        step()
        return NAN


Meter = CudaMeter | CpuMeter
Measured = TypeVar("Measured")


class DeviceLost(RuntimeError):
    """After an error of its kind no call succeeds any more; `provider` made the one that failed."""

    def __init__(self, provider: Provider, note: str):
        super().__init__(f"{provider.name} lost the device: {note}")
        self.provider = provider


class Contestant:
    """A provider in a case, prepared, checked and warm; or `note` says why not."""

    def __init__(self, provider: Provider, inputs: Inputs, case: Case, meter: Meter):
        self.provider, self.inputs, self.case = provider, inputs, case
        self.times: list[Times] = []
        self.memory = self.warm = NAN
        self.checked = self.note = ""
        try:
            if provider.name in CHECKED:
                self.checked = check(inputs, case, implementation(CHECKED[provider.name], inputs.device))
            self.step = provider.prepare(inputs, case) if provider.once else None
            self.memory = self.run(meter.memory) / inputs.entries
            self.warm = self.run(meter.times).device
        except (Unavailable, ImportError) as error:
            self.note = str(error)
        except AssertionError as error:
            self.note = f"{WRONG}: {error}"
        except torch.OutOfMemoryError:
            self.note = "out of memory"
        except RuntimeError as error:  # a rival's own limit
            self.note = str(error).splitlines()[0]
            try:
                synchronize(inputs)
            except RuntimeError:
                raise DeviceLost(provider, self.note) from error

    def run(self, measure: Callable[[Step], Measured]) -> Measured:
        self.inputs.fresh()
        return measure(self.step or self.provider.prepare(self.inputs, self.case))

    def row(self) -> Row:
        row = Row(
            self.case, self.provider.name, self.inputs.entries, len(self.inputs.shapes),
            memory=self.memory, checked=self.checked, note=self.note,
        )  # fmt: skip
        if not self.times:
            return row
        times, host = zip(*self.times, strict=True)
        return replace(
            row, runs=len(times), seconds=median(times), fastest=min(times), slowest=max(times),
            host=median(host),
        )  # fmt: skip


def check(inputs: Inputs, case: Case, op: PruneOp) -> str:
    """Masks and weights against the reference's, or against their definition if it does not fit."""
    inputs.run(op, case)  # its own failure is not the reference's
    if inputs.entries < INDEXED:
        with suppress(RuntimeError):  # out of memory, or another limit of the reference
            validate(inputs, case, op)
            return "equal to the reference"
        empty_cache(inputs)
    prove(inputs, case, op)
    return "by the definition"


def synchronize(inputs: Inputs) -> None:
    if inputs.device == "cuda":
        torch.cuda.synchronize()


def empty_cache(inputs: Inputs) -> None:
    """Give back what a failed provider left in PyTorch's allocator."""
    if inputs.device == "cuda":
        torch.cuda.empty_cache()


def measure(inputs: Inputs, job: Job, meter: Meter, rounds: int, seconds: float) -> list[Row]:
    """Every provider `rounds` times, in turn; a slow one as often as it can within `seconds`."""
    inputs.begin(job.case)
    contestants = []
    for provider in job.providers:
        contestants.append(Contestant(provider, inputs, job.case, meter))
        if contestants[-1].note:
            empty_cache(inputs)
    able = [contestant for contestant in contestants if not contestant.note]
    for number in range(rounds):
        for contestant in able:
            if number < max(1, seconds / contestant.warm):
                contestant.times.append(contestant.run(meter.times))
    return [contestant.row() for contestant in contestants]


def run(jobs: list[Job], device: str, rounds: int, seconds: float) -> Iterator[list[Row] | str]:
    """Rows of each job, or why there are none; inputs are kept while size, dtype and scores are the same."""
    meter = CudaMeter() if device == "cuda" else CpuMeter()
    for (size, dtype, scores), group in groupby(
        jobs, lambda job: (job.case.size, job.case.dtype, job.case.scores)
    ):
        inputs: Inputs | None = None  # the next ones need the memory
        for job in group:
            try:
                inputs = inputs or Inputs(SIZES[size], dtype, device, scores)
                yield measure(inputs, job, meter, rounds, seconds)
            except torch.OutOfMemoryError:
                yield "the inputs do not fit into memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=60, help="begin no case after these")
    parser.add_argument("--telling", action="store_true", help="only the cases that the goals are about")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.3, help="for a slow provider, in each case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    facts = pages.facts(options.device)
    report = Report(options.out, facts, options.rounds, options.seconds)
    wanted = [job for job in plan(options.sizes) if not options.telling or job.case in TELLING]
    jobs = [job for job in wanted if not report.has(job.case, job.providers)]
    results = run(jobs, options.device, options.rounds, options.seconds)
    for job in jobs:
        begin = time.monotonic()
        try:
            found = next(results) if begin < deadline else "no time was left"
        except DeviceLost as error:  # what was measured before stays
            report.add(job.case, str(error))
            print(f"{title(job.case)}: {error}", flush=True)
            if error.provider in OURS:
                raise SystemExit(1) from error
            break
        report.add(job.case, found)
        took = time.monotonic() - begin
        print(f"{title(job.case)}, {took:.1f} s: {brief(found)}", flush=True)
    report.draw()
    print(report.tables())
    if wrong := [row for row in report.rows if row.note.startswith(WRONG)]:
        raise SystemExit(f"wrong masks in {len(wrong)} of {len(report.rows)} rows")


if __name__ == "__main__":
    main()
