"""Are masks held?"""

from __future__ import annotations

from torch import nn

from drive import Masks


def assert_held(model: nn.Module, masks: Masks) -> None:
    """Every pruned weight is exactly zero, and every survivor of a trained model is not."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        assert not weights[name][~mask].any(), f"{name}: pruned weights are back"
        assert weights[name][mask].all(), f"{name}: the others train"
