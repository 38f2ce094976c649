"""RigL: sparse from the first step to the last (Evci et al., ICML 2020, arXiv 1911.11134)."""

from math import cos, pi

import torch
from torch import Tensor

from .base import Method, Problem, Ranking


class RigL(Method):
    """Random masks at first; after every round of training the weakest survivors go, others grow.

    A layer drops the fraction f_n = fraction / 2 * (1 + cos(n pi / N)) of its survivors with the smallest
    |theta|, and grows as many with the largest |dL/dtheta| on a fresh batch among those then pruned. Grown
    weights start at zero; those dropped and grown at once keep their value, as in the published code. Layer
    densities (Erdos-Renyi-Kernel, or scope="uniform") stay what they are. A round (`drive.prune`'s `train`)
    is the paper's Delta T steps (100), and the `iterations` N are those of the paper until T_end: it stops at
    75 % of the training, the rest is the caller's. The masks change in place.

    Args:
        fraction: dropped at first (alpha).
    """

    name = "rigl"
    stage = "training"
    spread = "copies"
    scope = "erk"
    iterations = 100

    def __init__(self, fraction: float = 0.3):
        if not 0 <= fraction <= 1:
            raise ValueError(f"RigL: fraction must be in [0, 1], got {fraction}")
        self.fraction = fraction

    def before(self, problem: Problem) -> None:
        if problem.masks is not None:
            problem.train(problem.model, problem.masks, problem.iteration - 2)

    @torch.no_grad()
    def rank(self, problem: Problem) -> Ranking:
        if problem.masks is None:
            noise = {n: torch.rand_like(w, dtype=torch.float64) for n, w in problem.weights.items()}
            return Ranking(scores=noise)
        fraction = self.fraction / 2 * (1 + cos(pi * (problem.iteration - 1) / problem.iterations))
        grads = problem.loss_gradients(reuse=True)
        scores = {}
        for name, weight in problem.weights.items():
            stay = _strongest(weight, problem.masks[name], fraction)
            scores[name] = torch.where(stay, _ABOVE_ALL, grads[name].double().abs())
        return Ranking(scores=scores, revive=True)


_ABOVE_ALL = 2.0**200  # no float32 gradient is as large


def _strongest(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Mask of the survivors without that fraction of them, the smallest in absolute value."""
    alive = int(mask.sum())
    prune, stay = mask.numel() - alive + int(fraction * alive), mask.clone()
    torch.ops.drive.prune_([weight.clone()], [], [], [stay], False, prune, 0)
    return stay
