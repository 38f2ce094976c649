"""One step of the loop where outputs are pruned as a whole: units compete, rows of weights go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor, prod

import torch
from torch import Tensor

from drive._scoring.ties import Competition, TieCheck, Zeros, check_ties
from drive.holding.zero import zero_pruned_
from drive.masks import Masks
from drive.methods.base import Ranking
from drive.result import PruneResult
from drive.rounds import entry_scores
from drive.targets import scopes
from drive.targets.costs import Budget, Goals
from drive.targets.multiply_adds import MULTIPLY_ADDS
from drive.targets.outputs import Rows
from drive.targets.scopes import Groups
from drive.targets.targets import Prunable

from .groups import Group, Slices


class ChannelSelection:
    """Which units of which groups a loop prunes: by a method's ranking, in a scope."""

    def __init__(
        self,
        weights: Prunable,
        outputs: Mapping[str, Rows],
        groups: Sequence[Group],
        scope: str,
        min_keep: int,
        op: str = "prune",
    ):
        """
        Args:
            outputs: where those of each weight are.
            groups: of the model, whose rows are all of `weights`.
            scope, min_keep: of `drive.prune`.
            op: for the error messages.
        """
        self.op, self.weights, self.scope, self.min_keep = op, dict(weights), scope, min_keep
        self.candidates = {group.name: group for group in groups}
        self._parameters = weights.parameters
        self._axes = {name: rows.axis for name, rows in outputs.items()}
        self._work = _Work(self.weights, self.candidates)

    def groups(self, sparsity: float) -> Groups:
        """What to prune to a sparsity: names of groups and a number of units.

        Raises:
            ValueError: `min_keep` asks for more units than are left.
        """
        shapes = {name: torch.Size([group.units]) for name, group in self.candidates.items()}
        total = sum(shape.numel() for shape in shapes.values())
        found = scopes.groups(self.scope, shapes, round(sparsity * total))
        for names, count in found:
            guarded = sum(min(self.min_keep, shapes[name].numel()) for name in names)
            some = sum(shapes[name].numel() for name in names)
            if some - count < guarded:
                raise ValueError(
                    f"{self.op}: min_keep={self.min_keep} asks for {guarded} of {some} channels in "
                    f"{len(names)} groups, {some - count} are to be left"
                )
        return found

    def budgets(
        self, costs: Mapping[str, int], steps: Sequence[float], macs: float, alpha: float
    ) -> list[Goals]:
        """The same of work, a share of which goes in each step, and `macs` is left at most in the end.

        Raises:
            ValueError: with `min_keep` units of each group more is left.
        """
        self._work.costs = costs
        dense = self._work.left({name: group.units for name, group in self.candidates.items()})
        least = self._work.left(
            {name: min(self.min_keep, group.units) for name, group in self.candidates.items()}
        )
        left = [dense - round(step * dense) for step in steps[:-1]]
        left.append(floor(Fraction(str(macs)) * dense))  # the decimal number that was written
        if least > left[-1]:
            raise ValueError(
                f"{self.op}: macs must be at least {least / dense:.4f}, what is left of {dense:,} with "
                f"{self.min_keep} channels of each group, got {macs}"
            )
        return [[(list(self.candidates), Budget(costs, most, alpha, MULTIPLY_ADDS))] for most in left]

    def begun(self, masks: Mapping[str, Tensor]) -> Masks:
        """A copy of the masks that pruning goes on from.

        Raises:
            ValueError, TypeError: they are none, do not fit the weights, or are not of whole units.
        """
        masks = Masks.of(masks)
        masks.check_match(self.op, self.weights)
        for name, mask in masks.items():
            rows = mask.movedim(self._axes[name], 0).flatten(1)
            if bool((rows.any(1) != rows.all(1)).any()):
                raise ValueError(f"{self.op}: masks[{name}] must be of whole rows for structure channels")
        for group in self.candidates.values():
            alive = torch.stack([_alive(masks, place) for place in group.rows])
            if bool((alive != alive[0]).any()):
                raise ValueError(
                    f"{self.op}: masks must leave the same channels of the layers that are coupled with "
                    f"{group.name} for structure channels"
                )
        return Masks({name: masks[name] for name in self.weights}, self._parameters).clone()

    @torch.no_grad()
    def step(
        self, ranking: Ranking, groups: Goals, masks: Masks | None, ties: TieCheck | None = None
    ) -> PruneResult:
        """Prune every group by the ranking: weights and masks in place. The result is not checked yet.

        Args:
            ties: check for scores of 0 that decide.

        Raises:
            ValueError, TypeError: the ranking's tensors do not fit the weights; scores of 0 decide.
        """
        before = masks
        if masks is None:
            masks = Masks.ones(self.weights, self._parameters)
        rows, bad = self._rows(ranking, masks)
        scores, alive = {}, {}
        for name, group in self.candidates.items():
            parts = [rows[place.tensor][place.indices.to(rows[place.tensor].device)] for place in group.rows]
            summed = torch.stack([part.sum(1) for part in parts]).sum(0)
            scores[name] = summed.abs() if ranking.gates is not None else summed
            fresh = before is None or ranking.revive
            alive[name] = (
                torch.ones_like(scores[name], dtype=torch.bool) if fresh else _alive(masks, group.rows[0])
            )
        threshold, total = torch.inf, 0.0
        if not bool(bad.any()):
            kept: dict[str, Tensor] = {}
            for names, goal in groups:
                kept |= self._select({name: scores[name] for name in names}, alive, goal)
            if ties is not None:
                self._check(ties, ranking, scores, alive, kept, groups)
            self._write(masks, kept)
            zero_pruned_((weight, masks[name]) for name, weight in self.weights.items())
            total = float(torch.stack([s[alive[name]].abs().sum() for name, s in scores.items()]).sum())
            survivors = torch.cat([scores[name][kept[name]] for name in kept])
            threshold = float(survivors.min()) if len(survivors) else torch.inf
        counts = torch.stack([mask.sum() for mask in masks.values()])
        measured = torch.tensor([threshold / total if total else threshold, total], dtype=torch.float64)
        return PruneResult(masks, counts, bad, measured.to(counts.device))

    def _rows(self, ranking: Ranking, masks: Masks) -> tuple[dict[str, Tensor], Tensor]:
        """Scores of each weight's outputs, float64, and how many of its scores are not finite."""
        found, bad = {}, []
        for name, weight in self.weights.items():
            if ranking.gates is not None:
                entries = ranking.gates[name].double()
                wrong = ~entries.isfinite()
            else:  # of one tensor after the other: float64 takes twice the memory of the weights
                entries = entry_scores(self.op, name, weight, ranking)
                wrong = ~entries.isfinite() & masks[name]
                entries = torch.where(masks[name], entries, 0.0) if not ranking.revive else entries
                entries = entries.movedim(self._axes[name], 0).flatten(1).sum(1)
            found[name] = entries
            bad.append(wrong.sum())
        return found, torch.stack(bad)

    def _select(
        self, scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], goal: int | Budget
    ) -> dict[str, Tensor]:
        """Units that stay, [units] bool by group: of equal ones those of lower name and index."""
        scaled = dict(scores)
        if isinstance(goal, Budget):
            scaled = {name: score / self._work.unit(name) ** goal.alpha for name, score in scores.items()}
        names = list(scaled)
        sizes = [len(scaled[name]) for name in names]
        flat = torch.cat([torch.where(alive[name], scaled[name], -torch.inf) for name in names]).cpu()
        living = torch.cat([alive[name] for name in names]).cpu()
        of = torch.arange(len(names)).repeat_interleave(torch.tensor(sizes))
        order = flat.argsort(descending=True, stable=True)
        guarded = torch.zeros_like(living)
        for some in order[of[order].argsort(stable=True)].split(sizes):  # the best of each group first
            best = some[: self.min_keep]
            guarded[best] = living[best]
        queue = torch.cat([order[guarded[order]], order[~guarded[order] & living[order]]])  # the best first
        if isinstance(goal, Budget):
            count = self._within(goal.max_cost, names, of[queue], int(guarded.sum()))
        else:
            count = max(sum(sizes) - goal, int(guarded.sum()))
        stays = torch.zeros_like(living)
        stays[queue[:count]] = True
        return {
            name: some.to(scores[name].device) for name, some in zip(names, stays.split(sizes), strict=True)
        }

    def _within(self, most: int, names: Sequence[str], queue: Tensor, least: int) -> int:
        """How many of the queue, groups of units by number, can stay: by bisection, work rises with each."""
        low, high = least, len(queue)
        while low < high:
            middle = (low + high + 1) // 2
            counts = torch.bincount(queue[:middle], minlength=len(names)).tolist()
            if self._work.left(dict(zip(names, counts, strict=True))) <= most:
                low = middle
            else:
                high = middle - 1
        return low

    def _write(self, masks: Masks, kept: Mapping[str, Tensor]) -> None:
        for name, stays in kept.items():
            gone = (~stays).nonzero().flatten().cpu()
            for place in self.candidates[name].rows:
                mask = masks[place.tensor]
                mask.index_fill_(place.axis, place.indices.flatten().to(mask.device), True)
                mask.index_fill_(place.axis, place.indices[gone].flatten().to(mask.device), False)

    def _check(
        self,
        ties: TieCheck,
        ranking: Ranking,
        scores: Mapping[str, Tensor],
        alive: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        groups: Goals,
    ) -> None:
        """Look for scores of 0 that decide, where some lost and others survived."""
        competitions = []
        for (names, _), (_, last) in zip(groups, ties.last, strict=True):
            found = []
            for name in names:
                zeros = alive[name] & (scores[name] == 0)
                lowest = alive[name] & (scores[name] <= 0) if ranking.signed else zeros
                living, left = int(alive[name].sum()), int(kept[name].sum())
                guarded = min(self.min_keep, living)
                found.append(Zeros(name, living, int(zeros.sum()), int(lowest.sum()), left, guarded))
            lost = any(bool((alive[n] & ~kept[n] & (scores[n] == 0)).any()) for n in names)
            survived = any(bool((kept[n] & (scores[n] == 0)).any()) for n in names)
            if lost and survived:
                total = sum(self.candidates[name].units for name in names)
                before = total - sum(zero.alive for zero in found)
                gone = total - sum(zero.kept for zero in found)
                competitions.append(Competition(found, (gone if isinstance(last, Budget) else last) - before))
        check_ties(ties, competitions)


class _Work:
    """Multiply-adds of the weights when so many units of each group are left."""

    def __init__(self, weights: Mapping[str, Tensor], groups: Mapping[str, Group]):
        self.costs: Mapping[str, int] = {}
        self._shapes = {name: list(weight.shape) for name, weight in weights.items()}
        self._groups = groups

    def left(self, units: Mapping[str, int]) -> int:
        """
        Args:
            units: that are left of each group; all of a group that is not among them.
        """
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        for name, count in units.items():
            group = self._groups[name]
            for place in (*group.rows, *group.columns):
                if place.tensor in shapes:
                    shapes[place.tensor][place.axis] -= (group.units - count) * place.indices.shape[1]
        return sum(self.costs[name] * prod(shape) for name, shape in shapes.items())

    def unit(self, name: str) -> int:
        """What one unit of a group costs in the dense model: its rows, and what reads it."""
        group = self._groups[name]
        return self.left({}) - self.left({name: group.units - 1})


def _alive(masks: Masks, place: Slices) -> Tensor:
    """Units of which something survives in one of the tensors."""
    rows = masks[place.tensor].movedim(place.axis, 0).flatten(1).any(1)
    return rows[place.indices.to(rows.device)].any(1)
