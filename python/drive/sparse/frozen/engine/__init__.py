"""Plans for csrc/sparse/engine: which lanes, which borders, which memory, in which order."""

from .levels import Engine

__all__ = ["Engine"]
