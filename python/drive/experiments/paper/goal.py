"""How far a network is pruned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from drive import schedules


@dataclass(frozen=True)
class Goal:
    """A share of zeros, or of multiply-adds: arguments of `drive.prune`, None where they are not given.

    Attributes:
        sparsity: 0 of the dense network.
    """

    sparsity: float | None = None
    macs: float | None = None
    alpha: float | None = None

    @property
    def share(self) -> float:
        """The one that is given: of weights that go, or of multiply-adds that are left."""
        share = self.sparsity if self.macs is None else self.macs
        assert share is not None
        return share

    @property
    def gone(self) -> float:
        """The share that goes, of the one or the other."""
        return self.share if self.macs is None else 1 - self.share

    @property
    def percent(self) -> str:
        """As columns are called, of tables whose other columns have the same `axis`."""
        return f"{100 * self.share:g} %"

    @property
    def axis(self) -> str:
        """What the percentages are of."""
        return "weights pruned" if self.macs is None else "multiply-adds left"

    @property
    def title(self) -> str:
        """For people."""
        return self.percent if self.macs is None else f"{self.percent} of the multiply-adds"

    @property
    def name(self) -> str:
        """In a folder's name."""
        return f"{self.share:g}" if self.macs is None else f"macs{self.share:g}"

    def steps(self, count: int) -> list[Goal]:
        """As many goals, each leaving the same part of what the one before it leaves; the last is this."""
        before = schedules.plan("exponential", self.gone, count)[:-1]
        return [*(Goal(gone) if self.macs is None else replace(self, macs=1 - gone) for gone in before), self]

    def as_dict(self) -> dict[str, Any]:
        """The arguments of `drive.prune` that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}
