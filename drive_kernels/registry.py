"""Which implementation serves an op on each device, and what is wrong with the better ones.

References are registered where ops are declared, compiled kernels by the compiled part when it is loaded.
Triton kernels are registered here, for CUDA, where there is no compiled one; `import drive` does not import
Triton, the first call of such an op does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from .prune import _library

# op -> devices that csrc has kernels for, and the module here with one in Triton
OPS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "prune_": (("cpu", "cuda"), "prune_triton"),
    "sparse_conv2d": (("cpu",), None),
    "sparse_conv2d_backward": (("cpu",), None),
    "sparse_conv2d_pair": (("cpu",), None),
    "sparse_linear": (("cpu",), None),
    "sparse_linear_backward": (("cpu",), None),
    "shard_sample": (("cpu",), None),
    "shard_histogram": (("cpu",), None),
    "shard_survey": (("cpu",), None),
    "shard_ties": (("cpu",), None),
    "shard_apply_": (("cpu",), None),
    "checksum": (("cpu",), None),
    "masked_linear": ((), "masked_triton"),
    "masked_linear_backward": ((), "masked_triton"),
    "masked_conv2d": ((), "masked_triton"),
    "masked_conv2d_backward": ((), "masked_triton"),
    "packed_linear": ((), "packed_triton"),
    "block_linear": ((), "block_triton"),
    "block_linear_backward": ((), "block_triton"),
}
COMPILED = {"cpu": "compiled C++ kernel", "cuda": "compiled CUDA kernel"}
TRITON, REFERENCE = "Triton kernel", "reference in PyTorch"

Found = dict[str, dict[str, dict[str, str | None]]]


def complete(build_error: str | None) -> Found:
    """To be called when the compiled part is loaded, or has failed to: registers Triton where it is needed.

    Returns for each op and device its implementations, best first, and what is wrong with each of them: the
    first with nothing wrong, None, is what the dispatcher picks.
    """
    no_triton = None if find_spec("triton") else "Triton is not installed"
    found: Found = {}
    for name, (compiled, triton) in OPS.items():
        op = found[f"drive::{name}"] = {
            device: {COMPILED[device]: _compiled(name, device, build_error)} if device in compiled else {}
            for device in COMPILED
        }
        if triton:
            if None not in op["cuda"].values() and not no_triton:
                _library.impl(name, _lazily(triton, name), "CUDA")
            op["cuda"][TRITON] = no_triton
        for implementations in op.values():
            implementations[REFERENCE] = None
    return found


def _compiled(name: str, device: str, build_error: str | None) -> str | None:
    if build_error is not None:
        return f"the compiled part is not loaded ({build_error})"
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"drive::{name}", device.upper())
    return None if there else f"the compiled part was built without a {device.upper()} kernel"


def _lazily(module: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return getattr(import_module(f".{module}", __package__), name)(*arguments)

    return call
