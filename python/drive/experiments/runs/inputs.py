"""What the command line accepts: parsing of option values, and one clear line for what it rejects."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

# extra of the package -> what it brings in, by import name
EXTRAS = {
    "cli": ("typer", "rich"),
    "vision": ("torchvision", "PIL"),
    "structured": ("torch_pruning",),
    "rivals": ("onnx", "onnxruntime", "openvino"),
    "experiments": ("sklearn", "matplotlib", "lightning", "tensorboard"),
}


class InputError(ValueError):
    """Bad input; the message reads `<argument> must be <expected>, got <actual>`."""


def require(module: str) -> Any:
    """Import a module of an optional dependency (`sklearn.datasets`, `torchvision.models`).

    Raises:
        InputError: it cannot be imported; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = next(name for name, packages in EXTRAS.items() if package in packages)
        raise InputError(
            f"{package} must be installed (pip install 'drive-prune[{extra}]'), got {one_line(error)}"
        ) from error


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A parser for one of these names."""
    known = list(names)

    def parse(text: str) -> str:
        if text not in known:
            raise InputError(f"must be one of {', '.join(known)}, got {text!r}")
        return text

    return parse


def several_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser for distinct names, separated by commas."""
    known = list(names)

    def parse(text: str) -> list[str]:
        found = [part.strip() for part in text.split(",")]
        if len(set(found)) < len(found) or not set(found) <= set(known):
            raise InputError(f"must be distinct names out of {', '.join(known)}, got {text!r}")
        return found

    return parse


def whole_number(minimum: int, most: float = math.inf) -> Callable[[str], int]:
    """A parser for an integer, `minimum` or above, `most` or below."""
    to = f"in [{minimum}, {most}]" if most < math.inf else f">= {minimum}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= most:
            raise InputError(f"must be an integer {to}, got {text!r}")
        return value

    return parse


seeds = whole_number(1, 10_000)  # how many: each has networks to train


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise InputError(f"must be a finite number > 0, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or above."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise InputError(f"must be a finite number >= 0, got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise InputError(f"must be in (0, 1], got {text!r}")
    return value


def sparsities(text: str) -> list[float]:
    """Distinct fractions in [0, 1), separated by commas, in rising order."""
    return sorted(_distinct(text, "[0, 1)", lambda value: 0 <= value < 1))


def sparsity(text: str) -> float:
    """A fraction in [0, 1)."""
    value = _number(text)
    if not 0 <= value < 1:
        raise InputError(f"must be a fraction in [0, 1), got {text!r}")
    return value


def shares(text: str) -> list[float]:
    """Distinct fractions in (0, 1], separated by commas, in falling order."""
    return sorted(_distinct(text, "(0, 1]", lambda value: 0 < value <= 1), reverse=True)


def device(text: str) -> str:
    """The name of a device of this machine: cpu, cuda, cuda:1."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise InputError(f"must be cpu, cuda or cuda:N, got {text!r}")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"must be a device of this machine, got {text!r} ({one_line(error)})") from error
    return text


def _distinct(text: str, interval: str, inside: Callable[[float], bool]) -> list[float]:
    values = [_number(part) for part in text.split(",")]
    if not all(map(inside, values)) or len(set(values)) < len(values):
        raise InputError(f"must be distinct numbers in {interval}, separated by commas, got {text!r}")
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # fails every comparison


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or what it is."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
