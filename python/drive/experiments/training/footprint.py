"""What a training step takes: memory, time, and energy where the machine says."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import Recipe

_STEPS = 5
# Micro-joules since some time, of the whole first processor, whatever runs on it: Intel's and AMD's RAPL
_ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True)
class Footprint:
    """A step of training on one batch.

    Attributes:
        weights, gradients, state, activations: bytes: of parameters and buffers, of gradients, of the
            optimizer's state, and of what autograd keeps for the backward pass (weights not counted again).
        seconds: median of a few steps.
        joules: mean of these, of the whole processor; None: the machine does not say.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    seconds: float
    joules: float | None

    @property
    def bytes(self) -> int:
        """In all: what is there at the end of a forward pass."""
        return self.weights + self.gradients + self.state + self.activations

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


def measured(model: nn.Module, inputs: Tensor, labels: Tensor, recipe: Recipe) -> Footprint:
    """Of a copy of the model, by the recipe's optimizer: the memory is counted, not sampled."""
    model = copy.deepcopy(model).train()
    optimizer = recipe.make_optimizer(model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(inputs), labels)  # all of it is alive until here
    activations = sum(kept.values())
    loss.backward()
    optimizer.step()
    times, before = [], _joules()
    for _ in range(_STEPS):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    after = _joules()
    joules = None if before is None or after is None or after < before else (after - before) / _STEPS
    state = [t for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return Footprint(_size(tensors), _size(gradients), _size(state), activations, median(times), joules)


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _joules() -> float | None:
    try:
        return int(_ENERGY.read_text()) / 1e6
    except (OSError, ValueError):  # not there, or for the administrator only
        return None
