"""A pruned Linear on a GPU, dense and sparse: sparse.md in a folder.

python -m benchmarks.gpu.sparse --out docs/results/nvidia-h200 --minutes 1

The file is complete after each case: it can be stopped at any time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import pages
from benchmarks.gpu.step.measure import CpuMeter, CudaMeter, Meter
from drive.files import write_atomic
from drive.layers import Weight
from drive.sparse import gpu
from drive.targets.structures import structure

SIZE = 4096  # inputs and outputs
BLOCK = "32x32"
ROWS = (1, 16, 256, 4096)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of the largest output; two roundings of bfloat16

HEADER = """# A pruned Linear on {device}

{facts}

{size} inputs and outputs, inference. Medians of {rounds} runs in milliseconds by CUDA events, all providers
in turn; before every run four times the L2 cache is overwritten, so that weights come from memory. In
brackets: how many times faster than dense, `F.linear` with the zeros in the weight; float32 is without TF32.
Every output was compared with the float64 product first.

packed: `torch.ops.drive.packed_linear`, unstructured masks. blocks: `torch.ops.drive.block_linear`, masks of
32x32. masked: `torch.ops.drive.masked_linear`. 2:4: `torch.sparse.to_sparse_semi_structured`.

"""


@dataclass(frozen=True)
class Case:
    rows: int
    sparsity: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """Median seconds of each provider, or in a word why there are none."""

    case: Case
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Unavailable(Exception):
    """Why a provider has no part in a case."""


Step = Callable[[], Tensor]


def layer(mask: Tensor, dtype: torch.dtype) -> nn.Linear:
    generator = torch.Generator(mask.device).manual_seed(0)
    found = nn.Linear(mask.shape[1], mask.shape[0], device=mask.device, dtype=dtype).requires_grad_(False)
    found.weight.normal_(generator=generator).mul_(mask)
    return found


def unstructured(size: int, sparsity: float, device: str) -> Tensor:
    return torch.rand(size, size, device=device) >= sparsity


def blocks(size: int, sparsity: float, device: str) -> Tensor:
    found = structure(BLOCK)
    assert found is not None
    return found.expand(unstructured(size // 32, sparsity, device), Weight())


def two_of_four(size: int, sparsity: float, device: str) -> Tensor:
    if sparsity != 0.5:
        raise Unavailable("50 % only")
    return torch.rand(size, size // 4, 4, device=device).argsort(-1).lt(2).flatten(1)


def dense(module: nn.Linear, mask: Tensor, x: Tensor) -> Step:
    return partial(F.linear, x, module.weight, module.bias)


def masked(module: nn.Linear, mask: Tensor, x: Tensor) -> Step:
    if not hasattr(torch.ops.drive, "masked_linear"):
        raise Unavailable("no such op")
    return partial(torch.ops.drive.masked_linear, x, module.weight, mask, module.bias)


def sparse(name: str, module: nn.Linear, mask: Tensor, x: Tensor) -> Step:
    kind = gpu.KINDS[name]
    if why := kind.reason_against(module, mask):
        raise Unavailable(why)
    return partial(kind.from_dense(module, mask), x)


PROVIDERS = {
    "dense": (unstructured, dense),
    "packed": (unstructured, partial(sparse, "packed")),
    "blocks": (blocks, partial(sparse, "blocks")),
    "masked": (unstructured, masked),
    "2:4": (two_of_four, partial(sparse, "2:4")),
}


def check(step: Step, module: nn.Linear, x: Tensor) -> None:
    expected = F.linear(x.double(), module.weight.double(), module.bias.double())
    error = (step().double() - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE[x.dtype]:  # nor NaN
        raise AssertionError(f"WRONG by {error:.1g}")


@torch.no_grad()
def measure(case: Case, size: int, device: str, meter: Meter, rounds: int) -> Row:
    torch.manual_seed(0)
    x = torch.randn(case.rows, size, device=device).to(case.dtype)
    row, steps = Row(case), {}
    for name, (mask_of, prepare) in PROVIDERS.items():
        try:
            mask = mask_of(size, case.sparsity, device)
            module = layer(mask, case.dtype)
            step = prepare(module, mask, x)
            check(step, module, x)
            steps[name] = step
        except (Unavailable, AssertionError, NotImplementedError, RuntimeError) as error:
            row.notes[name] = str(error).splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(meter.times(step).device)
    row.seconds.update({name: median(found) for name, found in times.items()})
    return row


COLUMNS = ["rows, sparsity, dtype", "dense, ms", *(name for name in PROVIDERS if name != "dense")]


def cells(row: Row) -> list[str]:
    case = row.case
    found = [f"{case.rows}, {case.sparsity:.0%}, {str(case.dtype).removeprefix('torch.')}"]
    for name in PROVIDERS:
        seconds = row.seconds.get(name)
        if seconds is None:
            found.append("WRONG" if row.notes[name].startswith("WRONG") else "-")
        elif name == "dense" or "dense" not in row.seconds:
            found.append(f"{seconds * 1e3:.4g}")
        else:
            found.append(f"{seconds * 1e3:.4g} ({row.seconds['dense'] / seconds:.2f})")
    return found


def report(rows: list[Row]) -> str:
    """The table, and each note once."""
    notes = {f"- {name}: {note}": None for row in rows for name, note in row.notes.items()}
    return "\n\n".join(filter(None, [pages.markdown(COLUMNS, [*map(cells, rows)]), "\n".join(notes)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=60, help="begin no case after these")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return
    deadline = time.monotonic() + 60 * options.minutes
    facts = pages.facts(options.device)
    header = HEADER.format(
        device=facts.pop("device"), facts=", ".join(f"{name} {value}" for name, value in facts.items()),
        size=options.size, rounds=options.rounds,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    meter = CudaMeter() if options.device == "cuda" else CpuMeter()
    rows: list[Row] = []
    for rows_, dtype, sparsity in product(ROWS, DTYPES, SPARSITIES):
        if time.monotonic() > deadline:
            print("no time was left for the other cases")
            break
        case = Case(rows_, sparsity, dtype)
        rows.append(measure(case, options.size, options.device, meter, options.rounds))
        write_atomic(options.out / "sparse.md", f"{header}{report(rows)}\n".encode())
        print(" | ".join(cells(rows[-1])), flush=True)
    print(report(rows))
    if wrong := [row for row in rows if any(note.startswith("WRONG") for note in row.notes.values())]:
        raise SystemExit(f"wrong outputs in {len(wrong)} of {len(rows)} cases")


if __name__ == "__main__":
    main()
