"""Times of one pruning step against its rivals, interleaved in one process, on a model's real shapes."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from drive import __version__, release_memory
from drive.fused import fused_drive_prune
from drive.reference import drive_prune
from drive_kernels.prune.op import kth_by_kthvalue

from .workload import Case, Inputs, Shapes, resnet18_shapes, validate, vgg16_shapes

SIZES: dict[str, Shapes] = {
    "11M": resnet18_shapes(),
    "138M": vgg16_shapes(),
    "300M": [*vgg16_shapes(2), *resnet18_shapes(), (3000, 4096)],
}


@dataclass(frozen=True)
class Row:
    """Every provider's medians on one case, in seconds and CPU seconds; extra memory in bytes an entry."""

    case: Case
    entries: int
    seconds: dict[str, float]
    cpu: dict[str, float]
    memory: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        case = {**asdict(self.case), "dtype": str(self.case.dtype).removeprefix("torch.")}
        found = {"seconds": self.seconds, "cpu": self.cpu, "memory": self.memory}
        return {**case, "entries": self.entries, **found}


Step = Callable[[], object]
Provider = Callable[[Inputs, Case], Step]  # called before every run, untimed


def step(prune: Callable[..., object], **options: object) -> Provider:
    """A provider that calls a function with the arguments of fused_drive_prune."""
    last: list[object] = []

    def prepare(inputs: Inputs, case: Case) -> Step:
        masks = inputs.old_masks()

        def run() -> object:
            result = prune(inputs.weights, inputs.grads, sparsity=case.sparsity, masks=masks, **options)
            if case.replaces:
                last[:] = [result]  # frees the one before
            return result

        if not case.replaces:
            last.clear()
        return run

    return prepare


def global_unstructured(inputs: Inputs, case: Case) -> Step:
    modules = [nn.Module() for _ in inputs.weights]
    for module, weight in zip(modules, inputs.weights, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)

    def run(sparsity: float) -> None:
        scores = {
            (module, "weight"): (w * g).abs_()
            for module, w, g in zip(modules, inputs.weights, inputs.grads, strict=True)
        }
        parameters = [(module, "weight") for module in modules]
        # on parameters pruned before, the amount is a fraction of what is left
        before = case.sparsity / 2 if case.old_masks and sparsity == case.sparsity else 0.0
        torch_prune.global_unstructured(
            parameters, torch_prune.L1Unstructured, scores, amount=(sparsity - before) / (1 - before)
        )

    if case.old_masks:
        run(case.sparsity / 2)
    return lambda: run(case.sparsity)


def mul(inputs: Inputs, case: Case) -> Step:
    return lambda: torch.mul(inputs.start, inputs.grad, out=inputs.weight)


OURS, YARDSTICK = "fused_drive_prune", "torch.mul"
PROVIDERS: dict[str, Provider] = {
    OURS: step(fused_drive_prune),
    YARDSTICK: mul,
    "reference, topk": step(drive_prune),
    "reference, kthvalue": step(drive_prune, kth_largest=kth_by_kthvalue),
    "global_unstructured": global_unstructured,
}
RIVALS = [name for name in PROVIDERS if name not in (OURS, YARDSTICK)]


def measure(inputs: Inputs, case: Case, rounds: int) -> Row:
    """Median times and memory, all providers in turn in every round.

    Memory is that of the first round, before which all that is kept is released.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROVIDERS}
    memory: dict[str, float] = {}
    for number in range(rounds):
        for name, prepare in PROVIDERS.items():
            if name in RIVALS and number >= slow_rounds(inputs.entries):
                continue
            inputs.fresh()
            if number == 0:
                release_memory()
            seconds, cpu, extra = _time(prepare(inputs, case))
            times[name].append((seconds, cpu))
            memory.setdefault(name, extra / inputs.entries)
    wall, cpus = ({name: median(pair[i] for pair in t) for name, t in times.items()} for i in (0, 1))
    return Row(case, inputs.entries, wall, cpus, memory)


def slow_rounds(entries: int) -> int:
    """How often rivals are run that take seconds: 3 times at 11 M entries, once at 138 M and 300 M."""
    return 3 if entries < 100e6 else 1


def cases(sizes: list[str], dtypes: list[torch.dtype], sparsities: list[float]) -> list[Case]:
    """All combinations, each as a first step, as one that replaces another, and as one with old masks."""
    return [
        Case(size, dtype, sparsity, old_masks, replaces=replaces)
        for size, dtype in product(sizes, dtypes)
        for sparsity in sparsities
        for old_masks, replaces in ((False, False), (False, True), (True, False))
    ]


def run(cases: list[Case], rounds: int) -> Iterator[Row]:
    """Validate, then time, every case; inputs are kept while size and dtype stay the same."""
    inputs: Inputs | None = None
    for (size, dtype), group in groupby(cases, lambda case: (case.size, case.dtype)):
        del inputs  # the next ones may need its memory
        inputs = Inputs(SIZES[size], dtype)
        for case in group:
            inputs.begin(case)
            validate(inputs, case, torch.ops.drive.prune_)
            yield measure(inputs, case, rounds)


def columns() -> list[str]:
    """Headings of `cells`: a rival's factor is its time / ours, memory is extra bytes an entry."""
    head = ["entries", "dtype", "sparsity", "call", "ours", "GB/s", f"ours / {YARDSTICK}", "by CPU time"]
    return [*head, *(f"{name} / ours" for name in RIVALS), "extra memory, ours", *RIVALS]


def cells(row: Row) -> list[str]:
    """One row of the table as text."""
    case, ours = row.case, row.seconds[OURS]
    return [
        f"{row.entries / 1e6:.1f} M",
        str(case.dtype).removeprefix("torch."),
        f"{case.sparsity:.1%}",
        case.call,
        f"{ours * 1e3:.1f} ms",
        f"{row.entries * case.bytes_an_entry / ours / 1e9:.1f}",
        f"{ours / row.seconds[YARDSTICK]:.2f}",
        f"{row.cpu[OURS] / row.cpu[YARDSTICK]:.2f}",
        *(f"{row.seconds[name] / ours:.1f}x" for name in RIVALS),
        *(f"{row.memory[name]:.2f}" for name in (OURS, *RIVALS)),
    ]


def markdown(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = [columns(), ["---"] * len(columns()), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Processor, threads, versions and date, in one line."""
    return (
        f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; "
        f"drive {__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{time.strftime('%Y-%m-%d')}"
    )


def processor() -> str:
    """The processor's name, or its architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _time(step: Step) -> tuple[float, float, float]:
    """Seconds of one step, CPU seconds, and its peak resident memory beyond what was there, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory is used again unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    kept_alive = step()  # freeing the result is not part of the step
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    extra = _status("VmHWM") - before
    del kept_alive
    return seconds, cpu, extra


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
