"""DRIVE: exact, fused pruning of neural networks before or during training (arXiv 2404.03687)."""

from . import methods, reference, schedules, sparse
from .collapse import Collapse, collapse
from .fused import fused_drive_prune
from .holding import register_optimizer
from .masks import Masks
from .prune import prune
from .result import PruneResult

__version__ = "0.1.0"
__all__ = [
    "Collapse", "Masks", "PruneResult", "collapse", "fused_drive_prune", "methods", "prune", "reference",
    "register_optimizer", "schedules", "sparse",
]  # fmt: skip
