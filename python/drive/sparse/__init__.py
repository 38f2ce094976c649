"""Layers that compute with the surviving weights only, and the choice of where they pay."""

from .convert import convert
from .gpu import BlockLinear, PackedLinear, SemiStructuredLinear
from .layers import SparseConv2d, SparseLinear
from .masked import MaskedConv2d, MaskedLinear
from .report import Choice, Report, report

__all__ = [
    "BlockLinear", "Choice", "MaskedConv2d", "MaskedLinear", "PackedLinear", "Report", "SemiStructuredLinear",
    "SparseConv2d", "SparseLinear", "convert", "report",
]  # fmt: skip
