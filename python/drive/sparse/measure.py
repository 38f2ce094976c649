"""Times of a layer's and a model's candidates, interleaved; and a cost model for those who cannot measure."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .layers import SparseConv2d

CHANNELS_LAST = "dense channels_last"

# Rounds of a measurement: until so many, or until so many seconds have gone by (but always three).
_ROUNDS, _SECONDS = 15, 0.5

Run = Callable[[], object]


def interleaved(runs: Mapping[str, Run]) -> dict[str, float]:
    """Median seconds of each, called in turns, so that whatever else the machine does hits all alike."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(_ROUNDS):
        if done >= 3 and time.perf_counter() - start > _SECONDS * len(runs):
            break
        for name, run in runs.items():
            run()  # untimed: finds its data where the others have left them, in no cache
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    return {name: median(found) for name, found in times.items()}


def layer_times(dense: nn.Module, sparse: nn.Module, shape: torch.Size, training: bool) -> dict[str, float]:
    """Seconds a call of every candidate for one layer, on an input of this shape."""
    input = torch.randn(shape, dtype=next(dense.parameters()).dtype)
    dense, sparse = copy.deepcopy(dense), copy.deepcopy(sparse)
    runs = {"dense": _run(dense, input, training), "sparse": _run(sparse, input, training)}
    if isinstance(sparse, SparseConv2d) and input.dim() == 4:
        last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        runs[CHANNELS_LAST] = _run(last, input.contiguous(memory_format=torch.channels_last), training)
        if sparse.works_in_blocks:
            blocks, layer = torch.ops.drive.to_blocks(input), sparse
            runs["sparse blocked"] = _run(lambda x: layer.blocked(x, shape[0]), blocks, training, layer)
    return interleaved(runs)


def model_times(ways: Mapping[str, nn.Module], inputs: tuple[Any, ...], training: bool) -> dict[str, float]:
    """Seconds a call of the whole model in each of these ways; the models stay as they are.

    All are called with the very inputs, as the model will be: a way that wants another layout pays for it.
    """
    runs = {}
    with torch.random.fork_rng(devices=[]):
        for way, model in ways.items():
            model = copy.deepcopy(model)
            if way == CHANNELS_LAST:
                model.to(memory_format=torch.channels_last)
            runs[way] = _model_run(model, inputs, training)
        return interleaved(runs)


def estimates(
    layer: nn.Conv2d | nn.Linear, shape: torch.Size, density: float, training: bool
) -> dict[str, float]:
    """What dense and sparse would cost, in cycles of one core, whatever the machine.

    Per 16 products: dense half a cycle, two FMAs in each, with a tenth lost; sparse 1.5, as the loads come
    from the L2 cache, and as many for a lane that holds nothing, or 10 where it gathers along a row. A dense
    weight comes from memory: 5 for 16 entries. Sparse moves its input and output twice: 6 for 16 entries of
    both together. A call of it takes longer by 10 us, with its backward by 100.
    """
    weights, outputs = layer.weight.numel(), layer.weight.shape[0]
    rows = shape.numel() // max(shape[-1 if isinstance(layer, nn.Linear) else 1], 1)
    lanes = [rows]
    if isinstance(layer, nn.Conv2d):
        lanes = [shape[0] if len(shape) == 4 else 1]
        if layer.stride == (1, 1) and shape[-1] >= 16:
            lanes.append(shape[-1])
        for stride in layer.stride:
            rows //= stride
    used = max(0.15, *(size / (16 * math.ceil(size / 16)) for size in lanes if size > 0))
    products = weights * rows / 16 * (3 if training else 1)
    moved = (shape.numel() + outputs * rows) / 16 * (3 if training else 1)
    call = 300_000 if training else 30_000
    dense = max(products * 0.55, weights / 16 * 5)
    return {"dense": dense, "sparse": products * density / used * 1.5 + moved * 6 + call}


def _run(
    call: Callable[[Tensor], Tensor], input: Tensor, training: bool, layer: nn.Module | None = None
) -> Run:
    if not training:

        def forward() -> None:
            with torch.no_grad():
                call(input)

        return forward
    module = layer if layer is not None else call
    assert isinstance(module, nn.Module)
    input = input.requires_grad_()
    sources = [input, *module.parameters()]
    grad = torch.randn_like(call(input))
    return lambda: torch.autograd.grad(call(input), sources, grad)


def _model_run(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> Run:
    if not training:

        def forward() -> None:
            with torch.no_grad():
                model(*inputs)

        return forward

    def step() -> None:
        model.zero_grad(set_to_none=True)
        sum(t.float().sum() for t in _tensors(model(*inputs))).backward()  # type: ignore[union-attr]

    return step


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.requires_grad else []
    if isinstance(output, Mapping):
        output = output.values()
    return [t for part in output for t in _tensors(part)] if hasattr(output, "__iter__") else []
