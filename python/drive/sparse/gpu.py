"""Linear layers on CUDA whose weight is read packed, block by block, or two of every four."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from drive_kernels.linear import block, packed

from .kept import Kept
from .layers import _check_mask, _share


class _GpuLinear(nn.Linear, ABC):
    """A Linear on another one's parameters that takes its weight for 0 where a mask is False."""

    trains: bool  # has gradients of its own, and not just those of the dense layer
    mask: Tensor
    _kept: Kept[Any]  # the weight, or where its blocks are, as the op wants it

    @classmethod
    def from_dense(cls, layer: nn.Linear, mask: Tensor) -> Self:
        """The same layer, sharing its parameters; the mask is shared with whoever updates it in place.

        Raises:
            ValueError: the mask's shape is not the weight's, or `reason_against` has one.
        """
        _check_mask(cls.__name__, mask, layer.weight)
        if why := cls.reason_against(layer, mask):
            raise ValueError(f"{cls.__name__}: layer must be one that it covers, got {why}")
        ours = _share(cls, layer)
        ours.mask, ours._kept = mask, Kept()
        return ours

    @classmethod
    def reason_against(cls, layer: nn.Linear, mask: Tensor) -> str | None:
        """Why this cannot compute the layer, now or ever; None if it can."""
        if why := _reason_against_device(layer.weight):
            return why
        if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{layer.weight.dtype} weights"
        return cls._reason_against_mask(layer, mask)

    @staticmethod
    @abstractmethod
    def _reason_against_mask(layer: nn.Linear, mask: Tensor) -> str | None: ...

    def _differentiable(self, input: Tensor) -> bool:
        sources = (input, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)

    def _dense(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.masked_fill(~self.mask, 0), self.bias)


class PackedLinear(_GpuLinear):
    """A Linear that reads a bitmap and the surviving weights: for small batches, and inference.

    Where gradients are recorded, it computes as the dense layer does.
    """

    trains = False

    @staticmethod
    def _reason_against_mask(layer: nn.Linear, mask: Tensor) -> str | None:
        return None

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if self._differentiable(input):
            return self._dense(input)
        bitmap, start, values = self._kept(packed.pack, self.weight, self.mask)
        output: Tensor = torch.ops.drive.packed_linear(
            input, bitmap, start, values, self.bias, list(self.weight.shape)
        )
        return output


class BlockLinear(_GpuLinear):
    """A Linear that computes with the blocks of 16, 32 or 64 that survive, its gradients likewise."""

    trains = True

    @staticmethod
    def _reason_against_mask(layer: nn.Linear, mask: Tensor) -> str | None:
        return None if block.block_of(mask) else "a mask that is not of whole blocks of 16, 32 or 64"

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        pattern, size = self._kept(_pattern_and_block, self.mask)
        output: Tensor = torch.ops.drive.block_linear(input, self.weight, pattern, self.bias, size)
        return output


class SemiStructuredLinear(_GpuLinear):
    """A Linear for the sparse tensor cores, by torch.sparse.to_sparse_semi_structured: for inference.

    Where gradients are recorded, it computes as the dense layer does.
    """

    trains = False

    @staticmethod
    def _reason_against_mask(layer: nn.Linear, mask: Tensor) -> str | None:
        if layer.weight.dtype == torch.float32:
            return f"{layer.weight.dtype} weights"
        # the coarser of what PyTorch's two implementations, CUTLASS and cuSPARSELt, ask for
        if layer.out_features % 32 or layer.in_features % 64:
            return f"a shape that is not of multiples of 32 and 64, {list(layer.weight.shape)}"
        if bool((mask.unflatten(1, (-1, 4)).sum(-1) > 2).any()):
            return "a mask with more than two of four"
        return None

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if self._differentiable(input):
            return self._dense(input)
        return F.linear(input, self._kept(_semi_structured, self.weight, self.mask), self.bias)


KINDS: dict[str, type[_GpuLinear]] = {
    "packed": PackedLinear, "blocks": BlockLinear, "2:4": SemiStructuredLinear,
}  # fmt: skip


def reasons_against(layer: nn.Module, mask: Tensor, training: bool) -> dict[str, str | None]:
    """Why each of these cannot compute a layer, or would not pay."""
    if type(layer) is not nn.Linear:
        return dict.fromkeys(KINDS, f"a {type(layer).__name__}")
    return {
        name: "a model in training" if training and not kind.trains else kind.reason_against(layer, mask)
        for name, kind in KINDS.items()
    }


def candidates(layer: nn.Module, mask: Tensor, training: bool) -> dict[str, nn.Module]:
    """What `convert` measures against a dense layer on CUDA."""
    why = reasons_against(layer, mask, training)
    return {
        name: kind.from_dense(cast(nn.Linear, layer), mask) for name, kind in KINDS.items() if not why[name]
    }


def _reason_against_device(weight: Tensor) -> str | None:
    if weight.device.type != "cuda":
        return f"a weight on {weight.device}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return f"a {torch.cuda.get_device_name(weight.device)}, which is older than Ampere"
    return None


def _pattern_and_block(mask: Tensor) -> tuple[list[Tensor], int]:
    size = block.block_of(mask)
    if size is None:
        raise ValueError("BlockLinear: mask must be of whole blocks of 16, 32 or 64, got another one")
    return block.pattern_of(mask, size), size


def _semi_structured(weight: Tensor, mask: Tensor) -> Tensor:
    kept = weight.masked_fill(~mask, 0).contiguous()
    sparse: Tensor = torch.sparse.to_sparse_semi_structured(kept)
    return sparse
