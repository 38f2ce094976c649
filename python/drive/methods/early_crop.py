"""EarlyCroP: CroP, as soon as the weights have settled (Rachwan et al., ICML 2022, arXiv 2206.10451)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from drive.targets.arguments import whole

from .base import Problem
from .crop import Crop


class EarlyCrop(Crop):
    """CroP's score and steps, all at once, after the round of training at which the rule says so.

    d_t = |w_t - w_1| / |w_1| over all parameters (L2), w_t those after round t (an epoch in the paper).
    Prunes at the first t with |d_t - d_(t-1)| < d_2 (1 - sparsity): the higher the sparsity, the later. The
    caller trains on, with a fresh learning rate; nothing is rewound.

    Of structure "channels" (EarlyCroP-S) the right hand side is d_2 (1 - sparsity - 0.1), in which the
    sparsity is of nodes: nothing from 0.9 on, so that the published code prunes at its latest epoch there.
    Here it is never less than d_2 * floor.

    Args:
        latest: round after which it prunes in any case.
        floor: of the rule for channels.
    """

    name = "early_crop"
    stage = "training"

    def __init__(self, latest: int = 30, floor: float = 0.01):
        latest = whole("EarlyCrop", "latest", latest, 1)
        if not floor >= 0:
            raise ValueError(f"EarlyCrop: floor must be >= 0, got {floor}")
        self.latest, self.floor = latest, floor

    def before(self, problem: Problem) -> None:
        if problem.iteration > 1:
            return
        share = 1 - problem.sparsity
        if problem.outputs is not None:
            share = max(share - 0.1, self.floor)
        reference: list[Tensor] = []
        distances: list[float] = []
        for number in range(self.latest):
            problem.train(problem.model, problem.masks, number)
            weights = [w.detach() for w in problem.model.parameters()]
            if not reference:
                reference = [w.clone() for w in weights]
                continue
            distances.append(distance(weights, reference))
            if settled(distances, share):
                return


def distance(weights: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """|weights - reference| / |reference|, in float64."""
    moved = torch.stack(
        [(w.double() - r.double()).square().sum() for w, r in zip(weights, reference, strict=True)]
    )
    length = torch.stack([r.double().square().sum() for r in reference])
    return float((moved.sum() / length.sum()).sqrt())


def settled(distances: Sequence[float], share: float) -> bool:
    """Whether to prune now, by the distances d_2, d_3, ...: the last step is less than a share of d_2."""
    return len(distances) > 1 and abs(distances[-1] - distances[-2]) < distances[0] * share
