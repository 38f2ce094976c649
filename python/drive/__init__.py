"""DRIVE: exact, fused pruning of neural networks before or during training (arXiv 2404.03687)."""

from drive_kernels.memory import release_memory

from . import methods, reference, schedules, sparse
from .collapse import Collapse, collapse
from .fused import fused_drive_prune
from .holding import register_optimizer
from .layers import register_layer
from .masks import Masks
from .prune import prune
from .result import PruneResult
from .structured.shrink import Shrunk, rebuild, shrink
from .targets.choice import default_include
from .targets.coverage import coverage

__version__ = "0.1.0"
__all__ = [
    "Collapse", "Masks", "PruneResult", "Shrunk", "collapse", "coverage", "default_include",
    "fused_drive_prune", "methods", "prune", "rebuild", "reference", "register_layer", "register_optimizer",
    "release_memory", "schedules", "shrink", "sparse",
]  # fmt: skip
