"""Compiles beforehand, on all cores, what the tests and benchmarks on a GPU would compile one by one.

TORCH_CUDA_ARCH_LIST=9.0 python -m benchmarks.gpu.kernels

That is Triton's kernels, and cub's selection. The launches are found by the same calls on CPU tensors, where
nothing runs. Each is then compiled as its launch on the device will be, into Triton's cache: by Triton's own
code with the same arguments, for a driver that knows no more than the architecture.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import torch

from benchmarks import ROOT

sys.path.append(str(ROOT / "tests" / "helpers"))

from linear_cases import BlockCase, PackedCase
from masked_cases import CASES, TOLERANCE, Case
from ugly import Step, laid_out, sample_inputs, to_cost

from benchmarks.gpu import sparse
from benchmarks.gpu.stages import script
from drive_kernels.linear import block, packed

HALVES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = (False, True)


class Device:
    """As much of a driver as compiling takes."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def prune_steps() -> None:
    """drive::prune_ and drive::prune_to_cost_, also with the bracket that a test gives them."""
    from drive_kernels.prune.triton import host, launch

    dense = []  # in row-major order and not
    for dtype, layout in product((torch.float32, torch.float64), ("contiguous", "channels_last")):
        weight, grad, mask = (
            laid_out(torch.ones(40, 30, 3, 3, dtype=t), layout) for t in (dtype, dtype, torch.bool)
        )
        dense.append(Step([weight], [grad], [], [mask], True, 1, 0))
    for sigmas in (host.TUNING.sigmas, 0.0):
        with mock.patch.object(host, "TUNING", host.TUNING._replace(sigmas=sigmas)):
            for step, fresh, min_keep in product((*sample_inputs(), *dense), BOTH, (0, 1)):
                same = replace(step, fresh=fresh, min_keep=min_keep).clone()
                launch.prune_(*same.args())
                launch.prune_to_cost_(*to_cost(same, [2] * len(same.weights), 0.5, 0.5).args())


def masked_layers() -> None:
    """As test_masked.py has them on a device."""
    from drive_kernels.linear import masked_triton

    def call(case: Case, dtype: torch.dtype, learned: bool) -> None:
        tensors = case.tensors(dtype, learned)
        output = getattr(masked_triton, case.name)(*tensors, *case.options)
        backward = getattr(masked_triton, f"{case.name}_backward")
        for needed in (
            (True, True, learned, True),
            (False, learned, False, False),
            (False, False, learned, False),
        ):
            backward(output, *tensors[:3], *case.options, list(needed))

    for case, dtype, learned in product(CASES, TOLERANCE, BOTH):
        if dtype != torch.float64:  # left to PyTorch
            call(case, dtype, learned)
    large = Case((16, 72, 28, 28), (136, 72, 3, 3), padding=(1, 1), layout="channels_last")
    for narrow in (masked_triton.TUNING.narrow, 0):
        with mock.patch.object(masked_triton, "TUNING", masked_triton.TUNING._replace(narrow=narrow)):
            for case, dtype in product((Case((1000, 520), (390, 520)), large), HALVES[:2]):
                call(case, dtype, True)


def sparse_layers() -> None:
    """As test_gpu_linear_triton.py has them on a device."""
    from drive_kernels.linear import block_triton, packed_triton

    for rows, dtype in product((1, 3, 16, 100), HALVES):
        for shape in ((1024, 1024), (70, 130)):
            packed_triton.packed_linear(*PackedCase(rows, *shape, 0.1, dtype).arguments())
        for size in block.BLOCKS:
            case = BlockCase(rows, 256, 512, size, 0.5, dtype)
            block_triton.block_linear(*case.arguments())
            block_triton.block_linear_backward(*case.backward_arguments())


def measured_layers() -> None:
    """As sparse.py has them."""
    from drive_kernels.linear import block_triton, masked_triton, packed_triton

    size = sparse.SIZE
    mask = sparse.blocks(size, 0.9, "cpu")
    blocks = block.block_of(mask)
    assert blocks is not None
    pattern = block.pattern_of(mask, blocks)
    for dtype in sparse.DTYPES:
        layer = sparse.layer(mask, dtype)
        bits = packed.pack(layer.weight, mask)
        for rows in sparse.ROWS:
            x = torch.ones(rows, size, dtype=dtype)
            packed_triton.packed_linear(x, *bits, layer.bias, [size, size])
            block_triton.block_linear(x, layer.weight, pattern, layer.bias, blocks)
            masked_triton.masked_linear(x, layer.weight, mask, layer.bias)


SOURCES = (prune_steps, masked_layers, sparse_layers, measured_layers)
Launch = tuple[Any, dict[str, object]]  # a kernel, and its arguments by name


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that are made meanwhile, one of each kind; the kernels do not run."""
    import ahead_of_time
    from triton.runtime.jit import JITFunction

    found: dict[object, Launch] = {}

    def record(kernel: Any, grid: tuple[int, ...], warmup: bool, **arguments: object) -> None:
        found.setdefault(ahead_of_time.Launch.of(kernel, arguments), (kernel, arguments))

    launches: list[Launch] = []
    with mock.patch.object(JITFunction, "run", record):
        yield launches
    launches += found.values()


_launches: list[Launch] = []  # of a process that compiles


def _begin(launches: list[Launch], capability: int) -> None:
    from triton.runtime import driver

    _launches.extend(launches)
    driver.set_active(Device(capability))


def _compile(index: int) -> bool:
    """Into the cache. Was it there already?"""
    from triton import knobs

    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    kernel, arguments = _launches[index]
    kernel.run(grid=None, warmup=True, **arguments)
    return all(hits)


def compile_all(launches: list[Launch], capability: int, processes: int) -> int:
    """How many were there already. Processes are forked: what was recorded need not travel."""
    fork = multiprocessing.get_context("fork")
    with fork.Pool(processes, _begin, (launches, capability)) as pool:
        return sum(pool.imap_unordered(_compile, range(len(launches))))


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", "")  # who asks CUDA for it cannot fork
    if not re.fullmatch(r"\d+\.\d", arch):
        raise SystemExit(f"kernels.py: TORCH_CUDA_ARCH_LIST must be the GPU's, 9.0 say, got {arch!r}")
    cub = subprocess.Popen(script("step.cub_topk"))
    begin = time.monotonic()
    try:
        with recorded() as launches:
            for source in SOURCES:
                source()
    except ImportError as error:
        print(error)
        cub.wait()
        return
    processes = os.cpu_count() or 1
    found = compile_all(launches, int(arch.replace(".", "")), processes)
    cub.wait()
    seconds = time.monotonic() - begin
    print(f"{len(launches)} kernels of Triton on {processes} cores, {found} were there, {seconds:.0f} s")


if __name__ == "__main__":
    main()
