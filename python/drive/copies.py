"""Copies of the same part of a tensor on several ranks: are they equal, by checksums that are added up?"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from drive_kernels.shards import Operands

from .shards import Shards

_DIGEST = (1 << 40) - 1  # whole numbers of 40 bits: as float64, those of 2^13 ranks add up exactly
_WHAT = "{}", "{}.grad", "mask_grads[{}]", "masks[{}]"  # in the order of Operands


class Copies:
    """This rank's copies, of weights, gradients, mask gradients and masks.

    Attributes:
        evidence: [T, 4] int64; added up over the ranks, it is zero where all copies of each part are equal.
    """

    def __init__(self, operands: Operands, shards: Shards):
        """
        Args:
            operands: of all tensors, the copies that another rank counts included.
            shards: the same tensors.
        """
        self._shards, self._parts = shards, list(shards.parts.values())
        digests = operands.weights[0].new_zeros(len(self._parts), len(_WHAT), dtype=torch.int64)
        for t, part in enumerate(self._parts):
            for column, tensors in enumerate(operands.lists):
                if tensors and part.copies > 1:
                    digests[t, column] = torch.ops.drive.checksum(tensors[t])
        self._digests = digests.cpu() & _DIGEST  # in one piece: a copy waits for all that is queued
        # the owner of a part has its digest once for each other copy, which takes its own off again
        factors = [[part.copies - 1 if part.owner else -1] for part in self._parts]
        self.evidence = self._digests * torch.tensor(factors)

    def check(self, evidence: Tensor) -> None:
        """All ranks must ask, with the sum of all evidence.

        Raises:
            ValueError: copies differ; names the tensor and two ranks.
        """
        if not evidence.any():
            return
        t, column = evidence.nonzero()[0].tolist()
        team, what = self._shards.team, _WHAT[column].format(list(self._shards.parts)[t])
        found = team.gather((self._parts[t].runs, int(self._digests[t, column])))
        first, other = next(
            (a, b) for (a, (ours, one)), (b, (theirs, two)) in combinations(enumerate(found), 2)
            if ours == theirs and one != two
        )  # fmt: skip
        raise ValueError(
            f"{team.op}: {what} must be the same on all ranks that hold a copy, "
            f"got different ones on ranks {first} and {other}"
        )
