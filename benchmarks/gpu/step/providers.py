"""Who is timed on a GPU: ours, PyTorch's ways to the same masks, cub's selection, and the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.step import cub_topk
from drive.experiments.bench import step as bench
from drive.experiments.bench.step import Step
from drive.experiments.bench.workload import CHUNK, Case, Inputs, implementation
from drive.fused import fused_drive_prune
from drive.reference import drive_prune
from drive_kernels.prune.op import kth_by_kthvalue

ONE_BLOCK = 20_000_000  # entries above which kthvalue, one block of threads, would hold everyone up


class Unavailable(Exception):
    """Why a provider has no part in a case."""


@dataclass(frozen=True)
class Provider:
    """One column of the table."""

    name: str
    prepare: bench.Provider
    once: bool = False  # prepared once a case, not before every run: that is expensive


def op(name: str, inputs: Inputs, case: Case) -> Step:
    """drive::prune_ itself: the masks are there already."""
    return partial(implementation(name, inputs.device), *inputs.arguments(case))


def api(inputs: Inputs, case: Case) -> Step:
    """fused_drive_prune as a training loop calls it, without reading anything back."""
    implementation("compiled", inputs.device)  # else the dispatcher takes another
    return bench.step(fused_drive_prune, check_finite=False)(inputs, case)


def graph(inputs: Inputs, case: Case) -> Step:
    """The op, captured once: its time is the device's alone."""
    if inputs.device != "cuda":
        raise Unavailable("graphs are CUDA's")
    step, captured = op("compiled", inputs, case), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def kth_by_sort(keys: Tensor, k: int) -> Tensor:
    return keys.sort().values[keys.numel() - k]


def kthvalue(inputs: Inputs, case: Case) -> Step:
    if inputs.entries > ONE_BLOCK:
        raise Unavailable("one block of threads ranks the whole vector: small sizes only")
    return bench.step(drive_prune, kth_largest=kth_by_kthvalue)(inputs, case)


def cub(inputs: Inputs, case: Case) -> Step:
    """The selection alone, on scores that are stored already."""
    if case.old_masks:
        raise Unavailable("knows no masks: first steps only")
    if inputs.device != "cuda":
        raise Unavailable("CUDA only")
    cub_topk.load()
    scores = torch.empty_like(inputs.start, dtype=torch.float32)
    parts = (tensor.split(CHUNK) for tensor in (scores, inputs.start, inputs.grad))
    for score, start, grad in zip(*parts, strict=True):
        torch.mul(start.float(), grad.float(), out=score).abs_()
    return partial(cub_topk.top_k, scores, inputs.entries - round(case.sparsity * inputs.entries))


YARDSTICK, COMPILED, API, GRAPH, TRITON = "torch.mul", "CUDA", "CUDA API", "CUDA graph", "Triton"
CHECKED = {COMPILED: "compiled", TRITON: "triton"}  # whose masks are validated before they are timed
PYTORCH = ("topk", "sort", "kthvalue", "global_unstructured")
CUB = "cub::DeviceTopK"
OURS = (
    Provider(YARDSTICK, bench.mul),
    Provider(COMPILED, partial(op, "compiled")),
    Provider(API, api),
    Provider(GRAPH, graph, once=True),
    Provider(TRITON, partial(op, "triton")),
)
RIVALS = (
    Provider("topk", bench.step(drive_prune)),
    Provider("sort", bench.step(drive_prune, kth_largest=kth_by_sort)),
    Provider("kthvalue", kthvalue),
    Provider("global_unstructured", bench.global_unstructured),
    Provider(CUB, cub, once=True),
)
PROVIDERS = (*OURS, *RIVALS)
