"""Are the couplings right? Removing some units must be the same as setting them to 0."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from drive.layers import Layers
from drive.targets.multiply_adds import samples_of, tensors_in
from drive.targets.restore import seeded

from .cut import cut, named_tensors
from .groups import Group, kept_entries

Pass = Callable[[nn.Module, Any], Any]  # model, batch -> outputs
_NORMS = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
SAMPLES = 2  # of a batch, which are enough
_SHARE = 0.25  # of the units are removed: of more, what is left of the outputs may be next to nothing
# A dtype, None being the own one, and what may differ, of the largest output. Wrong couplings differ by some
# percent; in float64 what differs is rounding, but for models that compute in float32 within.
_PRECISIONS = (torch.float64, 1e-5), (torch.float32, 1e-3), (None, 3e-2)


def wrong(
    model: nn.Module, units: Mapping[Group, Tensor], run: Pass, batch: Any, layers: Layers | None = None
) -> list[Group]:
    """Those of the groups whose removal is more than setting them to 0, by halves.

    Args:
        units, batch: of `same`.
    """
    if same(model, units, run, batch, layers):
        return []
    groups = list(units)
    if len(groups) == 1:
        return groups
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    found = [
        bad
        for half in halves
        for bad in wrong(model, {group: units[group] for group in half}, run, batch, layers)
    ]
    return found or groups  # wrong together only


def sampled(group: Group) -> Tensor:
    """Units that stay, [units] bool: all but some, chosen by a generator of its own."""
    gone = max(1, round(_SHARE * group.units)) if group.units > 1 else 0
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))
    stays = torch.ones(group.units, dtype=torch.bool)
    stays[order[:gone]] = False
    return stays


def same(
    model: nn.Module,
    units: Mapping[Group, Tensor],
    run: Pass,
    batch: Any,
    layers: Layers | None = None,
) -> bool:
    """Whether a model without these units, and one in which what makes them is 0, have the same outputs.

    In eval mode, on a copy in which no parameter is next to 0: zero-initialised layers and scales of 1e-6
    would hide everything behind them. In float64, or in what the model can be run in.

    Args:
        units: those that stay, [units] bool.
        batch: is cut to `SAMPLES` samples if that can be done.
    """
    for dtype, tolerance in _PRECISIONS:
        small = copy.deepcopy(model).to(dtype).eval()
        for parameter in small.parameters():
            parameter.grad = None
        _make_generic(small)
        zero(small, units)
        some = _few(batch, dtype)
        with torch.no_grad(), seeded(0):
            try:
                expected = _outputs(run(small, some))
            except (RuntimeError, TypeError):
                if dtype is None:
                    raise
                continue  # it makes tensors of another dtype
            shapes = {name: tensor.shape for name, tensor in named_tensors(small).items()}
            trains = _trains(small, run, some)
            try:
                cut(small, kept_entries(units, shapes), layers)
                got = _outputs(run(small.eval(), some))
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                return False  # sizes do not fit together
            if trains and not _trains(small, run, some):
                return False  # nor do those of parts that run in training only
        if [x.shape for x in got] != [x.shape for x in expected]:
            return False
        return all(_close(x, y, tolerance) for x, y in zip(got, expected, strict=True))
    raise AssertionError  # the last dtype is the model's own


def set_training(model: nn.Module, training: bool) -> None:
    """The mode of a model whose norms of batches stay in eval mode: a single sample will do."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.eval()


@torch.no_grad()
def zero(model: nn.Module, units: Mapping[Group, Tensor]) -> None:
    """Set what makes the units that do not stay to 0: weights, biases, parameters of norms."""
    tensors = named_tensors(model)
    for group, stays in units.items():
        gone = (~stays).nonzero().flatten()
        for place in group.made:
            tensor = tensors[place.tensor]
            if isinstance(tensor, nn.Parameter):  # buffers are statistics
                tensor.index_fill_(place.axis, place.indices[gone].flatten().to(tensor.device), 0)


def _trains(model: nn.Module, run: Pass, batch: Any) -> bool:
    """Does it run in training mode? (Dropout would make outputs differ.)"""
    set_training(model, True)
    try:
        run(model, batch)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError):
        return False
    return True


@torch.no_grad()
def _make_generic(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() and not 1e-2 <= float(parameter.abs().max()) < torch.inf:  # nor NaN
            random = torch.rand(parameter.shape, dtype=parameter.dtype, generator=generator) + 0.5
            inputs = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_((random - 1) * 2 / inputs**0.5 if inputs > 1 else random)


def _few(batch: Any, dtype: torch.dtype | None) -> Any:
    """Its first samples, in this dtype; all of it where its tensors are not [samples, ...]."""
    tensors, count = tensors_in(batch), samples_of(batch)
    sliced = all(tensor.dim() and len(tensor) == count for tensor in tensors)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf[:SAMPLES] if sliced else leaf
        return leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf

    return tree_map(change, batch)


def _outputs(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    if not bool(finite.any()):
        return not expected.numel()  # nothing can be seen in what is all NaN
    got, expected = got[finite], expected[finite]
    return bool(((got - expected).abs() <= tolerance * expected.abs().max()).all())
