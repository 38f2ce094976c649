"""A budget: what the entries that survive a step may cost together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import TypeGuard

LARGEST = 2**31 - 1  # of an entry's cost
MOST = 2**63 - 1  # that all entries may cost: sums are int64


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
        check_sparsity(op, sparsity)
        if alpha != 0:
            raise ValueError(f"{op}: alpha must be 0 without costs, got {alpha!r}")
        return float(sparsity)
    if not isinstance(costs, Mapping):
        raise TypeError(f"{op}: costs must be a mapping of names to integers, got {costs!r:.80}")
    for name, cost in costs.items():
        if not _is_integer(cost) or not 1 <= cost <= LARGEST:
            raise ValueError(f"{op}: costs[{name!r}] must be an integer from 1 to 2^31 - 1, got {cost!r}")
    if not _is_integer(max_cost) or max_cost < 0:
        raise ValueError(f"{op}: max_cost must be an integer >= 0, got {max_cost!r}")
    check_alpha(op, alpha)
    return Budget(dict(costs), max_cost, float(alpha))


def said_of(argument: str, goal: float | Budget, names: Iterable[str]) -> list[tuple[str, object]]:
    """What must be the same on all ranks that prune these tensors: arguments and their values.

    Args:
        argument: that gives a goal which is not a budget.
    """
    if not isinstance(goal, Budget):
        return [(argument, goal)]
    costs = [(f"costs[{name!r}]", goal.costs[name]) for name in names]
    return [(argument, None), ("max_cost", goal.max_cost), ("alpha", goal.alpha), *costs]


def check_alpha(op: str, alpha: object) -> None:
    """Raise unless it is a finite number >= 0."""
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 <= float(alpha) < inf:
        raise ValueError(f"{op}: alpha must be a finite number >= 0, got {alpha!r}")


def check_sparsity(op: str, sparsity: object) -> None:
    """Raise unless `sparsity` is a real number in [0, 1)."""
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool):
        raise TypeError(f"{op}: sparsity must be a number in [0, 1), got {sparsity!r}")
    if not 0 <= float(sparsity) < 1:  # NaN neither
        raise ValueError(f"{op}: sparsity must be in [0, 1), got {sparsity}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
