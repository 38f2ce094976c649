"""drive.sparse.freeze: whole networks for inference on a CPU."""

from .freeze import freeze, load
from .plan import Frozen, PartlyFrozen

__all__ = ["Frozen", "PartlyFrozen", "freeze", "load"]
