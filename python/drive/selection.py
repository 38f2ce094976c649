"""One step of the loop: what a method ranks by, in the groups that a scope makes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .fused import prune_operands
from .masks import Masks
from .methods.base import Ranking
from .result import PruneResult
from .scopes import Groups
from .targets import Operands, match


def select(
    op: str,
    weights: Mapping[str, Tensor],
    ranking: Ranking,
    groups: Groups,
    *,
    masks: Masks | None,
    min_keep: int,
) -> PruneResult:
    """Prune every group by the ranking: weights and masks in place. The result is not checked yet.

    Raises:
        ValueError, TypeError: the ranking's tensors do not fit the weights.
    """
    results = []
    for names, prune in groups:
        results.append(
            prune_operands(
                torch.ops.drive.prune_, op, _operands(op, {n: weights[n] for n in names}, ranking), prune,
                masks=None if masks is None else Masks({n: masks[n] for n in names}),
                min_keep=min_keep, check_finite=False,
            )
        )  # fmt: skip
    return PruneResult.merged(results)


def _operands(op: str, weights: dict[str, Tensor], ranking: Ranking) -> Operands:
    if ranking.scores is not None:
        scores = [_score(op, name, weight, ranking) for name, weight in weights.items()]
        return Operands(weights, [], [], scores)

    def matched(argument: str, given: Mapping[str, Tensor] | None) -> list[Tensor]:
        return [] if given is None else match(op, argument, given, weights, weights)

    grads = matched("gradients", ranking.gradients)
    return Operands(weights, grads, matched("mask_gradients", ranking.mask_gradients))


def _score(op: str, name: str, weight: Tensor, ranking: Ranking) -> Tensor:
    assert ranking.scores is not None
    if name not in ranking.scores:
        raise ValueError(f"{op}: scores has no entry for {name}")
    score = ranking.scores[name].detach()
    if score.shape != weight.shape:
        raise ValueError(f"{op}: scores[{name}] must have shape {tuple(weight.shape)}, got {tuple(score.shape)}")
    return ordered(score) if ranking.signed else score


def ordered(score: Tensor) -> Tensor:
    """Non-negative float64 numbers in the order of float32 ones of any sign; NaN and infinities stay.

    The bits of a float32, read as an integer, are in its order, but falling for negative numbers: turned round,
    and shifted by 2^31, they are whole numbers below 2^32.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.where(score.isfinite(), rising.double() + 2.0**31, score.double())
