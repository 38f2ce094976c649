"""drive.sparse.convert: each pruned layer, and the model as a whole, on whatever runs fastest."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drive.masks import Masks
from drive.targets.wrappers import named_modules, unwrap

from .chains import link, trace
from .following import Following, follow
from .frozen.plan import OtherInput
from .frozen.trace import Untraceable
from .gpu import candidates, reasons_against
from .laid_out import KINDS as LAID_OUT
from .layers import SparseConv2d, SparseLinear, _share
from .measure import BLOCKED, CHANNELS_LAST, Costs, model_times
from .report import Choice, Report, attach

# Sparse that is not faster than dense by so much is not taken: two measurements of one thing differ by some
# percent.
_MARGIN = 0.97

# The fastest of several may have been lucky: a lead that is not as clear as this has to show again, with no
# others in the turns.
_CLEAR = 0.8

# How layers work together: each for itself, in chains, or, in evaluation and float32, as one plan.
BY_LAYER, CHAINS, PLAN = "layer by layer", "sparse chains", "one plan"


def convert(
    model: nn.Module,
    masks: Masks | Mapping[str, Tensor],
    example_inputs: Tensor | tuple[Any, ...],
    deterministic: bool = False,
) -> nn.Module:
    """The same model, sharing its parameters and buffers, faster where its masks allow.

    Every Conv2d and Linear with a mask is measured at the shapes that it sees for the example: dense
    (contiguous, channels_last, a Linear's weight as a library has it) and sparse, forward, and with backward
    if the model is in training mode. Then the whole model is: as it is, in channels_last, and with the
    layers that won, one by one and in chains.
    Sparse is: on the CPU, any mask; on CUDA, Linear layers only, as `drive.sparse.gpu.candidates` has them.

    Args:
        model: on the CPU or on CUDA; its mode, training or evaluation, says what to measure.
        masks: of its parameters by name; the tensors are shared, so that further pruning is followed.
        example_inputs: the model's input, or a tuple of its positional arguments.
        deterministic: choose by a cost model instead of measuring: the same choice on every run. There is
            none for CUDA.

    Returns:
        A module with the model's parameters, buffers and state_dict keys; see `report`.

    Raises:
        ValueError: the masks are not of this model, or `deterministic` on CUDA.
    """
    model = unwrap(model)
    if deterministic and any(p.is_cuda for p in model.parameters()):
        raise ValueError("convert: deterministic must be False for a model on CUDA, got True")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    masks_of = {id(weight): mask for weight, mask in Masks.of(masks)._pairs(model, "convert")}
    names = {module: name for name, module in named_modules(model)}
    seen = _inputs_of_layers(model, inputs)
    costs = Costs(deterministic, model.training)
    layers: dict[str, nn.Module] = {}
    choices = []
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or (mask := masks_of.get(id(layer.weight))) is None:
            continue
        choice, found = _choose(names[layer], layer, mask, seen.get(name), costs)
        choices.append(choice)
        if found is not None:
            layers[name] = found
    ways = _ways(model, layers, masks_of, inputs, not deterministic)
    whole: dict[str, float] = {}
    if deterministic:
        way = next(w for w in (PLAN, CHAINS, BY_LAYER, "dense") if w in ways)
    else:
        way, whole = _fastest(ways, inputs, model.training)
    result = ways[way]
    if way == CHANNELS_LAST:
        result.to(memory_format=torch.channels_last)
    attach(result, Report(choices, whole, way))
    return result


def _ways(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    masks_of: Mapping[int, Tensor],
    inputs: tuple[Any, ...],
    measured: bool,
) -> dict[str, nn.Module]:
    """The whole model in each way that there is."""
    ways: dict[str, nn.Module] = {"dense": _copied(model)}
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        ways[CHANNELS_LAST] = _copied(model)
    if not model.training and (planned := _planned(model, layers, masks_of, inputs, measured)) is not None:
        ways[PLAN] = planned
    if layers:
        ways[BY_LAYER] = _replaced(model, layers)
        if PLAN not in ways and (chained := _chained(model, layers)) is not None:
            ways[CHAINS] = chained
    return ways


def _fastest(
    ways: Mapping[str, nn.Module], inputs: tuple[Any, ...], training: bool
) -> tuple[str, dict[str, float]]:
    """The way that no other one beats, and the seconds of all; each has to beat the best one before it.

    Dense ways need no margin over each other: between them only a narrow lead has to show twice.
    """
    whole = model_times(ways, inputs, training)
    best = "dense"
    for kind, margin in (((CHANNELS_LAST,), 1.0), ((BY_LAYER, CHAINS, PLAN), _MARGIN)):
        rival = min((w for w in kind if w in whole), key=whole.__getitem__, default=best)
        if _CLEAR * whole[best] < whole[rival] < margin * whole[best]:
            again = model_times({w: ways[w] for w in (best, rival)}, inputs, training)
            whole[rival] = whole[best] * again[rival] / again[best]
        if whole[rival] < margin * whole[best]:
            best = rival
    return best, whole


def _choose(
    name: str,
    layer: nn.Conv2d | nn.Linear,
    mask: Tensor,
    shape: torch.Size | None,
    costs: Costs,
) -> tuple[Choice, nn.Module | None]:
    density = float(mask.sum()) / max(mask.numel(), 1)
    found: dict[str, nn.Module] = {}
    seconds: dict[str, float] = {}
    if type(layer) not in (nn.Conv2d, nn.Linear):
        why = f"{type(layer).__name__} may compute something else"
    elif shape is None:
        why = "not called with the example"
    else:
        found, why = _candidates(layer, mask, shape, costs.training)
        if found:
            seconds = costs.of(layer, found, shape, density)
    chosen = min(seconds.keys() & {"dense", CHANNELS_LAST}, key=seconds.__getitem__, default="dense")
    fastest = min(seconds, key=seconds.__getitem__, default="dense")
    best = found.get(fastest.removesuffix(BLOCKED))
    if best is not None and seconds[fastest] <= seconds[chosen] * _MARGIN:
        chosen = fastest
    else:
        best = None
    if costs.deterministic:
        why, seconds = why or "by the cost model", {}
    return Choice(name, tuple(layer.weight.shape), tuple(shape or ()), density, seconds, chosen, why), best


def _candidates(
    layer: nn.Conv2d | nn.Linear, mask: Tensor, shape: torch.Size, training: bool
) -> tuple[dict[str, nn.Module], str]:
    """The layers that can take a layer's place, and why there is no sparse one among them."""
    if layer.weight.is_cuda:
        if found := candidates(layer, mask, training):
            return found, ""
        reasons = reasons_against(layer, mask, training)
        return {}, "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if isinstance(layer, nn.Conv2d):
        why = SparseConv2d.reason_against(layer)
        return ({}, why) if why else ({"sparse": SparseConv2d.from_dense(layer, mask)}, "")
    if why := SparseLinear.reason_against(layer):
        return {}, why
    found = {"sparse": SparseLinear.from_dense(layer, mask)}
    for name, kind in () if training else LAID_OUT.items():
        if not kind.reason_against(layer):
            found[name] = kind.from_dense(layer, rows=shape.numel() // max(shape[-1], 1))
    return found, ""


@torch.no_grad()
def _inputs_of_layers(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, torch.Size]:
    """Shape of the input of every Conv2d and Linear, in evaluation mode: nothing in the model changes."""
    seen: dict[str, torch.Size] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor):
                seen.setdefault(name, arguments[0].shape)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        model(*inputs)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return seen


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the modules, with the very parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    if "" in layers:
        return layers[""]
    result = _copied(model)
    for name, layer in layers.items():
        result.set_submodule(name, _share(type(layer), layer))  # chains change the layer, the others do not
    return result


def _planned(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    masks_of: Mapping[int, Tensor],
    inputs: tuple[Any, ...],
    measured: bool,
) -> nn.Module | None:
    """None: it is no model for `drive.sparse.freeze`, or no convolution of it is in one program."""
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        return None
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return None
    named = {id(p): name for name, p in model.named_parameters()}
    replaced = _replaced(model, layers) if layers else _copied(model)
    try:
        plan = Following(model, {key: (named[key], mask) for key, mask in masks_of.items()}, inputs, measured)
        plan.begin(inputs)
    except (Untraceable, OtherInput):
        return None
    follow(replaced, plan)
    return replaced


def _chained(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module | None:
    """None: torch.fx cannot trace the model, or no convolution would be in a chain."""
    convolutions = {
        name for name, layer in layers.items() if isinstance(layer, SparseConv2d) and layer.works_in_blocks
    }
    if not convolutions or "" in layers:
        return None
    replaced = _replaced(model, layers)
    try:
        graph = trace(replaced)
    except Exception:  # whatever the model's Python does with a tracer's proxies
        return None
    link(graph, convolutions)
    # The modules stay in the model's own tree and order, which keys and optimizers go by.
    replaced.forward = types.MethodType(type(graph).forward, replaced)
    return replaced
