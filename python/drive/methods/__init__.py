"""Pruning methods by name."""

from .base import Method, Problem, Ranking
from .crop import Crop
from .drive import Drive
from .early_crop import EarlyCrop
from .gradual import GradualMagnitude
from .grasp import Grasp
from .imp import Imp
from .learned_mask import LearnedMaskMagnitude
from .magnitude import Magnitude
from .random import Random
from .rigl import RigL
from .snip import Snip
from .synflow import SynFlow

_METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        Drive,
        Snip,
        Grasp,
        SynFlow,
        Crop,
        EarlyCrop,
        Magnitude,
        GradualMagnitude,
        Imp,
        RigL,
        Random,
    )
}


_OF_WRAPPERS = {LearnedMaskMagnitude.name: LearnedMaskMagnitude}


def names() -> list[str]:
    """Names that `drive.prune(method=...)` accepts for any model ("learned-mask" is for a LearnedMask)."""
    return list(_METHODS)


def get(method: "str | Method") -> Method:
    """The method of that name, or the instance itself."""
    if isinstance(method, Method):
        return method
    if method in _OF_WRAPPERS:
        return _OF_WRAPPERS[method]()
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)} or a Method, got {method!r}")
    return _METHODS[method]()


__all__ = [
    "Crop", "Drive", "EarlyCrop", "GradualMagnitude", "Grasp", "Imp", "LearnedMaskMagnitude", "Magnitude",
    "Method", "Problem", "Random", "Ranking", "RigL", "Snip", "SynFlow", "get", "names",
]  # fmt: skip
