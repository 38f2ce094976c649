"""Pruning methods by name."""

from .base import Method, Problem, Ranking
from .crop import Crop
from .drive import Drive
from .grasp import Grasp
from .magnitude import Magnitude
from .random import Random
from .snip import Snip
from .synflow import SynFlow

_METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Drive, Snip, Grasp, SynFlow, Crop, Magnitude, Random)
}


def names() -> list[str]:
    """Names that `drive.prune(method=...)` accepts."""
    return list(_METHODS)


def get(method: "str | Method") -> Method:
    """The method of that name, or the instance itself."""
    if isinstance(method, Method):
        return method
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)} or a Method, got {method!r}")
    return _METHODS[method]()


__all__ = [
    "Crop", "Drive", "Grasp", "Magnitude", "Method", "Problem", "Random", "Ranking", "Snip", "SynFlow",
    "get", "names",
]  # fmt: skip
