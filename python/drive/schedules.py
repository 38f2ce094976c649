"""Sparsity schedules: the sparsity after each of the iterations 1..N, ending at the final one."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[int], float]


def one_shot(sparsity: float, iterations: int) -> Schedule:
    """Everything at the first iteration."""
    return lambda step: sparsity


def exponential(sparsity: float, iterations: int) -> Schedule:
    """Density (1 - sparsity)^(n / N): the same fraction of the survivors goes at every iteration.

    DRIVE (arXiv 2404.03687, Eq. 1), SynFlow (arXiv 2006.05467).
    """
    return lambda step: 1 - (1 - sparsity) ** (step / iterations)


def linear(sparsity: float, iterations: int) -> Schedule:
    """The same number of entries goes at every iteration."""
    return lambda step: sparsity * step / iterations


def cubic(sparsity: float, iterations: int) -> Schedule:
    """sparsity * (1 - (1 - n / N)^3): fast first, slow last (Zhu and Gupta, arXiv 1710.01878, Eq. 1)."""
    return lambda step: sparsity * (1 - (1 - step / iterations) ** 3)


def halving(sparsity: float, iterations: int) -> Schedule:
    """Half the way to `sparsity` at every iteration, from 0.5 on (0.25, if that is beyond it).

    CroP (arXiv 2206.10451): rho - (rho - 0.5) * 0.5^i, i = 0, 1, ...
    """
    start = 0.5 if sparsity > 0.5 else min(0.25, sparsity)
    return lambda step: sparsity - (sparsity - start) * 0.5 ** (step - 1)


_SCHEDULES = {f.__name__: f for f in (one_shot, exponential, linear, cubic, halving)}


def names() -> list[str]:
    """Names that `plan` accepts."""
    return list(_SCHEDULES)


def plan(schedule: str | Schedule, sparsity: float, iterations: int) -> list[float]:
    """The sparsity after each iteration; the last one is `sparsity` exactly.

    Raises:
        ValueError: an unknown name; a callable that leaves [0, 1), falls, or ends elsewhere than at
            `sparsity` (to 1e-9).
    """
    if not isinstance(schedule, str):
        steps = [float(schedule(step)) for step in range(1, iterations + 1)]
        _check(steps, sparsity)
    elif schedule in _SCHEDULES:
        steps = [_SCHEDULES[schedule](sparsity, iterations)(s) for s in range(1, iterations + 1)]
    else:
        raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)} or a callable, got {schedule!r}")
    return [*steps[:-1], sparsity]


def _check(steps: list[float], sparsity: float) -> None:
    for number, (before, now) in enumerate(zip([0.0, *steps], steps, strict=False), 1):
        if not before <= now < 1:
            raise ValueError(f"schedule({number}) must be in [{before}, 1): sparsity never falls, got {now}")
    if abs(steps[-1] - sparsity) > 1e-9:
        raise ValueError(f"schedule({len(steps)}) must be the final sparsity {sparsity}, got {steps[-1]}")
