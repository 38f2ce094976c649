"""The namespace `drive` of PyTorch's ops, and how an op of it is served everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("drive", "DEF")
references: dict[str, Callable[..., Any]] = {}  # by the names of the ops


def serve(name: str, fake: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Give an op that is defined its shape-only version, and a reference in PyTorch for every device.

    Compiled kernels, registered for one device each, go before the reference; autograd goes around both.
    """
    references[name] = reference
    torch.library.register_fake(f"drive::{name}", fake, lib=library)
    library.impl(name, reference, "CompositeExplicitAutograd")
