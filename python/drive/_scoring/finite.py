"""Were loss and scores of a step finite, and did they decide? Asked without making the device wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from .ties import REMEDIES, by_index


class FiniteCheck:
    """A question put to a step; the answer is there when the step is done, whatever is queued behind it."""

    def __init__(
        self, op: str, sizes: Mapping[str, int], nonfinite: Tensor, ranks: Sequence[int] | None = None
    ):
        """Send for the answer.

        Args:
            op: whose step it is, for the error message.
            sizes: entries of the tensors of the step, by name.
            nonfinite: [T], NaN or infinite scores per tensor.
            ranks: [T] first rank that has any, if the tensors are spread over several.
        """
        self._op, self._sizes, self._ranks = op, sizes, ranks
        self._asked = nonfinite.to("cpu", non_blocking=nonfinite.is_cuda)
        self._sent: torch.cuda.Event | None = None
        if nonfinite.is_cuda:
            self._sent = torch.cuda.current_stream(nonfinite.device).record_event()

    def answer(self) -> None:
        """Wait for the answer.

        Raises:
            ValueError: a score is not finite; names the tensor, the first one of them.
        """
        self._check_scores(self._numbers())

    def _numbers(self) -> list[float]:
        if self._sent is not None:
            self._sent.synchronize()
        return self._asked.tolist()

    def _check_scores(self, counts: Sequence[float]) -> None:
        for index, ((name, size), count) in enumerate(zip(self._sizes.items(), counts, strict=True)):
            if count:
                where = "" if self._ranks is None else f", the first on rank {self._ranks[index]}"
                raise ValueError(
                    f"{self._op}: non-finite score in {name} ({int(count)} of {size} entries{where})"
                )


class StepCheck(FiniteCheck):
    """The same of a step of a loop, and of the losses before it; and: has it done what a step should?"""

    def __init__(
        self,
        op: str,
        sizes: Mapping[str, int],
        nonfinite: Tensor,
        ranks: Sequence[int] | None,
        *,
        loss: Tensor | None,
        scores: Tensor,
        kept: Tensor,
        before: Tensor | None,
        zero_means: str | None,
    ):
        """Send for the answer, all in one piece.

        Args:
            op, sizes, nonfinite, ranks: of FiniteCheck.
            loss: a number that is not finite if one was not; None: there was none.
            scores: [2], the second is the sum of all that were alive.
            kept: [T], how many the step has left.
            before: likewise, the step before; None: it is the first one.
            zero_means: what a score of 0 says; None: that all are 0 is accepted.
        """
        pieces = [nonfinite, kept, kept if before is None else before, scores]
        if loss is not None:
            pieces.append(loss.view(1))
        there = [piece.to(nonfinite.device) for piece in pieces]  # what ranks add up is on the CPU
        super().__init__(op, sizes, torch.cat(there), ranks)  # as float64
        self._zero_means = zero_means

    def answer(self) -> None:
        """Wait for the answer.

        Raises:
            ValueError: a loss or a score is not finite; scores of 0 have decided; nothing survives.
        """
        numbers, tensors = self._numbers(), len(self._sizes)
        nonfinite, kept, before = (numbers[i * tensors : (i + 1) * tensors] for i in range(3))
        _, score_sum, *loss = numbers[3 * tensors :]
        if loss:
            check_loss(self._op, loss[0])
        self._check_scores(nonfinite)
        if kept != before and not score_sum and self._zero_means is not None:
            facts = by_index(f"{self._op}: all of the entries score 0", self._zero_means)
            raise ValueError(f"{facts}, or that no target of the batch counts. {REMEDIES}")
        total = sum(self._sizes.values())
        if total and not any(kept):
            raise ValueError(
                f"{self._op}: something must survive, got none of {total:,} entries: what ranks first costs "
                "more than macs leaves, or masks= had pruned all"
            )


def check_loss(op: str, loss: float) -> None:
    """Raise ValueError unless a loss, or a sum of some, is finite."""
    if not isfinite(loss):
        raise ValueError(
            f"{op}: the loss must be finite, got {loss}: are all targets of a batch ignored, its inputs or "
            "the weights not finite?"
        )


class LateChecks:
    """The checks of many steps, each answered `steps_late` steps later.

    One step late, a device always has a step to work on while the host waits for the one before, and the
    host is never further ahead: no more than two batches are on the device.
    """

    def __init__(self, steps_late: int):
        self._late = steps_late
        self._open: list[FiniteCheck] = []

    def add(self, check: FiniteCheck) -> None:
        """Ask, and take the answer that is due."""
        self._open.append(check)
        self._answer(self._late)

    def finish(self) -> None:
        """Take all answers."""
        self._answer(0)

    def _answer(self, left: int) -> None:
        while len(self._open) > left:
            self._open.pop(0).answer()
