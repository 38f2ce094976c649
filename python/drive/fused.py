"""fused_drive_prune: one exact global pruning step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import drive_kernels  # noqa: F401  (defines torch.ops.drive)

from ._scoring.ties import warn_of_ties
from .distributed.placement import distributed_like, is_dtensor, local
from .distributed.shards import Shards
from .distributed.step import sharded_step
from .distributed.team import Said, Team, sent, team_of, together
from .holding.zero import zero_pruned_
from .layers import Layers, Weight
from .masks import Masks
from .result import PruneResult
from .targets.arguments import MOST, whole
from .targets.choice import Include, Target
from .targets.costs import Budget, goal_of, said_of
from .targets.matrices import cut, entries
from .targets.structures import axes_of
from .targets.targets import Operands, Tensors, operands

PruneOp = Callable[..., tuple[Tensor, Tensor, Tensor]]


class PruneOps(NamedTuple):
    """Implementations of drive::prune_ and drive::prune_to_cost_."""

    prune: PruneOp
    to_cost: PruneOp


OPS = PruneOps(torch.ops.drive.prune_, torch.ops.drive.prune_to_cost_)


def fused_drive_prune(
    target: Target,
    grads: Tensors | None = None,
    mask_grads: Tensors | None = None,
    *,
    sparsity: float | None = None,
    masks: Mapping[str, Tensor] | None = None,
    min_keep: int = 0,
    include: Include | None = None,
    exclude: Include | None = None,
    layers: Layers | None = None,
    process_group: dist.ProcessGroup | None = None,
    check_finite: bool = True,
    costs: Mapping[str, int] | None = None,
    max_cost: int | None = None,
    alpha: float = 0.0,
) -> PruneResult:
    """Prune to `sparsity` or `max_cost` by the DRIVE score, globally and exactly; weights, masks in place.

    The score of an entry is |theta * dL/dm * dL/dtheta| (arXiv 2404.03687, Eq. 6), normalised by its
    sum (Eq. 7). Afterwards exactly `round(sparsity * total)` entries are zero and masked (or as many
    as `masks` had pruned before, if those were more). Among equal scores the lower global index
    (order of the tensors, then row-major index) survives; pruned entries never come back. The masks
    are the same bit for bit on every backend and with any number of threads. If anything raises,
    weights, masks and gradients are as they were. Where entries of score 0 survive and others do not, the
    logger `drive._scoring.ties` says so once a model (with `check_finite`).

    Tensors that are spread over ranks are pruned as one tensor each, to the same masks as in one process,
    while some kilobytes travel (docs/scaling.md). All ranks must call this together, for
        DTensors (FSDP2, tensor parallelism): Shard and Replicate on any mesh; their masks are DTensors too;
        a model wrapped in DistributedDataParallel, or plain tensors beside DTensors: equal on all ranks,
            which is checked;
        plain tensors with a `process_group`: each rank's rows of larger ones, in the order of the ranks.

    Args:
        target: a module, a mapping of names to tensors, or a sequence of tensors; float32,
            bfloat16, float16 (freely mixed) or float64, any shapes and strides, on one device.
            A tensor that appears twice (tied weights) counts once, under its first name.
        grads: dL/dtheta, same structure as `target` (or a mapping by parameter name), shape and
            dtype of the weights. Default: each tensor's `.grad`.
        mask_grads: dL/dm, likewise. Default: theta * dL/dtheta, which is exact when both gradients
            come from the same batch and weights; scores are then ranked by |float32(theta * grad)|.
            If given, scores are ranked by the product of the three in float64.
        sparsity: final fraction of zeros over all prunable entries, 0 <= sparsity < 1; or instead
        costs, max_cost: what an entry of each tensor costs, by its name, an integer from 1 to 2^31 - 1
            (multiply-adds, say), and what the survivors may cost in all. Down the ranking entries survive up
            to the first that would exceed `max_cost`, so that less than its cost is left over. `min_keep`
            counts.
        alpha: with costs, entries are ranked by |S| / cost ** alpha: 0 by the score alone, 1 by score per
            cost (the greedy solution of the knapsack problem). That is |theta * (grad * w)|, w =
            float32(cost ** (-alpha / 2)), with `mask_grads` the product times float32(cost ** -alpha); the
            result's threshold and sum are of these.
        masks: masks to update in place, of the same names and shapes, as `Masks` or a mapping of bool
            tensors; False entries stay pruned.
        min_keep: survivors that every tensor keeps at least (all it has, if those are fewer); in a module
            every matrix of it: every expert, group of a convolution, gate, and q, k and v (docs/layers.md).
            Equal scores are then ordered matrix by matrix.
        include: which tensors: a predicate (name, module, tensor) -> bool, or names, of which those with
            wildcards ("encoder.*") choose among weights. Default: of a mapping or sequence everything; of a
            module the weights of all layer types that are known (docs/layers.md), but for frozen ones,
            embeddings and heads tied to them, and the factors of adapters.
        exclude: what not, of these: likewise a predicate or names.
        layers: layer types of one's own for this call, as `drive.register_layer` takes them for all.
        process_group: the ranks that hold the other shards; DTensors on all ranks need none. Of plain tensors
            `min_keep` counts per tensor.
        check_finite: raise if a score is not finite. False: no host synchronisation (but for tensors that
            are spread over ranks); a non-finite score then makes the step a no-op and `result.ok` False.

    Returns:
        PruneResult, with the masks and the counts.

    Raises:
        ValueError: sparsity, min_keep, costs, max_cost or alpha out of range; a missing or misshapen gradient
            or mask; a missing cost; an empty selection; a non-finite score.
        TypeError: an argument or tensor of the wrong type or dtype.
        RuntimeError: another rank raised an error, or did not come.
    """
    op = "fused_drive_prune"
    team = team_of(op, target, process_group)
    goal = goal_of(op, sparsity, costs, max_cost, alpha)
    return prune_step(
        OPS, op, target, grads, mask_grads, goal=goal, masks=masks,
        min_keep=min_keep, include=include, exclude=exclude, layers=layers, check_finite=check_finite,
        team=team,
    )  # fmt: skip


def prune_step(
    ops: PruneOps,
    op: str,
    target: Target,
    grads: Tensors | None,
    mask_grads: Tensors | None,
    *,
    goal: float | Budget,
    masks: Mapping[str, Tensor] | None,
    min_keep: int,
    include: Include | None,
    exclude: Include | None,
    layers: Layers | None,
    check_finite: bool,
    team: Team | None = None,
) -> PruneResult:
    """Check the arguments, call one of `ops`, wrap its result. On a team, drive::shard_* take the step.

    `goal`: a sparsity, or a budget.
    """
    with together(team, "check their arguments") as said:
        found = operands(target, grads, mask_grads, include, exclude, layers, op)
        axes = axes_of(target, found.weights, layers) if min_keep and isinstance(target, nn.Module) else {}
        step = Step(op, found, masks, min_keep, team, axes)
        if isinstance(goal, Budget):
            goal.check_names(op, found.weights)
        said += [*said_of("sparsity", goal, found.weights), *step.said]
    sizes = step.meet()
    if not isinstance(goal, Budget):
        goal = round(goal * sum(sizes.values()))
    return step.take(ops, sizes, goal, check_finite)


class Step:
    """A step whose tensors and masks fit together on this rank."""

    def __init__(
        self,
        op: str,
        found: Operands,
        masks: Mapping[str, Tensor] | None,
        min_keep: int,
        team: Team | None,
        axes: Mapping[str, Weight],
    ) -> None:
        """
        Args:
            op: for the error messages.
            found: what to prune, by what.
            masks, min_keep: of `fused_drive_prune`.
            team: the ranks that take it together; None: this process alone.
            axes: how layers multiply by the weights: those that are several matrices keep `min_keep` of each.

        Raises:
            ValueError, TypeError: a mask that does not fit, a bad `min_keep`, DTensors without a team.
        """
        if team is None and any(map(is_dtensor, found.weights.values())):
            raise TypeError(f"{op}: tensors must be plain ones, got a DTensor")
        self._op, self._found, self._fresh = op, found, masks is None
        self._min_keep = whole(op, "min_keep", min_keep)
        self._axes = {name: axes.get(name, Weight()) for name in found.weights}
        masks = new_masks(found.weights) if masks is None else Masks.of(masks)
        masks.check_match(op, found.weights)
        self._masks = [masks[name] for name in found.weights]
        self._shards = None if team is None else Shards(team, found.weights)

    @property
    def said(self) -> Said:
        """What must be the same on all ranks before they `meet`."""

        def given(whether: bool) -> str:
            return "given" if whether else "none"

        return [
            *([] if self._shards is None else self._shards.said),
            ("min_keep", self._min_keep),
            ("masks", given(not self._fresh)),
            ("gradients", given(bool(self._found.grads))),
            ("mask gradients", given(bool(self._found.mask_grads))),
        ]

    def meet(self) -> dict[str, int]:
        """Entries of each tensor, on all ranks, which must all ask."""
        weights, shards = self._found.weights, self._shards
        shapes = {name: weight.shape for name, weight in weights.items()} if shards is None else shards.meet()
        whole = not self._min_keep or (shards is not None and shards.team.rows)
        self._matrices = cut(shapes, {name: Weight() for name in shapes} if whole else self._axes)
        return {name: shape.numel() for name, shape in shapes.items()}

    @torch.no_grad()
    def take(
        self, ops: PruneOps, sizes: Mapping[str, int], goal: int | Budget, check_finite: bool
    ) -> PruneResult:
        """Prune so many entries in all, or to a budget, after the ranks have met.

        Raises:
            ValueError: `min_keep` asks for more survivors than there are; a non-finite score.
        """
        op, found, shards = self._op, self._found, self._shards
        self._check_guards(sizes, goal)
        weights = list(found.weights.values())
        lists = found.scores or weights, found.grads, found.mask_grads, self._masks
        tensors = [[local(tensor) for tensor in some] for some in lists]
        places = self._matrices
        apart = len(places) > len(weights)
        if apart:
            if shards is not None:
                shards, places = shards.cut(places)
            tensors = [[some[t][place] for t, place in places] if some else [] for some in tensors]
        bad_ranks: list[int] | None = None
        squared = bool(found.grads) and not found.mask_grads
        names = [list(found.weights)[t] for t, _ in places]
        to_cost: Any = (*tensors, self._fresh, *_to_cost(goal, sizes, names, squared), self._min_keep)
        if shards is not None:
            kept, nonfinite, scores, bad_ranks = sharded_step(shards, *to_cost)
        elif isinstance(goal, Budget):
            kept, nonfinite, scores = ops.to_cost(*to_cost)
        else:
            kept, nonfinite, scores = ops.prune(*tensors, self._fresh, goal, self._min_keep)
        if apart:
            of = sent(torch.tensor([t for t, _ in places]), kept.device)
            kept, nonfinite = (kept.new_zeros(len(weights)).index_add_(0, of, n) for n in (kept, nonfinite))
            if bad_ranks is not None:
                firsts = zip(places, bad_ranks, strict=True)
                bad_ranks = [
                    min(rank for _, rank in some) for _, some in groupby(firsts, lambda one: one[0][0])
                ]
        if found.scores is not None:  # the op has zeroed these
            zero_pruned_(zip(weights, self._masks, strict=True))
        torch.autograd.graph.increment_version(self._masks)  # which the op does not: copies are kept of them
        rows = shards is not None and shards.team.rows  # of models of which this rank sees its own part
        parameters = None if rows else found.parameters
        masks = Masks(dict(zip(found.weights, self._masks, strict=True)), parameters)
        budget = goal if isinstance(goal, Budget) else None
        result = PruneResult(masks, kept, nonfinite, scores, sizes, bad_ranks, budget)
        if check_finite:
            weakest = scores.to("cpu", non_blocking=scores.is_cuda)  # travels with what is waited for anyway
            result.check_finite(op).answer()
            lost = isinstance(goal, Budget) or goal == result.pruned  # not more, by older masks
            if weakest[0] == 0 and lost and result.pruned:
                warn_of_ties(op, weights)
        return result

    def _check_guards(self, sizes: Mapping[str, int], goal: int | Budget) -> None:
        names, guard = list(sizes), f"{self._op}: min_keep={self._min_keep}"
        guards = [(names[t], min(self._min_keep, entries(box))) for t, box in self._matrices]
        if isinstance(goal, Budget):
            goal.check_total(self._op, sizes)
            cost = sum(goal.costs[name] * n for name, n in guards)
            if cost > goal.max_cost:
                raise ValueError(f"{guard} asks for survivors that cost {cost}, max_cost is {goal.max_cost}")
            return
        total, guarded = sum(sizes.values()), sum(n for _, n in guards)
        if guarded > total - goal:
            raise ValueError(
                f"{guard} asks for {guarded} survivors, {goal} pruned leave {total - goal} of {total}"
            )


def _to_cost(
    goal: int | Budget, sizes: Mapping[str, int], names: Sequence[str], squared: bool
) -> tuple[list[int], list[float], int]:
    """Costs, scales and max_cost as drive::prune_to_cost_ takes them: entries to prune are a budget too.

    Args:
        names: of which tensors, perhaps several parts of one.
        squared: is |S| the square of what is ranked?
    """
    if isinstance(goal, Budget):
        scales = [goal.scale(name, squared) for name in names]
        return [goal.costs[name] for name in names], scales, min(goal.max_cost, MOST)
    return [1] * len(names), [], sum(sizes.values()) - goal


def new_masks(weights: dict[str, Tensor]) -> Masks:
    """Masks to be written, in their weights' memory layouts.

    All in one piece of memory: page faults in many small ones take as long as the step itself. Each begins
    on 64 bytes, as the kernels' vectors do. None is a view of another tensor, which would keep the piece.
    """
    offsets, end = [], 0
    for weight in weights.values():
        offsets.append(end)
        end += (local(weight).numel() + 63) // 64 * 64
    masks = {}
    with torch.inference_mode(False):  # to be written to outside of it, too
        room = torch.ops.drive.new_masks(local(next(iter(weights.values()))), end)
        for (name, weight), offset in zip(weights.items(), offsets, strict=True):
            here = local(weight)
            stride = torch.empty_like(here, device="meta").stride()  # a slice's mask is dense
            mask = room.new_empty(0).set_(room.untyped_storage(), offset, here.shape, stride)
            masks[name] = distributed_like(mask, weight)
    return Masks(masks)
