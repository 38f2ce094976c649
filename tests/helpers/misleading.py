"""Scores made so that a step's sample is wrong: the counts must notice, and the masks stay exact."""

from __future__ import annotations

from functools import cache

import torch
from ugly import Step

TRAPS = ("threshold far below", "threshold far above", "bracket too full")


@cache
def sampled_positions(n: int, count: int) -> torch.Tensor:
    """The entries that the CPU kernel looks at to guess the threshold (csrc/prune/cpu/step.h, step 1)."""
    found, low = [], (1 << 64) - 1
    for part in range(count):
        x = (part + 0x9E3779B97F4A7C15) & low
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & low
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & low
        x ^= x >> 31
        found.append(min(int((part + (x >> 11) * 2.0**-53) * n / count), n - 1))
    return torch.tensor(found)


def misleading(trap: str, n: int, samples: int, dtype: torch.dtype = torch.float32) -> list[Step]:
    """One tensor of n entries that falls into the trap, pruned by a half, a tenth, nine tenths."""
    grad = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=dtype) + 1
    position = sampled_positions(n, samples)
    if trap == "threshold far below":
        grad[position] += 100
    elif trap == "threshold far above":
        grad[position] /= 100
    else:  # the sample is spread evenly over [0, 3], all else lies within its middle
        grad = 1.5 + grad * 1e-3
        grad[position] = torch.linspace(0, 3, samples, dtype=dtype)
    weight, mask = torch.ones(n, dtype=dtype), torch.ones(n, dtype=torch.bool)
    return [Step([weight], [grad], [], [mask], True, prune, 0) for prune in (n // 2, n // 10, n - n // 10)]
