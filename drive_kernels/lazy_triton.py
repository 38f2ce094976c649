"""Triton where it serves: looked for when ops are registered, imported when one of them first runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def missing() -> str | None:
    return None if find_spec("triton") else "Triton is not installed"


def kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of a module here that imports Triton: `import drive` takes no time for it."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f".{module}", __package__), name)(*arguments)

    return call


def complete(
    library: torch.library.Library, module: str, *names: str
) -> dict[str, dict[str, dict[str, str | None]]]:
    """Registers a module's functions for CUDA where Triton is there, for ops that have no compiled kernel.

    Returns what prune.complete does, for each of these ops.
    """
    triton, reference = missing(), "reference in PyTorch"
    if not triton:
        for name in names:
            library.impl(name, kernel(module, name), "CUDA")
    return {
        f"drive::{name}": {"cpu": {reference: None}, "cuda": {"Triton kernel": triton, reference: None}}
        for name in names
    }
