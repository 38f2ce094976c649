"""Packing: a mask's non-zeros as the sparse ops want them, remade when the mask has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from drive_kernels.sparse import pattern as kernels

_T = TypeVar("_T")


class Kept(Generic[_T]):
    """What was made of tensors, without gradients; made anew only when one of them has changed."""

    _made: tuple[object, _T] | None = None

    @torch.no_grad()
    def __call__(self, make: Callable[..., _T], *tensors: Tensor | None) -> _T:
        """make(*tensors), or what it was."""
        key = [(id(t), t.data_ptr(), t._version) for t in tensors if t is not None]
        if self._made is None or self._made[0] != key:
            self._made = key, make(*tensors)
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy's tensors are others


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
        self._kept: Kept[tuple[Tensor, Tensor | None]] = Kept()

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
        self, weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Packed values and bias of the layer followed by a normalisation with its running statistics."""
        values = self.values(weight)
        if norm is None:
            return values, bias
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if bias is not None:
            shift = shift + bias * scale
        if norm.affine:
            shift = shift + norm.bias
        return values * scale.repeat_interleave(self._pattern[0].long().diff()), shift

    def kept(
        self, weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The same without gradients, remade only when a tensor has changed."""
        return self._kept(lambda *_: self.folded(weight, bias, norm), weight, bias, *_tensors(norm))


def _tensors(norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, ...]:
    return () if norm is None else (norm.running_mean, norm.running_var, norm.weight, norm.bias)
