"""What survives of some tensors, when counts of all ranks have decided it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Choice:
    """Of some tensors the entries above a threshold key survive, and the first on it that `left` pays for."""

    tensors: list[int]
    costs: list[int]  # of an entry, by tensor
    threshold: int
    left: int  # of the budget, for entries on the threshold
    above: list[int]  # by tensor, on all ranks
    equal: list[int]
    larger: int | None = None  # the next key above the threshold, if none on it survives; the top one: no key

    @property
    def weakest(self) -> int:
        """The least key of a survivor; the top one if there is none."""
        return self.threshold if self.larger is None else self.larger

    def surviving_ties(self) -> list[int]:
        """By tensor: the first ones in the order of the tensors, up to one that costs too much."""
        left, found = self.left, []
        for cost, equal in zip(self.costs, self.equal, strict=True):
            ties = min(left // cost, equal)
            left = left - ties * cost if ties == equal else 0
            found.append(ties)
        return found

    def kept(self) -> list[int]:
        """By tensor: its survivors on all ranks."""
        return [above + ties for above, ties in zip(self.above, self.surviving_ties(), strict=True)]
