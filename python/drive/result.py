"""What one pruning step did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._scoring.finite import FiniteCheck, StepCheck
from .masks import Masks
from .targets.costs import Budget
from .targets.multiply_adds import work


class TensorCount(NamedTuple):
    """One tensor's share of a step."""

    name: str
    numel: int
    kept: int


class PruneResult:
    """Outcome of one step. The numbers live where the tensors do: reading one may synchronise.

    Attributes:
        masks: the masks after the step.
    """

    def __init__(
        self,
        masks: Masks,
        kept: Tensor,
        nonfinite: Tensor,
        scores: Tensor,
        sizes: Mapping[str, int] | None = None,
        bad_ranks: Sequence[int] | None = None,
        budget: Budget | None = None,
    ):
        self.masks = masks
        # of plain shards, more than their masks have here
        self._sizes = sizes or {name: mask.numel() for name, mask in masks.items()}
        self._bad_ranks = bad_ranks
        self._budget = budget
        self._kept = kept  # [T] int64
        self._nonfinite = nonfinite  # [T] int64
        self._scores = scores  # [2] float64

    @property
    def ok(self) -> bool:
        """False: some score was NaN or infinite, and nothing was changed."""
        return not bool(self._nonfinite.any())

    @property
    def nonfinite(self) -> dict[str, int]:
        """Number of NaN or infinite scores of each tensor that has any."""
        counts = zip(self.masks, self._nonfinite.tolist(), strict=True)
        return {name: count for name, count in counts if count}

    def check_finite(self, op: str) -> FiniteCheck:
        """Send for `nonfinite` without waiting; the check's `answer()` raises ValueError if there is any.

        Args:
            op: whose step it was, for the error message.
        """
        return FiniteCheck(op, self._sizes, self._nonfinite, self._bad_ranks)

    def check_step(
        self, op: str, before: PruneResult | None, loss: Tensor | None, zero_means: str | None
    ) -> StepCheck:
        """The same of a step of a loop, and what else has to be right of one.

        Args:
            before: of the step before; None at the first one.
            loss: of `Loss.total`.
            zero_means: of StepCheck.
        """
        return StepCheck(
            op, self._sizes, self._nonfinite, self._bad_ranks, loss=loss, scores=self._scores,
            kept=self._kept, before=None if before is None else before._kept, zero_means=zero_means,
        )  # fmt: skip

    @property
    def per_tensor(self) -> list[TensorCount]:
        """(name, numel, kept) of every tensor."""
        kept = self._kept.tolist()
        return [TensorCount(*size, k) for size, k in zip(self._sizes.items(), kept, strict=True)]

    @property
    def total(self) -> int:
        """Prunable entries."""
        return sum(self._sizes.values())

    @property
    def kept(self) -> int:
        """Surviving entries."""
        return int(self._kept.sum())

    @property
    def pruned(self) -> int:
        """Entries that are zero and masked, earlier steps' included."""
        return self.total - self.kept

    @property
    def sparsity(self) -> float:
        """pruned / total (0.0 if there is no entry)."""
        return self.pruned / self.total if self.total else 0.0

    @property
    def cost_left(self) -> float | None:
        """Of a step to a budget: what the survivors cost (multiply-adds, say), of what all entries do."""
        if self._budget is None:
            return None
        costs = self._budget.costs
        return work(costs, {t.name: t.kept for t in self.per_tensor}) / max(work(costs, self._sizes), 1)

    @property
    def threshold(self) -> float:
        """Normalised score z = |S| / sum |S| (Eq. 7) of the weakest survivor; inf if none survives."""
        return float(self._scores[0])

    @property
    def score_sum(self) -> float:
        """Sum of |S| over all entries that were alive before the step: the denominator of Eq. 7."""
        return float(self._scores[1])

    @property
    def collapsed(self) -> list[str]:
        """Names of tensors in which nothing survives."""
        return [t.name for t in self.per_tensor if t.numel and not t.kept]

    @classmethod
    def merged(cls, results: Sequence[PruneResult]) -> PruneResult:
        """Several steps, on different tensors, as one. They have no common threshold (NaN)."""
        if len(results) == 1:
            return results[0]
        scores = torch.stack([r._scores for r in results]).sum(0)
        scores[0] = torch.nan
        return cls(
            Masks({name: mask for r in results for name, mask in r.masks.items()}),
            torch.cat([r._kept for r in results]),
            torch.cat([r._nonfinite for r in results]),
            scores,
            {name: size for r in results for name, size in r._sizes.items()},
            [rank for r in results for rank in r._bad_ranks or []] or None,
        )

    def summary(self) -> str:
        """A table as text: shape, survivors and density of every tensor, and the totals.

        Of a step to a budget also what the survivors cost.
        """
        budget = self._budget
        lines = [
            self.masks._table(budget.costs, budget.unit) if budget else self.masks.summary(),
            f"kept {self.kept:,} of {self.total:,}, threshold z {self.threshold:.3e}, "
            f"score sum {self.score_sum:.6e}",
        ]
        if self.collapsed:
            lines.append(f"collapsed: {', '.join(self.collapsed)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"PruneResult(kept {self.kept:,} of {self.total:,}, sparsity {self.sparsity:.6f})"
