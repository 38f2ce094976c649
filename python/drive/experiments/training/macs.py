"""What masks leave of a network's multiply-adds: counted where it is trained, shown in every table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from torch import Tensor, nn

from drive.masks import Masks
from drive.targets.multiply_adds import dense_work, multiply_adds_on, work
from drive.targets.wrappers import look_up

TITLE = "multiply-adds left in %"
NOTE = "Multiply-adds: of the prunable layers, mean over the seeds, a number for each column before it."


def macs_left(model: nn.Module, masks: Masks | None, images: Tensor) -> float:
    """The share of the prunable layers' multiply-adds that is left.

    Args:
        masks: None: nothing is pruned.
        images: one at least, on the model's device.
    """
    if masks is None:
        return 1.0
    weights = look_up("macs_left", model, masks)
    costs = multiply_adds_on(model, weights, images[:1].float(), op="macs_left")
    return work(costs, {name: int(mask.sum()) for name, mask in masks.items()}) / dense_work(costs, masks)


def mean_left(results: Iterable[Mapping[str, Any]]) -> float | None:
    """Over the seeds; None: no result says it, older ones do not."""
    values = [result["macs_left"] for result in results if "macs_left" in result]
    return mean(values) if values else None


def cell(groups: Iterable[Iterable[Mapping[str, Any]]]) -> str:
    """A row's cell under `TITLE`, from the results of its other cells: their means, in that order."""
    return shown([mean_left(results) for results in groups])


def shown(shares: Sequence[float | None]) -> str:
    """The same from the means."""
    if all(share is None for share in shares):
        return "-"
    return " / ".join("-" if share is None else f"{100 * share:.1f}" for share in shares)
