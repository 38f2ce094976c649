"""Layers that compute with the surviving weights only, and the choice of where they pay."""

from .convert import convert
from .frozen import Frozen, PartlyFrozen, freeze, load
from .gpu import BlockLinear, PackedLinear, SemiStructuredLinear
from .layers import SparseConv2d, SparseLinear
from .masked import MaskedConv2d, MaskedLinear
from .report import Choice, Report, report

__all__ = [
    "BlockLinear", "Choice", "Frozen", "MaskedConv2d", "MaskedLinear", "PackedLinear", "PartlyFrozen",
    "Report", "SemiStructuredLinear", "SparseConv2d", "SparseLinear", "convert", "freeze", "load", "report",
]  # fmt: skip
