"""Pruning methods by name."""

from .base import Method, Problem
from .drive import Drive
from .magnitude import Magnitude
from .snip import Snip

_METHODS: dict[str, type[Method]] = {m.name: m for m in (Drive, Snip, Magnitude)}


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


__all__ = ["Drive", "Magnitude", "Method", "Problem", "Snip", "get", "names"]
