"""Packing: a mask's non-zeros as the sparse ops want them, remade when the mask has changed."""

from __future__ import annotations

import torch
from torch import Tensor

from drive_kernels import sparse as kernels


class Packing:
    """The pattern of one layer's mask, and the packed values of weights that have not changed since.

    The mask is shared with whoever updates it in place (`Masks`); its version counter tells.
    """

    def __init__(self, mask: Tensor, groups: int = 1):
        self.mask = mask
        self.groups = groups
        self._pack()

    def _pack(self) -> None:
        self._version = self.mask._version
        self._pattern = kernels.pattern_of(self.mask, self.groups)
        self._index = kernels.index_of(self.mask)
        self._folded: tuple[object, tuple[Tensor, Tensor | None]] | None = None

    @property
    def pattern(self) -> list[Tensor]:
        """What the ops take as `pattern`."""
        if not torch.compiler.is_compiling() and self.mask._version != self._version:
            self._pack()
        return self._pattern

    @property
    def density(self) -> float:
        """Fraction of True in the mask."""
        return len(self._index) / max(self.mask.numel(), 1)

    def values(self, weight: Tensor) -> Tensor:
        """The packed values, differentiable to the dense weight."""
        values: Tensor = torch.ops.drive.sparse_gather(weight, self._index)
        return values

    def folded(
        self, weight: Tensor, bias: Tensor | None, scale_shift: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Packed values and bias, without gradients, of the layer followed by a normalisation.

        `scale_shift` is empty or (mean, var, eps, weight, bias) of it. Kept while no tensor changes.
        """
        tensors = [t for t in (weight, bias, *scale_shift) if t is not None]
        key = [(id(t), t.data_ptr(), t._version) for t in tensors]
        if self._folded is None or self._folded[0] != key:
            values = self.values(weight.detach())
            if scale_shift:
                mean, var, eps, gain, offset = (t.detach() for t in scale_shift)
                scale = gain * (var + eps).rsqrt()
                values = values * scale.repeat_interleave(self._pattern[0].long().diff())
                bias = (offset if bias is None else offset + bias * scale) - mean * scale
            self._folded = key, (values, bias)
        return self._folded[1]
