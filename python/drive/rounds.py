"""One step of the loop: a method's ranking, in the groups of a scope and the pattern of a structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import floor

import torch
from torch import Tensor, nn

from ._scoring.ties import Competition, TieCheck, Zeros, check_ties
from .distributed.placement import check_placed, is_dtensor, local
from .distributed.shards import Shards
from .distributed.team import Said, Team, together
from .fused import OPS, Step
from .holding.zero import zero_pruned_
from .layers import Layers, Weight
from .masks import Masks
from .methods.base import Ranking
from .result import PruneResult
from .targets import scopes, structures
from .targets.costs import Budget, Goals, said_of
from .targets.matrices import boxes, entries
from .targets.multiply_adds import MULTIPLY_ADDS, work
from .targets.scopes import Groups
from .targets.targets import Operands, Prunable, match


class Selection:
    """Which entries a loop prunes: by a method's ranking, in a scope and a structure."""

    def __init__(
        self,
        model: nn.Module,
        weights: Prunable,
        structure: str,
        scope: str,
        sparsity: float,
        min_keep: int,
        team: Team | None = None,
        layers: Layers | None = None,
        op: str = "prune",
    ):
        """
        Args:
            model: whose the weights are.
            weights: the prunable ones by name.
            structure, scope, sparsity, min_keep: of `drive.prune`.
            team: the ranks that hold the model; None: this process alone.
            layers: of `drive.prune`.
            op: for the error messages.

        Raises:
            ValueError: an unknown name; weights, a scope or a sparsity that the structure cannot have.
        """
        self.op, self.weights, self.scope, self.min_keep = op, dict(weights), scope, min_keep
        self.structure = structures.structure(structure)
        self.axes: Mapping[str, Weight] = {}
        self.team = team
        self._parameters = None if team is not None and team.rows else weights.parameters
        self._shards = None if team is None else Shards(team, weights)
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        if self.structure is not None or min_keep:
            self.axes = structures.axes_of(model, weights, layers)
        if self.structure is not None:
            if (team is not None and team.rows) or any(map(is_dtensor, weights.values())):
                raise ValueError(f"{op}: structure must be 'unstructured' for shards, got {structure!r}")
            for name, weight in weights.items():
                self.structure.check(op, name, weight, self.axes[name])
            self.structure.check_plan(op, weights, self.axes, scope, sparsity, min_keep)

    @property
    def said(self) -> Said:
        """What must be the same on all ranks before they `meet`."""
        return [
            *([] if self._shards is None else self._shards.said),
            *(("scope", self.scope), ("structure", self.structure), ("min_keep", self.min_keep)),
        ]

    def meet(self) -> None:
        """All ranks must call this, before the rest."""
        if self._shards is not None:
            self._shapes = self._shards.meet()

    def groups(self, sparsity: float) -> Groups:
        """What to prune to a sparsity: names of tensors and a number of entries, or of blocks."""
        unit, _, count = self._units(sparsity)
        return scopes.groups(self.scope, self._shapes, count, unit)

    def check_left(self, sparsity: float) -> None:
        """Raise ValueError if a sparsity leaves nothing."""
        unit, total, count = self._units(sparsity)
        if count == total > 0:
            units = "entries" if unit == 1 else "blocks"
            raise ValueError(
                f"{self.op}: sparsity must leave one of {total:,} {units} at least, got {sparsity}"
            )

    def _units(self, sparsity: float) -> tuple[int, int, int]:
        """Entries of a unit; how many units there are, and how many of them to prune to a sparsity."""
        unit = 1 if self.structure is None else self.structure.size
        total = sum(shape.numel() for shape in self._shapes.values()) // unit
        return unit, total, round(sparsity * total)

    def budgets(
        self, costs: Mapping[str, int], steps: Sequence[float], macs: float, alpha: float
    ) -> list[Goals]:
        """The same of work, a share of which goes in each step, and `macs` is left at most in the end.

        Args:
            costs: of an entry of each tensor.

        Raises:
            ValueError: in the end not even the cheapest unit is left, or `min_keep` costs more.
        """
        dense = work(costs, {name: shape.numel() for name, shape in self._shapes.items()})
        left = [dense - round(step * dense) for step in steps[:-1]]
        left.append(floor(Fraction(str(macs)) * dense))  # the decimal number that was written
        unit = 1 if self.structure is None else self.structure.size
        least = min((unit * costs[name] for name, shape in self._shapes.items() if shape.numel()), default=0)
        if least > left[-1]:
            raise ValueError(
                f"{self.op}: macs must leave {least:,} of {dense:,} multiply-adds, what the cheapest "
                f"{'entry' if unit == 1 else 'block'} costs, got {macs}: {left[-1]:,}"
            )
        guard = -(-self.min_keep // unit) * unit
        guards = {
            name: sum(min(guard, entries(box)) for box in boxes(shape, self.axes[name]))
            for name, shape in self._shapes.items()
            if guard
        }
        if (guarded := work(costs, guards)) > left[-1]:
            raise ValueError(
                f"{self.op}: min_keep={self.min_keep} asks for {guarded:,} multiply-adds, {left[-1]:,} of "
                f"{dense:,} are to be left"
            )
        return [[(list(self._shapes), Budget(costs, most, alpha, MULTIPLY_ADDS))] for most in left]

    def begun(self, masks: Mapping[str, Tensor]) -> Masks:
        """A copy of the masks that pruning goes on from.

        Raises:
            ValueError, TypeError: they are none, or do not fit the weights or the structure.
        """
        masks = Masks.of(masks)
        masks.check_match(self.op, self.weights)
        copies = Masks({name: masks[name] for name in self.weights}, self._parameters).clone()
        if self.structure is not None:
            for name, mask in copies.items():
                self.structure.check_mask(self.op, name, mask, self.axes[name])
        return copies

    def step(
        self, ranking: Ranking, groups: Goals, masks: Masks | None, ties: TieCheck | None = None
    ) -> PruneResult:
        """Prune every group by the ranking: weights and masks in place. The result is not checked yet.

        Args:
            ties: check for scores of 0 that decide; waits for the device.

        Raises:
            ValueError, TypeError: the ranking's tensors do not fit the weights; scores of 0 decide.
        """
        results: list[PruneResult] = []
        tied: list[Competition] = []
        for (names, goal), (_, last) in zip(groups, groups if ties is None else ties.last, strict=True):
            some = {name: self.weights[name] for name in names}
            old = None if masks is None or ranking.revive else Masks({name: masks[name] for name in names})
            before = None if ties is None else self._count_zeros(some, ranking, old)
            if self.structure is None:
                find = partial(_operands, self.op, some, ranking, goal)
                results.append(self._take(find, _unscaled(goal, ranking), old, self.min_keep))
            else:
                results.append(self._structured(self.structure, some, ranking, goal, old))
            if ties is not None and before is not None and self._tied(ranking.signed, before, results[-1]):
                if isinstance(last, Budget):  # how many entries it leaves is not known before
                    unit = 1 if self.structure is None else self.structure.size
                    last = (results[-1].total if ties.first else results[-1].pruned) // unit
                tied.append(self._competition(before, last, results[-1]))
        if ties is not None:
            check_ties(ties, tied)
        result = PruneResult.merged(results)
        result.masks.parameters = self._parameters
        if masks is not None and result.masks is not masks:  # in place: whatever holds the masks follows
            for name, mask in masks.items():
                mask.copy_(result.masks[name])
            result.masks = masks
        return result

    @torch.no_grad()
    def _count_zeros(self, weights: Mapping[str, Tensor], ranking: Ranking, masks: Masks | None) -> Tensor:
        """[T, 3] entries, on all ranks, that are alive, that score 0, and that score 0 or less if signed."""
        wide = any(weight.dtype == torch.float64 for weight in weights.values())
        counts = torch.zeros(len(weights), 3, dtype=torch.int64, device=next(iter(weights.values())).device)
        for row, (name, weight) in zip(counts, weights.items(), strict=True):
            if self._shards is not None and not self._shards.parts[name].owner:
                continue
            here = local(weight)
            alive = torch.ones_like(here, dtype=torch.bool) if masks is None else local(masks[name])
            if self.structure is None:
                keys, unit = _keys(self.op, name, weight, ranking, wide), 1
            else:
                score = torch.where(alive, entry_scores(self.op, name, weight, ranking), 0.0)
                keys, unit = self.structure.pooled(score, self.axes[name]), self.structure.size
                alive = self.structure.pooled(alive.double(), self.axes[name]) > 0
            zeros = alive & (keys == 0)
            lowest = alive & (keys <= 0) if ranking.signed else zeros
            row.copy_(torch.stack([alive.sum(), zeros.sum(), lowest.sum()]) * unit)
        return counts if self.team is None else self.team.sum(counts, "count scores of 0")

    def _tied(self, signed: bool, before: Tensor, result: PruneResult) -> bool:
        """Did entries of score 0 lose and others survive? In N:M perhaps, where all of a tensor do."""
        alive, zeros, _ = before.unbind(1)
        if not result.ok or result.kept == int(alive.sum()):
            return False
        if isinstance(self.structure, structures.NofM):
            return bool(((zeros == alive) & (alive > 0)).any())
        if signed:  # what `ordered` makes of scores are whole numbers
            return abs(result.threshold * result.score_sum - NEUTRAL) < 0.5
        return result.threshold == 0

    def _competition(self, before: Tensor, last: int, result: PruneResult) -> Competition:
        """
        Args:
            before: of `_count_zeros`.
            last: units that the last step prunes among the same tensors.
        """
        unit = 1 if self.structure is None else self.structure.size
        guard = -(-self.min_keep // unit) * unit
        found = []
        for (name, _, kept), (alive, zeros, lowest) in zip(result.per_tensor, before.tolist(), strict=True):
            matrices = len(boxes(self._shapes[name], self.axes[name])) if guard else 0
            found.append(Zeros(name, alive, zeros, lowest, kept, guard * matrices))
        pruned_before = result.total - int(before[:, 0].sum())
        pattern = isinstance(self.structure, structures.NofM)
        return Competition(found, result.total if pattern else last * unit - pruned_before)

    def _structured(
        self,
        structure: structures.Structure,
        weights: Mapping[str, Tensor],
        ranking: Ranking,
        goal: int | Budget,
        masks: Masks | None,
    ) -> PruneResult:
        """The same on units: their scores are computed, safe ones set aside, the rest is selected from.

        Of a budget, none is safe, and all are of as many entries.
        """
        scores = {name: entry_scores(self.op, name, weight, ranking) for name, weight in weights.items()}
        alive = masks or Masks.ones(weights)
        bad = torch.stack([(~score.isfinite() & alive[name]).sum() for name, score in scores.items()])
        units, safe, open_ = {}, {}, {}
        for name, score in scores.items():
            axes = self.axes[name]
            units[name] = structure.pooled(torch.where(alive[name], score, 0.0), axes)
            safe[name] = structure.safe(score, alive[name], axes)
            open_[name] = (structure.pooled(alive[name].double(), axes) > 0) & ~safe[name]
        guarded = [structure.safe_units(weight.numel()) for weight in weights.values()]
        if isinstance(goal, Budget):
            goal = replace(goal, max_cost=goal.max_cost // structure.size)
        else:
            goal += sum(guarded)
        ranked = _ordered(units, goal) if ranking.signed else list(units.values())
        min_keep = structure.units_to_keep(self.min_keep)
        find = partial(Operands, units, [], [], ranked)
        result = self._take(find, _unscaled(goal, ranking), Masks(open_), min_keep)
        for name in weights:
            alive[name].copy_(structure.expand(result.masks[name] | safe[name], self.axes[name]))
        zero_pruned_((weight, alive[name]) for name, weight in weights.items())
        kept = (result._kept + torch.tensor(guarded, device=result._kept.device)) * structure.size
        return PruneResult(alive, kept, bad, result._scores)

    def _take(
        self, find: Callable[[], Operands], goal: int | Budget, masks: Masks | None, min_keep: int
    ) -> PruneResult:
        with together(self.team, "check their scores") as said:
            found = find()
            step = Step(self.op, found, masks, min_keep, self.team, self.axes)
            said += [*said_of("entries to prune", goal, found.weights), *step.said]
        return step.take(OPS, step.meet(), goal, check_finite=False)


def _operands(op: str, weights: dict[str, Tensor], ranking: Ranking, goal: int | Budget) -> Operands:
    if ranking.scores is not None:
        scores = {name: _score(op, name, weight, ranking) for name, weight in weights.items()}
        return Operands(weights, [], [], _ordered(scores, goal) if ranking.signed else list(scores.values()))

    def matched(argument: str, given: Mapping[str, Tensor] | None) -> list[Tensor]:
        return [] if given is None else match(op, argument, given, weights, weights)

    grads = matched("gradients", ranking.gradients)
    return Operands(weights, grads, matched("mask_gradients", ranking.mask_gradients))


def _score(op: str, name: str, weight: Tensor, ranking: Ranking) -> Tensor:
    assert ranking.scores is not None
    if name not in ranking.scores:
        raise ValueError(f"{op}: scores has no entry for {name}")
    score = ranking.scores[name].detach()
    if score.shape != weight.shape:
        raise ValueError(
            f"{op}: scores[{name}] must have shape {tuple(weight.shape)}, got {tuple(score.shape)}"
        )
    check_placed(op, f"scores[{name}]", score, weight)
    return local(score)


def _keys(op: str, name: str, weight: Tensor, ranking: Ranking, wide: bool) -> Tensor:
    """What drive::prune_ ranks by, but for its sign, on this rank: a key is 0 where the op's is."""
    if ranking.scores is not None:
        score = _score(op, name, weight, ranking)
        return score.float() if ranking.signed else score
    dtype = torch.float64 if wide or ranking.mask_gradients is not None else torch.float32
    key = local(weight).detach().to(dtype)
    for given in (ranking.mask_gradients, ranking.gradients):
        if given is not None:
            key = key * local(given[name]).to(dtype)
    return key


@torch.no_grad()
def entry_scores(op: str, name: str, weight: Tensor, ranking: Ranking) -> Tensor:
    """The scores themselves, float64, of the weight's shape."""
    if ranking.scores is not None:
        score = _score(op, name, weight, ranking).double()
        return score if ranking.signed else score.abs() ** ranking.power
    score = weight.double()
    for argument in ("gradients", "mask_gradients"):
        given: Mapping[str, Tensor] | None = getattr(ranking, argument)
        if given is not None:
            score = score * match(op, argument, given, {name: weight}, {name: weight})[0].double()
    return score.abs() ** ranking.power


def _ordered(scores: Mapping[str, Tensor], goal: int | Budget) -> list[Tensor]:
    """`ordered`, by cost before: what comes out are numbers that only have their order."""
    if isinstance(goal, Budget):
        scores = {name: score.float() * goal.scale(name, squared=False) for name, score in scores.items()}
    return [ordered(score) for score in scores.values()]


def _unscaled(goal: int | Budget, ranking: Ranking) -> int | Budget:
    """For scores that `_ordered` has scaled."""
    return replace(goal, alpha=0.0) if ranking.signed and isinstance(goal, Budget) else goal


NEUTRAL = 2.0**31  # what `ordered` makes of 0


def ordered(score: Tensor) -> Tensor:
    """Non-negative float64 numbers in the order of float32 ones of any sign; NaN and infinities stay.

    The bits of a float32, read as an integer, are in its order, but falling for negative numbers: turned
    round, and shifted by 2^31, they are whole numbers below 2^32.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.where(score.isfinite(), rising.double() + 2.0**31, score.double())
