"""Were the scores of a step finite? Asked without making the device wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class FiniteCheck:
    """A question put to a step; the answer is there when the step is done, whatever is queued behind it."""

    def __init__(
        self, op: str, sizes: Mapping[str, int], nonfinite: Tensor, ranks: Sequence[int] | None = None
    ):
        """Send for the answer.

        Args:
            op: whose step it is, for the error message.
            sizes: entries of the tensors of the step, by name.
            nonfinite: [T] int64, NaN or infinite scores per tensor.
            ranks: [T] first rank that has any, if the tensors are spread over several.
        """
        self._op, self._sizes, self._ranks = op, sizes, ranks
        self._nonfinite = nonfinite.to("cpu", non_blocking=nonfinite.is_cuda)
        self._sent: torch.cuda.Event | None = None
        if nonfinite.is_cuda:
            self._sent = torch.cuda.current_stream(nonfinite.device).record_event()

    def answer(self) -> None:
        """Wait for the answer.

        Raises:
            ValueError: a score is not finite; names the tensor, the first one of them.
        """
        if self._sent is not None:
            self._sent.synchronize()
        counts = zip(self._sizes.items(), self._nonfinite.tolist(), strict=True)
        for index, ((name, size), count) in enumerate(counts):
            if count:
                where = "" if self._ranks is None else f", the first on rank {self._ranks[index]}"
                raise ValueError(f"{self._op}: non-finite score in {name} ({count} of {size} entries{where})")


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
