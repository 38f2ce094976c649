"""One step of the loop: a method's ranking, in the groups of a scope and the pattern of a structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .distributed.placement import check_placed, is_dtensor, local
from .distributed.shards import Shards
from .distributed.team import Said, Team, together
from .fused import Step
from .holding.zero import zero_pruned_
from .layers import Layers, Weight
from .masks import Masks
from .methods.base import Ranking
from .result import PruneResult
from .targets import scopes, structures
from .targets.scopes import Groups
from .targets.targets import Operands, match


class Selection:
    """Which entries a loop prunes: by a method's ranking, in a scope and a structure."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
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
        self._shards = None if team is None else Shards(team, weights)
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        if self.structure is not None:
            if (team is not None and team.rows) or any(map(is_dtensor, weights.values())):
                raise ValueError(f"{op}: structure must be 'unstructured' for shards, got {structure!r}")
            self.axes = structures.axes_of(model, weights, layers)
            for name, weight in weights.items():
                self.structure.check(op, name, weight, self.axes[name])
            self.structure.check_plan(op, weights, scope, sparsity, min_keep)

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
        unit = 1 if self.structure is None else self.structure.size
        total = sum(shape.numel() for shape in self._shapes.values()) // unit
        return scopes.groups(self.scope, self._shapes, round(sparsity * total), unit)

    def begun(self, masks: Masks) -> Masks:
        """A copy of the masks that pruning goes on from.

        Raises:
            ValueError: they do not fit the weights or the structure.
        """
        masks.check_match(self.op, self.weights)
        copies = Masks({name: masks[name].clone() for name in self.weights})
        if self.structure is not None:
            for name, mask in copies.items():
                self.structure.check_mask(self.op, name, mask, self.axes[name])
        return copies

    def step(self, ranking: Ranking, groups: Groups, masks: Masks | None) -> PruneResult:
        """Prune every group by the ranking: weights and masks in place. The result is not checked yet.

        Raises:
            ValueError, TypeError: the ranking's tensors do not fit the weights.
        """
        results = []
        for names, prune in groups:
            some = {name: self.weights[name] for name in names}
            old = None if masks is None or ranking.revive else Masks({name: masks[name] for name in names})
            if self.structure is None:
                find = partial(_operands, self.op, some, ranking)
                results.append(self._take(find, prune, old, self.min_keep))
            else:
                results.append(self._structured(self.structure, some, ranking, prune, old))
        result = PruneResult.merged(results)
        if masks is not None and result.masks is not masks:  # in place: whatever holds the masks follows
            for name, mask in masks.items():
                mask.copy_(result.masks[name])
            result.masks = masks
        return result

    def _structured(
        self,
        structure: structures.Structure,
        weights: Mapping[str, Tensor],
        ranking: Ranking,
        prune: int,
        masks: Masks | None,
    ) -> PruneResult:
        """The same on units: their scores are computed, safe ones set aside, the rest is selected from."""
        scores = {name: _entry_scores(self.op, name, weight, ranking) for name, weight in weights.items()}
        alive = masks or Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})
        bad = torch.stack([(~score.isfinite() & alive[name]).sum() for name, score in scores.items()])
        units, safe, open_ = {}, {}, {}
        for name, score in scores.items():
            axes = self.axes[name]
            units[name] = structure.pooled(torch.where(alive[name], score, 0.0), axes)
            safe[name] = structure.safe(score, alive[name], axes)
            open_[name] = (structure.pooled(alive[name].double(), axes) > 0) & ~safe[name]
        guarded = [structure.safe_units(weight.numel()) for weight in weights.values()]
        ranked = [ordered(unit) if ranking.signed else unit for unit in units.values()]
        min_keep = structure.units_to_keep(self.min_keep)
        find = partial(Operands, units, [], [], ranked)
        result = self._take(find, prune + sum(guarded), Masks(open_), min_keep)
        for name in weights:
            alive[name].copy_(structure.expand(result.masks[name] | safe[name], self.axes[name]))
        zero_pruned_((weight, alive[name]) for name, weight in weights.items())
        kept = (result._kept + torch.tensor(guarded, device=result._kept.device)) * structure.size
        return PruneResult(alive, kept, bad, result._scores)

    def _take(
        self, find: Callable[[], Operands], prune: int, masks: Masks | None, min_keep: int
    ) -> PruneResult:
        with together(self.team, "check their scores") as said:
            step = Step(self.op, find(), masks, min_keep, self.team)
            said += [("entries to prune", prune), *step.said]
        return step.take(torch.ops.drive.prune_, step.meet(), prune, check_finite=False)


def _operands(op: str, weights: dict[str, Tensor], ranking: Ranking) -> Operands:
    if ranking.scores is not None:
        scores = [_score(op, name, weight, ranking) for name, weight in weights.items()]
        return Operands(weights, [], [], [ordered(score) for score in scores] if ranking.signed else scores)

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


@torch.no_grad()
def _entry_scores(op: str, name: str, weight: Tensor, ranking: Ranking) -> Tensor:
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


def ordered(score: Tensor) -> Tensor:
    """Non-negative float64 numbers in the order of float32 ones of any sign; NaN and infinities stay.

    The bits of a float32, read as an integer, are in its order, but falling for negative numbers: turned
    round, and shifted by 2^31, they are whole numbers below 2^32.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.where(score.isfinite(), rising.double() + 2.0**31, score.double())
