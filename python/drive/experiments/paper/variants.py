"""A way to prune: a method, and all that experiments vary about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from drive import methods
from drive.methods.base import Method
from drive.targets.structures import CHANNELS


@dataclass(frozen=True)
class Variant:
    """A named way to prune; "dense" is the one that does not.

    Attributes:
        name: what it is called in tables and files.
        method: a name of `drive.methods`, or "dense".
        warmup: dense epochs before it prunes, the first of the recipe's; the sparse network trains the rest.
        iterations: of scoring and pruning. None: the method's own.
        rounds: epochs of training in the course of pruning: of each level of IMP, which goes through the
            whole schedule of the learning rate in them; at most, of EarlyCroP; 0 for the others.
        powers: of |theta| and |G| in DRIVE's score. None: DRIVE's own.
        eval_mode: the network is scored in eval mode, not in the mode that it is trained in.
        structure: of `drive.prune`; what is pruned by "channels" is shrunk before it is trained.
        prior: the share of the channels that go first, before the rest is pruned; 0: none.
    """

    name: str
    method: str
    warmup: int = 0
    iterations: int | None = None
    rounds: int = 0
    powers: tuple[int, int] | None = None
    eval_mode: bool = False
    structure: str = "unstructured"
    prior: float = 0.0

    def make(self) -> Method:
        """The method, set up."""
        if self.powers:
            return methods.Drive(powers=self.powers)
        if self.method == "early_crop":
            return methods.EarlyCrop(latest=self.rounds)
        return methods.get(self.method)

    @property
    def first_epoch(self) -> int:
        """The epoch of the recipe, from 0, that the sparse network is trained from once it is pruned."""
        if self.method in ("gradual", "rigl"):  # they have pruned in the course of those before
            assert self.iterations is not None
            return self.iterations - (self.method == "rigl")  # whose first iteration comes before any epoch
        return self.warmup

    @property
    def smaller(self) -> bool:
        """Is the network shrunk, or compared with such?"""
        return bool(self.structure == CHANNELS or self.prior)

    def scaled(self, scale: float) -> Variant:
        """The same in a fraction of the epochs; what is there at all stays there.

        IMP has as much fewer levels, too.
        """

        def shrunk(count: int) -> int:
            return max(1, round(count * scale)) if count else 0

        iterations = shrunk(self.iterations or 0) if self.method == "imp" else self.iterations
        return replace(
            self, warmup=shrunk(self.warmup), rounds=shrunk(self.rounds), iterations=iterations or None
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain values; without what most have not, so that their cells keep their names."""
        usual = {"eval_mode": False, "structure": "unstructured", "prior": 0.0}
        return {name: value for name, value in vars(self).items() if usual.get(name) != value}


def dense(warmup: int = 0, name: str = "dense") -> Variant:
    """No pruning; with a warm-up, the first epochs are those that others share."""
    return Variant(name, "dense", warmup)
