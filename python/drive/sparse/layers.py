"""SparseConv2d and SparseLinear: the dense layers' parameters and keys, the sparse ops' speed."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .kept import Packing

_M = TypeVar("_M", bound=nn.Module)


def _share(cls: type[_M], layer: nn.Module) -> _M:
    """A module of that class with the very parameters, buffers and hooks of another one."""
    shared = cls.__new__(cls)
    shared.__dict__.update({
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in layer.__dict__.items()
    })  # fmt: skip
    return shared


class SparseConv2d(nn.Conv2d):
    """A Conv2d that computes with the weights that survive in a mask.

    `weight` stays the dense parameter, and its gradient is 0 where the mask is False. Weights where the
    mask is False are taken for 0, whatever they are.
    """

    packing: Packing
    _norm: tuple[nn.BatchNorm2d, ...] = ()  # what `absorb` took in; in a tuple: no submodule, no new keys

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, mask: Tensor) -> Self:
        """The same layer, sharing its parameters.

        Raises:
            ValueError: the mask's shape is not the weight's, or `reason_against` has one.
        """
        if why := cls.reason_against(layer):
            raise ValueError(f"SparseConv2d: layer must be one that the sparse op covers, got {why}")
        _check_mask("SparseConv2d", mask, layer.weight)
        sparse = _share(cls, layer)
        sparse.packing = Packing(mask, layer.groups)
        return sparse

    @staticmethod
    def reason_against(layer: nn.Conv2d) -> str | None:
        """Why the sparse op cannot compute this layer; None if it can."""
        return _reason_against_padding(layer) or _reason_against_weight(layer.weight)

    @property
    def works_in_blocks(self) -> bool:
        """Whether `blocked` may be used: 16-bit images stay [N, C, H, W]."""
        return self.weight.dtype in (torch.float32, torch.float64)

    def absorb(self, norm: nn.BatchNorm2d) -> None:
        """In `blocked`, apply this normalisation after the convolution."""
        self._norm = (norm,)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] to [N, O, H', W'], or without N."""
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        pattern = self.packing.pattern
        return self._convolve(input, pattern, *_packed(self))

    def blocked(
        self, input: Tensor, batch: int, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Convolution, absorbed normalisation, residual and ReLU, all in blocks of 16 images."""
        pattern = self.packing.pattern
        norm = self._norm[0] if self._norm else None
        if norm is not None and _of_batch(norm):
            return _normed(norm, self._convolve(input, pattern, *_packed(self)), batch, residual, relu)
        return self._convolve(input, pattern, *_packed(self, norm), residual, relu)

    def _convolve(
        self,
        input: Tensor,
        pattern: list[Tensor],
        values: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        output: Tensor = torch.ops.drive.sparse_conv2d(
            input, values, pattern, bias, list(self.weight.shape), self.stride, _padding(self),
            self.dilation, self.groups, residual, relu,
        )  # fmt: skip
        return output


class SparseLinear(nn.Linear):
    """A Linear that computes with the weights that survive in a mask; see SparseConv2d."""

    packing: Packing

    @classmethod
    def from_dense(cls, layer: nn.Linear, mask: Tensor) -> Self:
        """The same layer, sharing its parameters.

        Raises:
            ValueError: the mask's shape is not the weight's, or `reason_against` has one.
        """
        if why := cls.reason_against(layer):
            raise ValueError(f"SparseLinear: layer must be one that the sparse op covers, got {why}")
        _check_mask("SparseLinear", mask, layer.weight)
        sparse = _share(cls, layer)
        sparse.packing = Packing(mask)
        return sparse

    @staticmethod
    def reason_against(layer: nn.Linear) -> str | None:
        """Why the sparse op cannot compute this layer; None if it can."""
        return _reason_against_weight(layer.weight)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        pattern = self.packing.pattern
        values, bias = _packed(self)
        output: Tensor = torch.ops.drive.sparse_linear(input, values, pattern, bias, list(self.weight.shape))
        return output


def _check_mask(op: str, mask: Tensor, weight: Tensor) -> None:
    if mask.shape != weight.shape:
        raise ValueError(f"{op}: mask must have shape {tuple(weight.shape)}, got {tuple(mask.shape)}")


def _reason_against_padding(layer: nn.Conv2d) -> str | None:
    if layer.padding_mode != "zeros":
        return f"padding_mode {layer.padding_mode!r}"
    if layer.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    ):
        return "padding 'same' with different sides"
    return None


def _padding(layer: nn.Conv2d) -> list[int]:
    if layer.padding == "valid":
        return [0, 0]
    if layer.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [int(p) for p in layer.padding]


def _reason_against_weight(weight: Tensor) -> str | None:
    if not weight.is_floating_point():
        return f"{weight.dtype} weights"
    return f"a weight on {weight.device}" if weight.device.type != "cpu" else None


def _packed(
    layer: SparseConv2d | SparseLinear, norm: nn.BatchNorm2d | None = None
) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return layer.packing.folded(layer.weight, layer.bias, norm)
    return layer.packing.kept(layer.weight, layer.bias, norm)


def _of_batch(norm: nn.BatchNorm2d) -> bool:
    """Does it normalise by the batch's own statistics?"""
    return norm.training or norm.running_mean is None


def _normed(norm: nn.BatchNorm2d, input: Tensor, batch: int, residual: Tensor | None, relu: bool) -> Tensor:
    """BatchNorm2d by the batch's statistics, which the running ones follow."""
    gain: Tensor = norm.weight
    offset: Tensor = norm.bias
    if not norm.affine:
        gain, offset = input.new_ones(norm.num_features), input.new_zeros(norm.num_features)
    output, mean, var = torch.ops.drive.blocked_norm(input, batch, gain, offset, norm.eps, residual, relu)
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            rate = norm.momentum
            if rate is None:
                rate = 1 / float(norm.num_batches_tracked)
            count = batch * input.shape[2] * input.shape[3]
            norm.running_mean.lerp_(mean, rate)
            norm.running_var.lerp_(var * (count / max(count - 1, 1)), rate)
    out: Tensor = output
    return out
