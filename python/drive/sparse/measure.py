"""Times of a layer's and a model's candidates, interleaved; and a cost model for those who cannot measure."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from operator import truediv
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from drive.targets.restore import kept_rng

from .layers import SparseConv2d

CHANNELS_LAST = "dense channels_last"
BLOCKED = " blocked"  # after the name of a sparse layer: in the blocked layout

# Rounds of a measurement: until the most, or until so many seconds a candidate have gone by, but never fewer
# than the least. A whole model gets more of them: its choice is the last word.
_LEAST, _MOST, SECONDS, MODEL_SECONDS = 5, 15, 0.25, 2.5

_NOTICED = 0.05  # seconds: filling the caches takes a few milliseconds, which longer calls do not notice

Run = Callable[[], object]


def interleaved(runs: Mapping[str, Run], cuda: bool = False, seconds: float = SECONDS) -> dict[str, float]:
    """Seconds of each, called in turns, so that whatever else the machine does hits all alike.

    Each round has an order of its own: in the same one again and again, what comes and goes on a busy machine
    has met equal networks in ways up to 7 % apart, 1.1 in shuffled ones (ResNet-18, training steps of 0.9 s,
    nine networks in 12 rounds). The first one's seconds are its median, the others' that times the median of
    their ratios to it, round by round: of two equal networks, medians have differed by 6 % and such ratios
    by 3.
    """
    timed = _timed_on_cuda if cuda else _timed
    twice = min(map(timed, runs.values())) < _NOTICED
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(_MOST):
        if done >= _LEAST and time.perf_counter() - start > seconds * len(runs):
            break
        shuffle(order)
        for name in order:
            if twice:
                runs[name]()  # untimed: finds its data where the others have left them, in no cache
            times[name].append(timed(runs[name]))
    first, *_ = times.values()
    ratios = {name: median(map(truediv, found, first)) for name, found in times.items()}
    return {name: median(first) * ratio for name, ratio in ratios.items()}


def _timed(run: Run) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def _timed_on_cuda(run: Run) -> float:
    """Between two events: the device is still busy with the untimed call when this one is launched."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Costs:
    """What a layer's candidates take, in seconds or by the cost model. Layers alike are measured once."""

    def __init__(self, deterministic: bool, training: bool):
        self.deterministic, self.training = deterministic, training
        self._known: dict[object, dict[str, float]] = {}

    def of(
        self,
        layer: nn.Conv2d | nn.Linear,
        sparse: Mapping[str, nn.Module],
        shape: torch.Size,
        density: float,
    ) -> dict[str, float]:
        """By the names of the candidates: dense ones, and those in `sparse`."""
        if self.deterministic:
            return estimates(layer, shape, density, self.training)
        step = round(20 * math.log(density)) if density else None  # within 5 % it is the same density
        alike = repr(layer), layer.weight.dtype, layer.weight.device, shape, tuple(sparse), step
        if alike not in self._known:
            self._known[alike] = layer_times(layer, sparse, shape, self.training)
        return self._known[alike]


def layer_times(
    dense: nn.Conv2d | nn.Linear, sparse: Mapping[str, nn.Module], shape: torch.Size, training: bool
) -> dict[str, float]:
    """Seconds a call of every candidate for one layer, on an input of this shape."""
    weight = dense.weight
    input = torch.randn(shape, dtype=weight.dtype, device=weight.device)
    plain = copy.deepcopy(dense)
    runs = {"dense": _run(plain, input, training)}
    for name, candidate in sparse.items():
        layer = copy.deepcopy(candidate)
        runs[name] = _run(layer, input, training)
        if isinstance(layer, SparseConv2d) and input.dim() == 4:
            last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
            runs[CHANNELS_LAST] = _run(last, input.contiguous(memory_format=torch.channels_last), training)
            if layer.works_in_blocks:
                blocked = partial(layer.blocked, batch=shape[0])
                runs[name + BLOCKED] = _run(blocked, torch.ops.drive.to_blocks(input), training, layer)
    return interleaved(runs, weight.is_cuda)


def model_times(ways: Mapping[str, nn.Module], inputs: tuple[Any, ...], training: bool) -> dict[str, float]:
    """Seconds a call of the whole model in each of these ways; the models stay as they are.

    All are called with the very inputs, as the model will be: a way that wants another layout pays for it.
    """
    runs = {}
    cuda = any(p.is_cuda for model in ways.values() for p in model.parameters())
    with kept_rng():
        for way, model in ways.items():
            model = copy.deepcopy(model)
            if way == CHANNELS_LAST:
                model.to(memory_format=torch.channels_last)
            runs[way] = _model_run(model, inputs, training)
        return interleaved(runs, cuda, MODEL_SECONDS)


def estimates(
    layer: nn.Conv2d | nn.Linear, shape: torch.Size, density: float, training: bool
) -> dict[str, float]:
    """What dense and sparse would cost, in cycles of one core, whatever the machine.

    Per 16 products: dense half a cycle, two FMAs in each, with a tenth lost; sparse 1.5, as the loads come
    from the L2 cache, and as many for a lane that holds nothing, or 10 where it gathers along a row; 1.5
    times as many where lanes are an image's pixels, with those between its rows. A dense weight comes from
    memory: 5 for 16 entries. Sparse moves its input and output twice: 6 for 16 entries of both together. A
    call of it takes longer by 10 us, with its backward by 100.
    """
    weights, outputs = layer.weight.numel(), layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        rows = shape.numel() // max(shape[-1], 1)
        used = _filled(rows, rows)
    else:
        images = shape[0] if len(shape) == 4 else 1
        height, width = (math.ceil(side / s) for side, s in zip(shape[-2:], layer.stride, strict=True))
        reach = layer.dilation[1] * (layer.kernel_size[1] - 1) // layer.stride[1]
        rows = images * height * width
        plane = _filled(height * width, (height - 1) * (width + reach) + width)
        used = max(_filled(images, images), plane / 1.5)
    used = max(0.15, used)
    products = weights * rows / 16 * (3 if training else 1)
    moved = (shape.numel() + outputs * rows) / 16 * (3 if training else 1)
    call = 300_000 if training else 30_000
    dense = max(products * 0.55, weights / 16 * 5)
    return {"dense": dense, "sparse": products * density / used * 1.5 + moved * 6 + call}


def _filled(useful: int, lanes: int) -> float:
    """Which share of so many lanes, rounded up to sixteens, computes something useful."""
    return useful / (16 * max(math.ceil(lanes / 16), 1))


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
