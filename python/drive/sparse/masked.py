"""MaskedConv2d and MaskedLinear: the dense layers' parameters, a mask that may change or be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .layers import _check_mask, _padding, _reason_against_padding, _share


class MaskedConv2d(nn.Conv2d):
    """A Conv2d whose weight goes through a mask, which is applied where the weight is read.

    `weight` stays the dense parameter, and its gradient is 0 where a bool mask is False. A learned mask
    is a parameter of the weight's dtype that multiplies it; any other is no part of `state_dict`.
    """

    mask: Tensor

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, mask: Tensor, learn_mask: bool = False) -> Self:
        """The same layer, sharing its parameters, and the mask unless it is to be learned: then a copy.

        Raises:
            ValueError: the mask's shape is not the weight's, or the padding is not of zeros, as much on
                both sides.
            TypeError: the mask is neither bool nor of the weight's dtype.
        """
        if why := _reason_against_padding(layer):
            raise ValueError(f"MaskedConv2d: layer must be one that the masked op covers, got {why}")
        masked = _share(cls, layer)
        _set_mask(masked, mask, learn_mask)
        return masked

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] to [N, O, H', W'], or without N."""
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        output: Tensor = torch.ops.drive.masked_conv2d(
            input, self.weight, self.mask, self.bias, self.stride, _padding(self), self.dilation, self.groups
        )
        return output


class MaskedLinear(nn.Linear):
    """A Linear whose weight goes through a mask; see MaskedConv2d."""

    mask: Tensor

    @classmethod
    def from_dense(cls, layer: nn.Linear, mask: Tensor, learn_mask: bool = False) -> Self:
        """The same layer, sharing its parameters, and the mask unless it is to be learned: then a copy.

        Raises:
            ValueError: the mask's shape is not the weight's.
            TypeError: the mask is neither bool nor of the weight's dtype.
        """
        masked = _share(cls, layer)
        _set_mask(masked, mask, learn_mask)
        return masked

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        output: Tensor = torch.ops.drive.masked_linear(input, self.weight, self.mask, self.bias)
        return output


def _set_mask(layer: MaskedConv2d | MaskedLinear, mask: Tensor, learn: bool) -> None:
    op, weight = type(layer).__name__, layer.weight
    _check_mask(op, mask, weight)
    if mask.dtype not in (torch.bool, weight.dtype):
        raise TypeError(f"{op}: mask must be torch.bool or {weight.dtype}, got {mask.dtype}")
    if learn:
        layer.mask = nn.Parameter(mask.detach().to(weight.dtype, copy=True))
    else:
        layer.register_buffer("mask", mask, persistent=False)
