"""Which implementation serves an op on each device, and what is wrong with the better ones.

References are registered where ops are declared, compiled kernels by the compiled part when it is loaded.
Where an op has no compiled kernel for CUDA, its Triton kernel is registered here; `import drive` does not
import Triton, the first call of such an op does.

Not every GPU can run them: compiled kernels need machine code of its architecture, or PTX that its driver
compiles, and Triton supports compute capability 8.0 and later. This is found out for each GPU when it is
first used, and said in one warning. The compiled part hands over what it cannot run to the op of the same
name in `drive_fallback` (csrc/common/implement.h). That there is no compiled part at all is logged as a
warning, where it would first have served.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import library, references

_log = logging.getLogger(__name__)


class Op(NamedTuple):
    """What there is for an op beside its reference on every device."""

    compiled: Sequence[str]  # devices that csrc has kernels for
    triton: str | None = None  # module here with a kernel for CUDA


OPS = {
    "prune_": Op(("cpu", "cuda"), "prune.triton.launch"),
    "sparse_conv2d": Op(("cpu",)),
    "sparse_conv2d_backward": Op(("cpu",)),
    "sparse_linear": Op(("cpu",)),
    "sparse_linear_backward": Op(("cpu",)),
    "prune_to_cost_": Op(("cpu", "cuda"), "prune.triton.launch"),
    "new_masks": Op(("cpu",)),
    "shard_sample": Op(("cpu", "cuda")),
    "shard_histogram": Op(("cpu", "cuda")),
    "shard_survey": Op(("cpu", "cuda")),
    "shard_split": Op(("cpu", "cuda")),
    "shard_ties": Op(("cpu", "cuda")),
    "shard_apply_": Op(("cpu", "cuda")),
    "checksum": Op(("cpu", "cuda")),
    "zero_pruned_": Op(("cpu",)),
    "masked_linear": Op((), "linear.masked_triton"),
    "masked_linear_backward": Op((), "linear.masked_triton"),
    "masked_conv2d": Op((), "linear.masked_triton"),
    "masked_conv2d_backward": Op((), "linear.masked_triton"),
    "packed_linear": Op((), "linear.packed_triton"),
    "block_linear": Op((), "linear.block_triton"),
    "block_linear_backward": Op((), "linear.block_triton"),
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
    for name, (compiled, triton) in OPS.items():
        op = implementations[f"drive::{name}"] = {
            device: {COMPILED[device]: _compiled(name, device, build_error)} if device in compiled else {}
            for device in COMPILED
        }
        if build_error is not None and "cpu" in compiled:
            library.impl(name, _uncompiled(name), "CPU")
        if (triton or "cuda" in compiled) and None not in op["cuda"].values():
            library.impl(name, _best_on_gpu(name), "CUDA")
        if triton:
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


def _uncompiled(name: str) -> Callable[..., Any]:
    """An op by its reference, on the CPU, which lacks its compiled kernel."""

    def call(*arguments: Any) -> Any:
        _say_if_not_compiled()
        return references[name](*arguments)

    return call


@cache
def _say_if_not_compiled() -> None:
    if error := import_module(__package__).build_error:
        _log.warning("drive_kernels is not compiled (%s): slower kernels serve (see drive info)", error)


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
    _say_if_not_compiled()
    if faults(gpu):
        _warn(gpu)
    triton = OPS[name].triton
    if triton and on_gpu(f"drive::{name}", gpu)[TRITON] is None:
        call: Callable[..., Any] = getattr(import_module(f".{triton}", __package__), name)
        return call
    return references[name]


@cache
def _warn(gpu: int) -> None:
    which = f"cuda:{gpu}, {torch.cuda.get_device_name(gpu)}"
    reasons = "; ".join(f"no {kind}, because {why}" for kind, why in faults(gpu).items())
    warnings.warn(f"drive: slower implementations serve {which} (see drive info): {reasons}", stacklevel=1)
