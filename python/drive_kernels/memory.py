"""Memory that is kept to be used again: drive::new_masks, and how to give it back."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from .library import library, serve

# On a CPU in memory that masks, results and scratch have left (csrc/common/recycle.h): page faults of fresh
# memory take half as long as a pruning step, or several times as long.
library.define(
    "new_masks("
    "Tensor like, "  # on the device of the masks
    "int entries"
    ") -> Tensor"  # [entries] bool, not initialised
)


def reference(like: Tensor, entries: int) -> Tensor:
    """What drive::new_masks means, in plain PyTorch."""
    return like.new_empty(entries, dtype=torch.bool)


serve("new_masks", reference, reference)


def release_memory() -> int:
    """Give the system back what CPU kernels keep unused of their masks, results and scratch.

    It is kept because the pages of new memory cost more than a pruning step: 512 MB at most, in blocks of
    4 MB and more. What tensors still use is not touched. (For a GPU, `torch.cuda.empty_cache` does the same.)

    Returns:
        How many bytes that were.
    """
    compiled = import_module(__package__)._C
    return 0 if compiled is None else int(compiled.release_memory())
