"""Dense Linear layers in a library's own layout: what sparse ones have to beat in inference on a CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .kept import Kept
from .layers import _share


class _LaidOutLinear(nn.Linear, ABC):
    """A Linear with a second copy of its weight, laid out for multiplying: for inference on a CPU.

    Where gradients are recorded, under autocast and in torch.compile, it computes as the dense layer does.
    """

    _rows: int  # of the input, that the layout is made for; others come out right too
    _kept: Kept[Tensor]

    @classmethod
    def from_dense(cls, layer: nn.Linear, rows: int) -> Self:
        """The same layer, sharing its parameters.

        Raises:
            ValueError: `reason_against` has one.
        """
        if why := cls.reason_against(layer):
            raise ValueError(f"{cls.__name__}: layer must be one that it covers, got {why}")
        ours = _share(cls, layer)
        ours._rows, ours._kept = rows, Kept()
        return ours

    @classmethod
    def reason_against(cls, layer: nn.Linear) -> str | None:
        """Why it cannot compute this layer; None if it can."""
        if layer.weight.device.type != "cpu":
            return f"a weight on {layer.weight.device}"
        return cls._reason_against_dtype(layer.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if not self._is_plain_inference(input):
            return super().forward(input)
        return self._multiply(input, self._kept(self._lay_out, self.weight))

    def _is_plain_inference(self, input: Tensor) -> bool:
        """What does not fit the layer at all is left to F.linear's message."""
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or input.dtype != self.weight.dtype
            or input.dim() < 2
            or input.shape[-1] != self.in_features
        )

    @staticmethod
    @abstractmethod
    def _reason_against_dtype(dtype: torch.dtype) -> str | None: ...

    @abstractmethod
    def _lay_out(self, weight: Tensor) -> Tensor: ...

    @abstractmethod
    def _multiply(self, input: Tensor, weight: Tensor) -> Tensor: ...


class OneDnnLinear(_LaidOutLinear):
    """A Linear by oneDNN, which computes bfloat16 too."""

    @staticmethod
    def _reason_against_dtype(dtype: torch.dtype) -> str | None:
        if not torch.backends.mkldnn.is_available():
            return "a PyTorch without oneDNN"
        known = dtype == torch.float32 or (
            dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return None if known else f"{dtype} weights"

    def _lay_out(self, weight: Tensor) -> Tensor:
        layout: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, self._rows)
        return layout

    def _multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, self.bias, "none", [], "")
        return output


class MklLinear(_LaidOutLinear):
    """A Linear by MKL, which F.linear uses too, but lays the weight out in each call."""

    @staticmethod
    def _reason_against_dtype(dtype: torch.dtype) -> str | None:
        if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
            return "a PyTorch without MKL"
        return None if dtype == torch.float32 else f"{dtype} weights"

    def _lay_out(self, weight: Tensor) -> Tensor:
        layout: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, self._rows)
        return layout

    def _multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkl._mkl_linear(input, weight, self.weight, self.bias, self._rows)
        return output


KINDS: dict[str, type[_LaidOutLinear]] = {"dense oneDNN": OneDnnLinear, "dense MKL": MklLinear}
