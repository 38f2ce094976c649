"""How Triton kernels are launched, in a CUDA graph too."""

from __future__ import annotations

from typing import Any

import torch


def launch_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the kernel is not on the GPU yet. CUDA would refuse
            to load it, and invalidate the capture. Nothing was computed: what is captured does not run.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        loaded = kernel.warmup(grid=grid, **arguments).module  # compiles, where need be, and loads nothing
        if loaded is None:
            raise RuntimeError(
                f"drive: Triton kernel {kernel.__name__} cannot be loaded while a CUDA graph is captured: "
                "make the same call once before"
            )
    kernel[grid](**arguments)
