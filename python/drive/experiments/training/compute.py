"""On what, and in what arithmetic, networks are trained and tested."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from drive.experiments.runs.inputs import InputError, require
from drive.masks import Masks
from drive.sparse import convert

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}  # as Fabric calls them


@dataclass(frozen=True)
class Compute:
    """One or several devices and how they compute.

    Attributes:
        device: cpu, cuda or cuda:N.
        precision: of forward and backward passes: float32, or bfloat16 under torch.autocast (weights,
            gradients and optimizer state stay float32).
        channels_last: the memory format of convolutions.
        compile: train with torch.compile. Testing and pruning stay eager.
        sparse_ops: train pruned layers with their surviving weights only, where a cost model says that it
            pays; by a cost model, not by measuring, so that two runs do the same arithmetic.
        devices: how many GPUs, from `device` on, share the batches of a training by DistributedDataParallel
            (BatchNorm sees the part of its own GPU); or how many processes on the CPU. Testing and pruning
            take one.

    Raises:
        InputError: devices that are not here; sparse ops on a GPU, for which there is no cost model.
    """

    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    sparse_ops: bool = False
    devices: int = 1

    def __post_init__(self) -> None:
        if self.sparse_ops and self._kind != "cpu":
            raise InputError(f"--device must be cpu with --sparse-ops, got {self.device}")
        if self._kind == "cuda" and self.devices > 1:
            most = torch.cuda.device_count() - self._first
            if self.devices > most:
                raise InputError(
                    f"--devices must be at most {most} from {self.device} on, got {self.devices}"
                )

    @property
    def _kind(self) -> str:
        return torch.device(self.device).type

    @property
    def _first(self) -> int:
        return torch.device(self.device).index or 0

    def fabric(self) -> Any:
        """A Fabric of lightning's for these devices, in this precision."""
        fabric = require("lightning.fabric")
        for part in ("fabric", "pytorch"):  # or each Fabric says what it was asked for, by one or the other
            logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)
        return fabric.Fabric(
            accelerator=self._kind,
            devices=[self._first + i for i in range(self.devices)] if self._kind == "cuda" else self.devices,
            strategy="ddp_spawn" if self.devices > 1 else "auto",
            precision=PRECISIONS[self.precision],
        )

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in the memory format, in place."""
        model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def autocast(self) -> AbstractContextManager[object]:
        """What a forward pass runs in that is none of Fabric's."""
        return torch.autocast(self._kind, dtype) if (dtype := self.autocast_dtype) else nullcontext()

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

    @property
    def arithmetic(self) -> str:
        """In words: the precision, and whatever else is not as it is by default."""
        flags = {
            "channels_last": self.channels_last, "torch.compile": self.compile,
            "sparse ops": self.sparse_ops, f"{self.devices} devices": self.devices > 1,
        }  # fmt: skip
        return ", ".join([self.precision, *(name for name, given in flags.items() if given)])

    def as_dict(self) -> dict[str, object]:
        """As plain values, and of the device only its type: results do not depend on its number."""
        return {**vars(self), "device": self._kind}


def deterministic(threads: int) -> None:
    """Make results a function of the seeds alone, on this machine with this number of threads."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS picks per call
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
