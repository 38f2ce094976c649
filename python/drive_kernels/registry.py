"""Which implementation serves an op on each device, and what is wrong with the better ones.

References are registered where ops are declared, compiled kernels by the compiled part when it is loaded.
Where an op has no compiled kernel for CUDA, its Triton kernel is registered here; `import drive` does not
import Triton, the first call of such an op does.

Not every GPU can run them: compiled kernels need machine code of its architecture, or PTX that its driver
compiles, and Triton supports compute capability 8.0 and later. This is found out for each GPU when it is
first used, and said in one warning. The compiled part hands over what it cannot run to the op of the same
name in `drive_fallback` (csrc/common/implement.h).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import library
from .linear import block, masked, packed
from .prune import op, shards


class Op(NamedTuple):
    """What there is for an op beside its reference on every device."""

    compiled: Sequence[str]  # devices that csrc has kernels for
    triton: str | None = None  # module here with a kernel for CUDA
    reference: Callable[..., Any] | None = None  # of ops with a kernel for CUDA


OPS = {
    "prune_": Op(("cpu", "cuda"), "prune.triton.launch", op.reference),
    "sparse_conv2d": Op(("cpu",)),
    "sparse_conv2d_backward": Op(("cpu",)),
    "sparse_conv2d_pair": Op(("cpu",)),
    "sparse_linear": Op(("cpu",)),
    "sparse_linear_backward": Op(("cpu",)),
    "shard_sample": Op(("cpu", "cuda"), reference=shards.sample_reference),
    "shard_histogram": Op(("cpu", "cuda"), reference=shards.histogram_reference),
    "shard_survey": Op(("cpu", "cuda"), reference=shards.survey_reference),
    "shard_split": Op(("cpu", "cuda"), reference=shards.split_reference),
    "shard_ties": Op(("cpu", "cuda"), reference=shards.ties_reference),
    "shard_apply_": Op(("cpu", "cuda"), reference=shards.apply_reference),
    "checksum": Op(("cpu", "cuda"), reference=shards.checksum_reference),
    "masked_linear": Op((), "linear.masked_triton", masked.linear_reference),
    "masked_linear_backward": Op((), "linear.masked_triton", masked.linear_backward_reference),
    "masked_conv2d": Op((), "linear.masked_triton", masked.conv2d_reference),
    "masked_conv2d_backward": Op((), "linear.masked_triton", masked.conv2d_backward_reference),
    "packed_linear": Op((), "linear.packed_triton", packed.reference),
    "block_linear": Op((), "linear.block_triton", block.reference),
    "block_linear_backward": Op((), "linear.block_triton", block.backward_reference),
}
COMPILED = {"cpu": "compiled C++ kernel", "cuda": "compiled CUDA kernel"}
TRITON, REFERENCE = "Triton kernel", "reference in PyTorch"
TRITON_NEEDS = 8  # the major of the compute capability

Wrong = dict[str, str | None]  # implementation, best first -> what is wrong with it

# op -> device -> implementations: the first with nothing wrong serves, if a GPU has no faults
implementations: dict[str, dict[str, Wrong]] = {}

_fallbacks = torch.library.Library("drive_fallback", "DEF")


def complete(build_error: str | None) -> None:
    """To be called when the compiled part is loaded, or has failed to: fills `implementations`, and registers
    what serves CUDA where no compiled kernel does."""
    no_triton = None if find_spec("triton") else "Triton is not installed"
    for name, (compiled, triton, _) in OPS.items():
        op = implementations[f"drive::{name}"] = {
            device: {COMPILED[device]: _compiled(name, device, build_error)} if device in compiled else {}
            for device in COMPILED
        }
        if triton:
            if None not in op["cuda"].values() and not no_triton:
                library.impl(name, _best_on_gpu(name), "CUDA")
            op["cuda"][TRITON] = no_triton
        for device in op.values():
            device[REFERENCE] = None
        if "cuda" in compiled:
            schema = str(getattr(torch.ops.drive, name).default._schema)
            _fallbacks.define(schema.removeprefix("drive::"))
            _fallbacks.impl(name, _best_on_gpu(name), "CUDA")


def on_gpu(op: str, gpu: int) -> Wrong:
    """The implementations of an op, drive::..., for one GPU."""
    return {
        implementation: wrong or faults(gpu).get(implementation)
        for implementation, wrong in implementations[op]["cuda"].items()
    }


@cache
def faults(gpu: int) -> dict[str, str]:
    """Why a GPU cannot run a kind of kernels."""
    found = {}
    compiled: ModuleType | None = import_module(__package__)._C
    if compiled is not None and hasattr(compiled, "why_not_served") and (why := compiled.why_not_served(gpu)):
        architectures = compiled.build_info()["gpu architectures"]
        found[COMPILED["cuda"]] = f"it was compiled for {architectures} ({why})"
    major, minor = torch.cuda.get_device_capability(gpu)
    if major < TRITON_NEEDS:
        found[TRITON] = f"Triton supports compute capability {TRITON_NEEDS}.0 and later, got {major}.{minor}"
    return found


def _compiled(name: str, device: str, build_error: str | None) -> str | None:
    if build_error is not None:
        return f"the compiled part is not loaded ({build_error})"
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"drive::{name}", device.upper())
    return None if there else f"the compiled part was built without a {device.upper()} kernel"


def _best_on_gpu(name: str) -> Callable[..., Any]:
    """An op by Triton, or else by its reference."""

    def call(*arguments: Any) -> Any:
        return _serving(name, _gpu_of(arguments))(*arguments)

    return call


def _gpu_of(arguments: Sequence[Any]) -> int:
    """That of the first tensor on one: it is why an implementation for CUDA was called."""
    leaves = (leaf for a in arguments for leaf in (a if isinstance(a, list) else [a]))
    return next(leaf.get_device() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda)


@cache
def _serving(name: str, gpu: int) -> Callable[..., Any]:
    if faults(gpu):
        _warn(gpu)
    _, triton, reference = OPS[name]
    if triton and on_gpu(f"drive::{name}", gpu)[TRITON] is None:
        call: Callable[..., Any] = getattr(import_module(f".{triton}", __package__), name)
        return call
    assert reference is not None, f"{name} has a kernel for CUDA"
    return reference


@cache
def _warn(gpu: int) -> None:
    which = f"cuda:{gpu}, {torch.cuda.get_device_name(gpu)}"
    reasons = "; ".join(f"no {kind}, because {why}" for kind, why in faults(gpu).items())
    warnings.warn(f"drive: slower implementations serve {which} (see drive info): {reasons}", stacklevel=1)
