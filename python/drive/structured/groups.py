"""Outputs of layers that can only be removed together: where they lie in the tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Kept = Mapping[tuple[str, int], Tensor]  # tensor and axis -> [the axis' length] bool: what stays


@dataclass(frozen=True)
class Slices:
    """Where the units of a group lie along one axis of a tensor of the model.

    Attributes:
        tensor: name of the parameter or buffer.
        axis: of it.
        indices: [units, n] int64, on the CPU: a unit takes n of them.
    """

    tensor: str
    axis: int
    indices: Tensor


@dataclass(frozen=True)
class Group:
    """Units that are there in several tensors: channels of summands, heads of an attention.

    Attributes:
        name: of its first layer.
        units: how many there are; each is a candidate.
        rows: of weights, along their outputs: what makes a unit.
        vectors: biases, parameters and buffers of norms, and others with an entry for each output.
        columns: of weights, along their inputs: what reads a unit.
    """

    name: str
    units: int
    rows: tuple[Slices, ...]
    vectors: tuple[Slices, ...]
    columns: tuple[Slices, ...]

    @property
    def made(self) -> tuple[Slices, ...]:
        """What is set to 0 to remove a unit in place."""
        return self.rows + self.vectors

    @property
    def everything(self) -> tuple[Slices, ...]:
        return self.rows + self.vectors + self.columns


@dataclass(frozen=True)
class Couplings:
    """The groups of a model, in the order of its layers, and the layers whose outputs all stay.

    Attributes:
        whole: the reasons, by layer.
    """

    groups: tuple[Group, ...]
    whole: Mapping[str, str]

    def reasons(self) -> str:
        """In a line: how many layers stay whole, by reason."""
        by_reason: dict[str, list[str]] = {}
        for layer, reason in self.whole.items():
            by_reason.setdefault(reason, []).append(layer)
        return "; ".join(
            f"{reason}: {layers[0]}" + (f" and {len(layers) - 1} others" if len(layers) > 1 else "")
            for reason, layers in by_reason.items()
        )


def kept_entries(
    groups: Mapping[Group, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[tuple[str, int], Tensor]:
    """What stays of each axis that loses something.

    Args:
        groups: units that stay, [units] bool.
        shapes: of the tensors by name.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    for group, units in groups.items():
        if bool(units.all()):
            continue
        gone = (~units).nonzero().flatten()
        for place in group.everything:
            stays = kept.setdefault(
                (place.tensor, place.axis), torch.ones(shapes[place.tensor][place.axis], dtype=torch.bool)
            )
            stays[place.indices[gone].flatten()] = False
    return kept
