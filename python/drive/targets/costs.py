"""A budget: what the entries that survive a step may cost together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from .arguments import MOST, real, whole

LARGEST = 2**31 - 1  # of an entry's cost


@dataclass(frozen=True)
class Budget:
    """What `costs`, `max_cost` and `alpha` of `fused_drive_prune` say.

    Attributes:
        costs: of an entry of each tensor, by name; from 1 to 2^31 - 1.
        max_cost: of all survivors.
        alpha: scores are ranked by |S| / cost ** alpha.
        unit: what the costs are, in words.
    """

    costs: Mapping[str, int]
    max_cost: int
    alpha: float
    unit: str = "cost"

    def check_names(self, op: str, names: Mapping[str, object]) -> None:
        """Raise ValueError unless every tensor has a cost."""
        for name in names:
            if name not in self.costs:
                raise ValueError(f"{op}: costs has no entry for {name}")

    def check_total(self, op: str, sizes: Mapping[str, int]) -> None:
        """Raise ValueError unless sums of what these entries cost fit into 64 bits."""
        total = sum(self.costs[name] * size for name, size in sizes.items())
        if total > MOST:
            raise ValueError(f"{op}: all entries must cost less than 2^63 together, got {total}")

    def scale(self, name: str, squared: bool) -> float:
        """By which a tensor's scores are multiplied before they are ranked, to be rounded to float32.

        Args:
            squared: is |S| the square of what is ranked, |theta * G|?
        """
        exponent = self.alpha / 2 if squared else self.alpha
        return float(self.costs[name] ** -exponent)


# Names of tensors, and units to prune among them, or a budget
Goals = Sequence[tuple[list[str], int | Budget]]


def goal_of(
    op: str, sparsity: float | None, costs: Mapping[str, int] | None, max_cost: int | None, alpha: float
) -> float | Budget:
    """What these arguments of `fused_drive_prune` ask for.

    Raises:
        ValueError, TypeError: they ask for nothing, or for two things, or are out of range.
    """
    if (sparsity is None) == (costs is None and max_cost is None):
        given = "neither" if sparsity is None else "both"
        raise ValueError(f"{op}: sparsity must be given, or costs and max_cost, got {given}")
    if sparsity is not None:
        if alpha != 0:
            raise ValueError(f"{op}: alpha must be 0 without costs, got {alpha!r}")
        return sparsity_of(op, sparsity)
    if not isinstance(costs, Mapping):
        raise TypeError(f"{op}: costs must be a mapping of names to integers, got {costs!r:.80}")
    words = "an integer from 1 to 2^31 - 1"
    own = {name: whole(op, f"costs[{name!r}]", c, 1, LARGEST, words=words) for name, c in costs.items()}
    most = whole(op, "max_cost", max_cost, most=2**127)
    return Budget(own, most, alpha_of(op, alpha))


def said_of(argument: str, goal: float | Budget, names: Iterable[str]) -> list[tuple[str, object]]:
    """What must be the same on all ranks that prune these tensors: arguments and their values.

    Args:
        argument: that gives a goal which is not a budget.
    """
    if not isinstance(goal, Budget):
        return [(argument, goal)]
    costs = [(f"costs[{name!r}]", goal.costs[name]) for name in names]
    return [(argument, None), ("max_cost", goal.max_cost), ("alpha", goal.alpha), *costs]


def alpha_of(op: str, alpha: object) -> float:
    """As a float. ValueError: it is no finite number >= 0."""
    number = real(alpha)
    if number is None or not 0 <= number < inf:
        raise ValueError(f"{op}: alpha must be a finite number >= 0, got {alpha!r:.80}")
    return number


def sparsity_of(op: str, sparsity: object) -> float:
    """As a float. TypeError: it is no real number. ValueError: it is not in [0, 1)."""
    number = real(sparsity)
    if number is None:
        raise TypeError(f"{op}: sparsity must be a number in [0, 1), got {sparsity!r:.80}")
    if not 0 <= number < 1:  # NaN neither
        raise ValueError(f"{op}: sparsity must be in [0, 1), got {sparsity!s:.80}")
    return number
