"""The k-th largest of numbers that nobody holds together, from counts of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Buckets of all problems together in one round: 32 KiB of int64. One problem alone has at most 2^11 of them,
# as csrc/key.h's digits: a third of a 32-bit key a round.
_BUCKETS = 1 << 12
_BITS = 11


@dataclass
class Problem:
    """The k-th largest number is wanted; it lies in [low, high], and none above (of those that count for k).

    Solved, that is for low == high, `k` says the how manieth it is of the numbers equal to it.
    """

    k: int
    low: int
    high: int


# (index of the problem, low, shift, buckets) -> [1 or 2, buckets]: how many numbers lie in
# low + [b, b + 1) * 2^shift; and, if whoever counts knows it, n - low where that is one number n, else 0
Count = Callable[[int, int, int, int], Tensor]


def solve(
    problems: list[Problem], count: Count, total: Callable[[Tensor], Tensor], rounds: int | None = None
) -> None:
    """Narrow the problems' ranges until they are solved, each time by the same factor.

    Args:
        problems: changed in place. If there are fewer than k numbers, the answer is the lowest one.
        count: the counts of this rank.
        total: [problems, 1 or 2, buckets] counts of this rank -> of all ranks.
        rounds: stop after so many, solved or not.
    """
    while (rounds is None or rounds > 0) and (open_ := [i for i, p in enumerate(problems) if p.low < p.high]):
        cuts = [bucketing(problems[i].low, problems[i].high, len(open_)) for i in open_]
        mine = [count(i, problems[i].low, *cut) for i, cut in zip(open_, cuts, strict=True)]
        for i, (shift, _), found in zip(open_, cuts, total(torch.stack(mine)), strict=True):
            narrow(problems[i], shift, *found)
        rounds = None if rounds is None else rounds - 1


def bucketing(low: int, high: int, problems: int = 1) -> tuple[int, int]:
    """How one of so many problems is counted: 2^shift numbers to a bucket, and how many buckets."""
    bits = max(4, min(_BITS, (_BUCKETS // problems).bit_length() - 1))
    return max(0, (high - low).bit_length() - bits), 1 << bits


def narrow(problem: Problem, shift: int, counts: Tensor, only: Tensor | None = None) -> None:
    """To the bucket with the answer.

    Args:
        shift: of the buckets.
        counts, only: [buckets] of all ranks, what `Count` gives.
    """
    counts = counts.clone()
    counts[((problem.high - problem.low) >> shift) + 1 :] = 0  # larger ones: they are not in k any more
    at_least = counts.flip(0).cumsum(0).flip(0)  # [b]: numbers in bucket b and those above it
    bucket = max(int((at_least >= problem.k).sum()) - 1, 0)
    problem.k -= int(at_least[bucket] - counts[bucket])
    if only is not None and counts[bucket] == 1:  # one rank alone has it
        problem.low = problem.high = problem.low + int(only[bucket])
        return
    problem.low += bucket << shift
    problem.high = min(problem.high, problem.low + (1 << shift) - 1)
