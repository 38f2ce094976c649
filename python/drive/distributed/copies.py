"""Copies of the same part of a tensor on several ranks: are they equal, by checksums that are added up?"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from drive_kernels.prune.shards import Operands

from .shards import Shards
from .team import sent

_DIGEST = (1 << 40) - 1  # whole numbers of 40 bits: as float64, those of 2^13 ranks add up exactly
_WHAT = "{}", "{}.grad", "mask_grads[{}]", "masks[{}]"  # in the order of Operands


class Copies:
    """This rank's copies, of weights, gradients, mask gradients and masks.

    Attributes:
        evidence: [4, T] int64; added up over the ranks, it is zero where all copies of each part are equal.
    """

    def __init__(self, operands: Operands, shards: Shards):
        """
        Args:
            operands: of all tensors, the copies that another rank counts included.
            shards: the same tensors.
        """
        self._shards, self._parts = shards, list(shards.parts.values())
        like = operands.weights[0]
        self._digests = torch.zeros(len(_WHAT), len(self._parts), dtype=torch.int64, device=like.device)
        if any(part.copies > 1 for part in self._parts):
            *lists, masks = operands.lists
            lists.append([] if operands.fresh else masks)
            for row, tensors in zip(self._digests, lists, strict=True):
                pairs = zip(tensors, self._parts, strict=False)  # of parts without copies, nothing
                shared = [tensor if part.copies > 1 else tensor.new_empty(0) for tensor, part in pairs]
                if shared:
                    row.copy_(torch.ops.drive.checksum(shared) & _DIGEST)
        # the owner of a part has its digest once for each other copy, which takes its own off again
        factors = [0 if p.copies == 1 else p.copies - 1 if p.owner else -1 for p in self._parts]
        self.evidence = self._digests * sent(torch.tensor(factors), like.device)

    def check(self, evidence: Tensor) -> None:
        """All ranks must ask, with the sum of all evidence.

        Raises:
            ValueError: copies differ; names the tensor and two ranks.
        """
        if not evidence.any():
            return
        t, row = evidence.t().nonzero()[0].tolist()
        team, what = self._shards.team, _WHAT[row].format(list(self._shards.parts)[t])
        found = team.gather((self._parts[t].runs, int(self._digests[row, t])))
        first, other = next(
            (a, b) for (a, (ours, one)), (b, (theirs, two)) in combinations(enumerate(found), 2)
            if ours == theirs and one != two
        )  # fmt: skip
        raise ValueError(
            f"{team.op}: {what} must be the same on all ranks that hold a copy, "
            f"got different ones on ranks {first} and {other}"
        )
