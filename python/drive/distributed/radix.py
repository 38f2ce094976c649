"""The k-th largest of numbers that nobody holds together, from counts of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Buckets of all problems together in one round: 32 KiB of int64. One problem alone has at most 2^11 of them,
# as csrc/prune/key.h's digits: a third of a 32-bit key a round.
_BUCKETS = 1 << 12
_BITS = 11


@dataclass
class Problem:
    """The k-th largest number is wanted; it lies in [low, high], and none above (of those that count for k).

    Solved, that is for low == high, `k` says the how manieth it is of the numbers equal to it.

    Attributes:
        up_to_next: any number will do from the one that is wanted to the next larger one, that excluded.
        larger: the next larger number is wanted: what is left to do, where a round has come by it.
    """

    k: int
    low: int
    high: int
    up_to_next: bool = False
    larger: Problem | None = None


# (index of the problem, low, shift, buckets) -> [buckets]: how many numbers lie in low + [b, b + 1) * 2^shift
Count = Callable[[int, int, int, int], Tensor]


def solve(
    problems: list[Problem], count: Count, total: Callable[[Tensor], Tensor], rounds: int | None = None
) -> None:
    """Narrow the problems' ranges until they are solved, each time by the same factor.

    Args:
        problems: changed in place. If there are fewer than k numbers, the answer is the lowest one.
        count: the counts of this rank.
        total: [problems, buckets] counts of this rank -> of all ranks.
        rounds: stop after so many, solved or not.
    """
    while (rounds is None or rounds > 0) and (open_ := [i for i, p in enumerate(problems) if p.low < p.high]):
        cuts = [bucketing(problems[i].low, problems[i].high, len(open_)) for i in open_]
        mine = [count(i, problems[i].low, *cut) for i, cut in zip(open_, cuts, strict=True)]
        for i, (shift, _), found in zip(open_, cuts, total(torch.stack(mine)), strict=True):
            narrow(problems[i], shift, found)
        rounds = None if rounds is None else rounds - 1


def bucketing(low: int, high: int, problems: int = 1) -> tuple[int, int]:
    """How one of so many problems is counted: 2^shift numbers to a bucket, and how many buckets."""
    bits = max(4, min(_BITS, (_BUCKETS // problems).bit_length() - 1))
    return max(0, (high - low).bit_length() - bits), 1 << bits


def narrow(problem: Problem, shift: int, counts: Tensor) -> None:
    """To the bucket with the answer.

    Args:
        shift: of the buckets.
        counts: [buckets] of all ranks, what `Count` gives.
    """
    counts = counts.clone()
    counts[((problem.high - problem.low) >> shift) + 1 :] = 0  # larger ones: they are not in k any more
    at_least = counts.flip(0).cumsum(0).flip(0)  # [b]: numbers in bucket b and those above it
    bucket = max(int((at_least >= problem.k).sum()) - 1, 0)
    if len(above := counts[bucket + 1 :].nonzero()):
        larger = bucket + 1 + int(above[0])
        problem.larger = Problem(int(counts[larger]), *_range(problem, larger, shift))
    problem.k -= int(at_least[bucket] - counts[bucket])
    problem.low, problem.high = _range(problem, bucket, shift)
    if problem.up_to_next and problem.k == 1:  # the bucket has no larger one
        problem.low = problem.high


def _range(problem: Problem, bucket: int, shift: int) -> tuple[int, int]:
    """Of the numbers in one bucket."""
    low = problem.low + (bucket << shift)
    return low, min(problem.high, low + (1 << shift) - 1)
