"""On what, and in what arithmetic, networks are trained and tested."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .masks import Masks
from .sparse import convert

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Compute:
    """One device and how it computes.

    Attributes:
        device: cpu, cuda or cuda:N.
        precision: of forward and backward passes: float32, or bfloat16 under torch.autocast (weights,
            gradients and optimizer state stay float32).
        channels_last: the memory format of convolutions.
        compile: train with torch.compile. Testing and pruning stay eager.
        sparse_ops: train pruned layers with their surviving weights only, where a cost model says that it
            pays; by a cost model, not by measuring, so that two runs do the same arithmetic.
    """

    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    sparse_ops: bool = False

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in the memory format, in place."""
        model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def autocast(self) -> AbstractContextManager[object]:
        """What a forward pass and its loss run in."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """`autocast` of `drive.prune`."""
        return None if self.precision == "float32" else torch.bfloat16

    def for_training(self, model: nn.Module, masks: Masks | None, images: Tensor) -> nn.Module:
        """What to call in place of the model; it has the model's own parameters.

        Args:
            images: of a batch's shape.
        """
        running = model
        if self.sparse_ops and masks:
            model.train()
            running = convert(model, masks, images, deterministic=True)
        return cast(nn.Module, torch.compile(running)) if self.compile else running

    def as_dict(self) -> dict[str, object]:
        """As plain values, and of the device only its type: results do not depend on its number."""
        return {**vars(self), "device": torch.device(self.device).type}


def deterministic(threads: int) -> None:
    """Make results a function of the seeds alone, on this machine with this number of threads."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS picks per call
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
