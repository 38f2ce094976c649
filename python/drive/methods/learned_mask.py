"""Pruning by a learned mask (arXiv 2312.01653): what `drive.pipeline.LearnedMask` has learned decides."""

import torch
from torch import Tensor

from drive.distributed.wrappers import inner

from .base import Method, Problem, Ranking


class LearnedMaskMagnitude(Method):
    """Score |theta| * p, once, without data: p is the probability that the mask keeps the entry.

    The model must be a `drive.pipeline.LearnedMask`, or wrapped around one. Weights that have no logits count
    with p = 1.
    """

    name = "learned-mask"
    stage = "warm-up"
    spread = "copies"
    zero_means = "the weight is 0, or its mask is closed to the last bit"

    def rank(self, problem: Problem) -> Ranking:
        learned = inner(problem.model, "drive", "LearnedMask")
        if learned is None:
            got = type(problem.model).__name__
            raise ValueError(f"learned-mask: model must be a drive.pipeline.LearnedMask, got {got}")
        known: dict[str, Tensor] = learned.probabilities()  # type: ignore[operator]
        found = {}
        for name, weight in problem.weights.items():
            found[name] = known[name].to(weight.dtype) if name in known else torch.ones_like(weight)
        return Ranking(gradients=found)
