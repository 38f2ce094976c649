"""What a step on a GPU costs on paper: docs/gpu-passes.md, from the compiled kernels and what they move.

python -m benchmarks.gpu.step.passes --out docs/gpu-passes.md
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import drive_kernels
from benchmarks.pages import markdown
from drive.experiments.bench.workload import Shapes, resnet18_shapes, vgg16_shapes
from drive.files import write_atomic

# Of an H200: 4.8 TB/s of HBM3e, of which copies reach seven eighths; four schedulers in each of 132
# multiprocessors at 1.755 GHz; what lies between two kernels of which one needs what the other left.
BANDWIDTH, ISSUE, LAUNCH = 4.2e12, 132 * 4 * 1.755e9, 2e-6
REGISTERS, SHARED, WARPS = 65536, 228 << 10, 64  # of a multiprocessor
VECTOR = 16  # bytes of a load
BLOCK_WARPS, BLOCK_SHARED = 8, 1 << 10  # a block's; what the system takes of shared memory for it

SIZES: dict[str, Shapes] = {
    "11 M": resnet18_shapes(),
    "138 M": vgg16_shapes(),
    "1 B": [*vgg16_shapes(7), *resnet18_shapes() * 3],
}
DTYPES = {"float32": 4, "bfloat16": 2}
SAMPLES = 1 << 17
SPARSITY = 0.9
# Of the entries, inside a bracket of 5 sigma on both sides.
LISTED = 10 * (SPARSITY * (1 - SPARSITY) / SAMPLES) ** 0.5
SECTOR = 32  # bytes that DRAM reads or writes at once
ARGUMENTS, ITEM, DIM = 4000, 104, 56  # bytes that one `upload` carries; of the work list, for each tensor


@dataclass(frozen=True)
class Pass:
    """Launches of a kernel, and the bytes that they move an entry of `b` bytes in a step to 90 %."""

    kernel: str
    launches: int
    reads: str
    writes: str
    moved: Callable[[int], float]


PASSES = (
    Pass("sample", 1, "2^17 entries", "their keys", lambda b: 0),
    Pass("narrow", 2, "2^17 keys", "", lambda b: 0),
    Pass("survey", 1, "theta, G", "a bit; keys inside the bracket", lambda b: 2 * b + 1 / 8 + 6 * LISTED),
    Pass("count", 3, "keys inside", "", lambda b: 3 * 4 * LISTED),
    Pass("ties", 1, "nothing, or keys inside", "", lambda b: 0),
    Pass("cut", 1, "", "", lambda b: 0),
    Pass("apply_list", 1, "theta, bits; keys inside", "theta, mask", lambda b: 2 * b + 9 / 8 + 6 * LISTED),
    Pass("apply_keys", 1, "", "", lambda b: 0),
    Pass("finish", 1, "", "", lambda b: 0),
)


@dataclass(frozen=True)
class Resources:
    registers: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks on a multiprocessor at a time."""
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256 * BLOCK_WARPS)
        return min(by_registers, SHARED // (self.shared + BLOCK_SHARED), WARPS // BLOCK_WARPS)


def cuobjdump(*options: str) -> str:
    """Of the compiled part; the tool comes with Triton."""
    if drive_kernels._C is None:
        raise SystemExit(f"passes.py: needs the compiled part: {drive_kernels.build_error}")
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise SystemExit("passes.py: needs Triton, for its cuobjdump")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), *options, str(drive_kernels._C.__file__)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"passes.py: needs a part compiled for CUDA: {run.stderr.strip()}")
    return run.stdout


def is_of(kernel: str, function: str) -> bool:
    """The version for float32 scores of all tensors, which cost 1 each."""
    return re.search(rf"\d{kernel}I(iEE|iLNS0_5StageE0E(Lb0E)?E)", function) is not None


def resources(architecture: str) -> dict[str, Resources]:
    found = {}
    report = cuobjdump("-res-usage", "-arch", architecture)
    for function, registers, shared in re.findall(r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", report):
        for each in PASSES:
            if is_of(each.kernel, function):
                found[each.kernel] = Resources(int(registers), int(shared))
    return found


def instructions(architecture: str) -> float:
    """The survey's for an entry: of its loops through two loaded vectors the longest, a product an entry.

    Those that scale have two products an entry.
    """
    functions = cuobjdump("--dump-sass", "-arch", architecture).split("Function : ")[1:]
    survey = next(part for part in functions if is_of("survey", part.split("\n")[0]))
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", survey)]
    place = {at: i for i, (at, _) in enumerate(code)}
    found = 0.0
    for i, (at, text) in enumerate(code):
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        begin = place.get(int(target[1], 16)) if target else None
        if begin is None or int(target[1], 16) >= at:
            continue
        loop = [text for _, text in code[begin : i + 1]]
        products = sum("FMUL" in text for text in loop)
        if products >= 2 * VECTOR // max(DTYPES.values()) and not any("LDG" in text for text in loop):
            found = max(found, len(loop) / products)
    return found


def bytes_of_step(itemsize: int) -> float:
    """An entry."""
    return sum(each.moved(itemsize) for each in PASSES)


def bytes_in_triton(itemsize: int) -> float:
    """Two bits an entry are written and read; keys written, and read for each of four digits and at last."""
    return 4 * itemsize + 1 + 2 * 2 / 8 + 6 * 4 * LISTED


def in_part(itemsize: int) -> float:
    """The share of the sectors in which not all entries are pruned, if the survivors lie at random."""
    return 1 - SPARSITY ** (SECTOR // itemsize)


# Bytes that a step moves an entry, if apply_list reads the weights and if it only writes zeros.
WAYS: dict[str, Callable[[int], float]] = {
    "read (as it is)": bytes_of_step,
    "not read; a sector in part costs what a whole one does": lambda b: bytes_of_step(b) - b,
    "not read; a sector in part is read, filled up, written": lambda b: bytes_of_step(b) - b + b * in_part(b),
    "not read; survivors fill whole sectors": lambda b: bytes_of_step(b) - b - b * (1 - SPARSITY),
}


def launches(tensors: int) -> int:
    """Of a step: a memset, the work list, the passes."""
    uploads = sum(-(-tensors * size // ARGUMENTS) for size in (ITEM, DIM))
    return 1 + uploads + sum(each.launches for each in PASSES)


def expected(shapes: Shapes, itemsize: int, an_entry: float) -> tuple[int, float, float, float]:
    """Launches, bytes an entry, milliseconds of a step, and how many times torch.mul's."""
    entries = sum(map(math.prod, shapes))
    count, moved = launches(len(shapes)), bytes_of_step(itemsize)
    survey = next(each for each in PASSES if each.kernel == "survey").moved(itemsize)
    busy = max(entries * survey / BANDWIDTH, entries * an_entry / 32 / ISSUE)
    seconds = busy + entries * (moved - survey) / BANDWIDTH + SAMPLES * 64 / BANDWIDTH + count * LAUNCH
    yardstick = 3 * itemsize * entries / BANDWIDTH + LAUNCH
    return count, moved, seconds * 1e3, seconds / yardstick


PAGE = """# A step on a GPU, on paper

What `drive::prune_` launches for a first step to 90 % in float32 (csrc/prune/cuda/prune.cu), with the
registers and shared memory of its kernels as compiled for {architecture}. **Nothing here was measured on
a GPU**: `make gpu` measures ([gpu.md](gpu.md)). Made by
`python -m benchmarks.gpu.step.passes --out docs/gpu-passes.md`.

{passes}

Bytes are those an entry; what is sampled or counted by chunk is a hundredth of one at most. Before these a
step clears 0.2 MB and sends the work list as kernel arguments, 4000 bytes a launch: {item} a tensor, {dim} a
dimension of its walk. Where old masks are read, the survey moves one byte more. `apply_keys` returns at
once where `apply_list` works. `min_keep` adds 8 launches, 14 if a tensor has 2^18 entries or more, which
return at once where no tensor falls below it; where one does, all entries are read eight times more.
With costs (`drive::prune_to_cost_`) it is one launch more, two with `min_keep`, and the list has room for one
entry of 16 in place of 64; where scores are scaled, the survey has two instructions an entry more.

With {bandwidth:.1f} TB/s (an H200's copies), and {launch:.0f} us from a launch to the next. The survey has
{an_entry:.0f} instructions an entry, at four a cycle and multiprocessor, and takes their time or its bytes',
whichever is longer.

{expected}

At 11 M half of the time lies between launches; a CUDA graph shortens that.

In Triton (python/drive_kernels/prune/triton/launch.py), two bits an entry take the place of one bit and of
the positions in the list: {triton} bytes an entry.

## Weights that are not read

`apply_list` reads the weights only to write them back beside zeros. It could store zeros where an entry is
pruned, and nothing elsewhere. DRAM moves sectors of {sector} bytes, though: at 90 % all but 0.1^8 of those of
8 float32 entries lose some, and are written as now; and if survivors lie at random, {float32} of them (of
bfloat16's, of 16 entries, {bfloat16}) are written in part only.

{ways}

These are figures on paper, too: only a GPU can say whether a store of a sector in part costs no more than
another. `make gpu` measures the step as it is. Later steps have less to gain: most vectors of 16 bytes do not
change and are not written, and to know that without the weights takes a third bit, "pruned before".
"""


def page(architecture: str) -> str:
    used, an_entry = resources(architecture), instructions(architecture)
    passes = []
    for each in PASSES:
        need = used[each.kernel]
        share = f"{need.blocks} ({100 * need.blocks * BLOCK_WARPS // WARPS} %)"
        moved = [f"{each.moved(b):.2f}" if each.moved(b) else "" for b in DTYPES.values()]
        numbers = [str(need.registers), f"{need.shared / 1024:.1f}", share]
        passes.append([each.kernel, str(each.launches), each.reads, each.writes, *moved, *numbers])
    rows = []
    for name, shapes in SIZES.items():
        for dtype, itemsize in DTYPES.items():
            count, moved, milliseconds, ratio = expected(shapes, itemsize, an_entry)
            rows.append([name, dtype, str(count), f"{moved:.1f}", f"{milliseconds:.3g}", f"{ratio:.2f}"])
    return PAGE.format(
        architecture=architecture, item=ITEM, dim=DIM, bandwidth=BANDWIDTH / 1e12, launch=LAUNCH * 1e6,
        an_entry=an_entry,
        passes=markdown(
            ["pass", "launches", "reads", "writes", *(f"bytes, {dtype}" for dtype in DTYPES), "registers",
             "shared memory, KB", "blocks a multiprocessor (of its threads)"], passes),
        expected=markdown(
            ["entries", "dtype", "launches", "bytes an entry", "ms", "ratio to torch.mul"], rows),
        **beside(),
    )  # fmt: skip


def beside() -> dict[str, object]:
    """What the page says of other ways to do a step: nothing that is compiled has a part in it."""
    ways = []
    for name, each in WAYS.items():
        cells = [f"{each(b):.1f} ({each(b) / (3 * b):.2f})" for b in DTYPES.values()]
        ways.append([name, *cells])
    return {
        "triton": " or ".join(f"{bytes_in_triton(b):.1f} ({dtype})" for dtype, b in DTYPES.items()),
        "sector": SECTOR,
        **{dtype: f"{100 * in_part(b):.0f} %" for dtype, b in DTYPES.items()},
        "ways": markdown(["weights", *(f"bytes, {dtype} (to torch.mul's)" for dtype in DTYPES)], ways),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--architecture", default="sm_90")
    options = parser.parse_args()
    write_atomic(options.out, page(options.architecture).encode())


if __name__ == "__main__":
    main()
