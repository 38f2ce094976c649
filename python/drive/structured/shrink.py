"""drive.shrink: a model without the channels and heads that masks have emptied, and back from a file."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from drive.bits import is_size, opened
from drive.files import write_atomic
from drive.layers import Layers
from drive.masks import Masks
from drive.targets.candidates import candidates
from drive.targets.multiply_adds import dense_work, multiply_adds_on, tensors_in
from drive.targets.restore import scoring
from drive.targets.wrappers import look_up

from .check import wrong
from .couplings import couplings
from .cut import cut, named_tensors
from .groups import Couplings, Group, Kept, kept_entries
from .removable import check_bare

_log = logging.getLogger(__name__)
_FORMAT = "drive-shrunk-1"


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        nodes: units that could be removed: channels, heads.
        parameters: their entries, tied ones once.
        multiply_adds: of the layers' weights, for one sample.
        bytes: of parameters and buffers.
    """

    nodes: int
    parameters: int
    multiply_adds: int
    bytes: int

    @classmethod
    def of(cls, model: nn.Module, nodes: int, inputs: Any, layers: Layers | None) -> Size:
        weights = {c.name: c.tensor for c in candidates(model, layers) if c.weight is not None}
        costs = multiply_adds_on(model, weights, inputs, layers, op="shrink")
        tensors = [*model.parameters(), *model.buffers()]
        return cls(
            nodes,
            sum(parameter.numel() for parameter in model.parameters()),
            dense_work(costs, weights),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        )


@dataclass(frozen=True)
class Shrunk:
    """A smaller model.

    Attributes:
        model: it.
        kept: by the names of all modules whose outputs were cut, the indices of those that stay.
        masks: what the masks said of the entries that stay.
        before, after: sizes.
    """

    model: nn.Module
    kept: Mapping[str, Tensor]
    masks: Masks
    before: Size
    after: Size
    _cut: Kept

    def summary(self) -> str:
        """A table as text: nodes, parameters, multiply-adds and bytes, before and after."""
        lines = [f"{'':<14}{'before':>18}{'after':>18}{'left':>9}"]
        for what in ("nodes", "parameters", "multiply_adds", "bytes"):
            before, after = getattr(self.before, what), getattr(self.after, what)
            left = f"{after / max(before, 1):.1%}"
            lines.append(f"{what.replace('_', '-'):<14}{before:>18,}{after:>18,}{left:>9}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and what was cut as a safetensors file, for `drive.rebuild`.

        A crash leaves the old file or the new one.
        """
        tensors = {f"weights.{name}": t.detach().contiguous() for name, t in self.model.state_dict().items()}
        for number, stays in enumerate(self._cut.values()):
            tensors[f"kept.{number}"] = stays
        apart = {name: tensor.clone() for name, tensor in tensors.items()}  # tied ones share memory
        # one entry, for several are written in any order
        content = safetensors.torch.save(apart, {_FORMAT: json.dumps(list(self._cut))})
        write_atomic(Path(path), content)


def shrink(
    model: nn.Module, masks: Mapping[str, Tensor], example_inputs: Any, *, layers: Layers | None = None
) -> Shrunk:
    """A new, smaller model without the units that the masks have emptied; the given one is unchanged.

    A channel, or a head of an attention, goes where all rows that make it are pruned in all the layers that
    are coupled by it (sums, products, depthwise convolutions); of each such group one unit stays at least.
    The result equals the given model with the weights, the biases and the parameters of the norms of what
    is removed set to 0. That is checked on the example, and channels of which it is not so stay, with a
    warning. (A channel without weights still gives what its bias and its norm add, so a network that was
    trained with its masks held loses these.)

    Args:
        model: not wrapped, not compiled.
        masks: of `drive.prune(structure="channels")`, or any whose rows are all False here and there.
        example_inputs: one batch of the model's: its only argument, a tuple of the positional ones, or a
            mapping of the named ones.
        layers: of `drive.prune`.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: the masks are of another model; the model has no channels that can be removed, with the
            reasons.
    """
    check_bare("shrink", model)
    masks = Masks.of(masks)
    for name, weight in look_up("shrink", model, masks).items():
        if weight.shape != masks[name].shape:
            raise ValueError(
                f"shrink: masks[{name}] must have shape {tuple(weight.shape)}, got {tuple(masks[name].shape)}"
            )
    found = _couplings(model, masks, example_inputs, layers)
    if not found.groups:
        raise ValueError(f"shrink: there are no channels to remove in this model: {found.reasons()}")
    if found.whole:
        _log.info("shrink: %d groups of channels; whole stay %s", len(found.groups), found.reasons())
    units = {group: _stay(group, masks) for group in found.groups}
    units = _right(model, units, example_inputs, layers)
    return _shrunk(model, masks, units, example_inputs, layers)


def rebuild(
    fresh_model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    layers: Layers | None = None,
) -> nn.Module:
    """The small model that `Shrunk.save` wrote, from a full one that was built anew; that is unchanged.

    Does not need torch-pruning.

    Args:
        fresh_model: of the same architecture, whatever its weights.
        example_inputs: one batch, as of `shrink`: the result is run on it once.
        layers: of `drive.prune`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is none of these, or of another architecture.
    """
    check_bare("rebuild", fresh_model)
    weights, kept = _read(path)
    tensors = named_tensors(fresh_model)
    for (name, axis), stays in kept.items():
        if name not in tensors or tensors[name].dim() <= axis or tensors[name].shape[axis] != len(stays):
            got = tuple(tensors[name].shape) if name in tensors else "no such tensor"
            raise ValueError(
                f"rebuild: {path} must be of this architecture: {name} must have {len(stays)} entries along "
                f"axis {axis}, got {got}"
            )
    small = copy.deepcopy(fresh_model)
    device = next((parameter.device for parameter in small.parameters()), torch.device("cpu"))
    cut(small, kept, layers)
    state, names = small.state_dict(keep_vars=True), weights.keys()
    if (wrong := next(iter(state.keys() ^ names), None)) or (
        wrong := next((name for name, tensor in state.items() if not _alike(weights[name], tensor)), None)
    ):
        raise ValueError(f"rebuild: {path} must be of this architecture: {wrong} is not as it is there")
    for name, tensor in state.items():
        tensor.data = weights[name].to(device, copy=True)  # aligned, where the file is not: rounds as before
    with torch.no_grad(), scoring(small, {}):
        _outputs(small.eval(), example_inputs)
    return small


def _couplings(model: nn.Module, masks: Masks, inputs: Any, layers: Layers | None) -> Couplings:
    """Of the model in training mode, in which more of it may run, if it can be called alike there."""

    def run() -> list[Tensor]:
        return _outputs(model, inputs)

    try:
        return couplings(model, masks.keys(), run, layers, training=True, op="shrink")
    except ImportError:
        raise
    except Exception as error:  # it may want targets there, or larger images
        _log.info("shrink: what runs in training mode only stays as it is (%s)", error)
        return couplings(model, masks.keys(), run, layers, training=False, op="shrink")


def _stay(group: Group, masks: Masks) -> Tensor:
    """Units of which some row survives somewhere; one at least."""
    stays = torch.zeros(group.units, dtype=torch.bool)
    for place in group.rows:
        mask = masks[place.tensor]
        rows = mask.movedim(place.axis, 0).flatten(1).any(1).cpu()
        stays |= rows[place.indices].any(1)
    if not stays.any():
        stays[0] = True
    return stays


def _right(
    model: nn.Module, units: Mapping[Group, Tensor], inputs: Any, layers: Layers | None
) -> dict[Group, Tensor]:
    """These groups, those whose removal is more than setting them to 0 left whole, with a warning."""
    cut_ones = {group: stays for group, stays in units.items() if not stays.all()}
    bad = wrong(model, cut_ones, _outputs, inputs, layers) if cut_ones else []
    if bad:
        _log.warning(
            "shrink: pruned outputs of these layers stay, for to remove them would change more than to set "
            "them to 0: %s", ", ".join(group.name for group in bad),
        )  # fmt: skip
    return {group: torch.ones_like(stays) if group in bad else stays for group, stays in units.items()}


def _shrunk(
    model: nn.Module, masks: Masks, units: Mapping[Group, Tensor], inputs: Any, layers: Layers | None
) -> Shrunk:
    tensors = named_tensors(model)
    kept = kept_entries(units, {name: tensor.shape for name, tensor in tensors.items()})
    small = copy.deepcopy(model)
    for parameter in small.parameters():
        parameter.grad = None
    cut(small, kept, layers)
    rest = {}
    for name, mask in masks.items():
        for axis in range(mask.dim()):
            if (stays := kept.get((name, axis))) is not None:
                mask = mask.index_select(axis, stays.nonzero().flatten().to(mask.device))
        rest[name] = mask.clone()
    nodes = sum(group.units for group in units), sum(int(stays.sum()) for stays in units.values())
    left = sum(parameter.numel() for parameter in small.parameters())
    return Shrunk(
        small,
        _kept_outputs(units, kept),
        Masks(rest, left),
        Size.of(model, nodes[0], inputs, layers),
        Size.of(small, nodes[1], inputs, layers),
        kept,
    )


def _kept_outputs(units: Mapping[Group, Tensor], kept: Kept) -> dict[str, Tensor]:
    """By module: the indices of its outputs, or of the entries of its vectors, that stay."""
    found: dict[str, Tensor] = {}
    for group in units:
        for place in group.made:
            if (stays := kept.get((place.tensor, place.axis))) is not None:
                found.setdefault(place.tensor.rpartition(".")[0], stays.nonzero().flatten())
    return found


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def _alike(stored: Tensor, tensor: Tensor) -> bool:
    """Can it take this one's place? A model may have been saved in another precision."""
    floating = stored.is_floating_point() and tensor.is_floating_point()
    return stored.shape == tensor.shape and (floating or stored.dtype == tensor.dtype)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Kept]:
    with opened("rebuild", path, "file of a shrunk model", "pt") as file:
        metadata = file.metadata() or {}
        if _FORMAT not in metadata:
            raise ValueError(f"its metadata must be {_FORMAT}, got {', '.join(metadata) or 'nothing':.80}")
        cuts = json.loads(metadata[_FORMAT])
        if not isinstance(cuts, list):
            raise ValueError(f"it must list what was cut, got {cuts!r:.80}")
        keys = set(file.keys())
        kept: dict[tuple[str, int], Tensor] = {}
        for number, place in enumerate(cuts):
            key, good = f"kept.{number}", isinstance(place, list) and list(map(type, place)) == [str, int]
            if not good or not is_size(place[1]) or tuple(place) in kept or key not in keys:
                raise ValueError(
                    f"what was cut must be a tensor's axis, and what stays be there, got {place!r:.80}"
                )
            stays = file.get_tensor(key)
            if stays.dtype != torch.bool or stays.dim() != 1 or not stays.any():
                raise ValueError(f"{key} must be a vector of bool that leaves something")
            kept[place[0], place[1]] = stays
        names = [key for key in keys if key.startswith("weights.")]
        return {name.removeprefix("weights."): file.get_tensor(name) for name in names}, kept
